# A fifth of the training labels is wrong.
_base_ = 'wsl_digits.py'

train_dataloader = dict(
    dataset=dict(
        dataset=dict(
            pipeline=[
                dict(type='mmwsl.LabelNoise', prob=0.2, num_classes=10),
                *_base_.train_dataloader.dataset.dataset.pipeline,
            ]
        )
    )
)
