# For an L_t out of fold: like r20_cifar100_15e_fold.py, on the digits.
_base_ = 'digits_student.py'

train_dataloader = dict(
    dataset=dict(
        dataset=dict(_delete_=True, type='mmwsl.Fold', fold=0, folds=5, dataset=_base_.train_dataloader.dataset.dataset)
    )
)
