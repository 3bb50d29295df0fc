# A fifth of the training labels is wrong.
_base_ = 'kd_r56_r20_cifar100_8e.py'

train_dataloader = dict(
    dataset=dict(
        dataset=dict(
            pipeline=[
                dict(type='mmwsl.LabelNoise', prob=0.2, num_classes=100),
                *_base_.train_dataloader.dataset.dataset.pipeline,
            ]
        )
    )
)
