# For an L_t out of fold, with a fifth of the labels wrong: like r20_cifar100_15e_fold_noise.py, on the digits.
_base_ = 'digits_student_noise.py'

train_dataloader = dict(
    dataset=dict(
        dataset=dict(_delete_=True, type='mmwsl.Fold', fold=0, folds=5, dataset=_base_.train_dataloader.dataset.dataset)
    )
)
