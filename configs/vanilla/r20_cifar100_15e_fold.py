# For an L_t out of fold: a network that never saw a fifth of the training images. tools/teacher_losses.py --folds
# combines the losses of five such networks, fold=0 to 4.
_base_ = 'r20_cifar100_8e.py'

train_dataloader = dict(
    dataset=dict(
        dataset=dict(_delete_=True, type='mmwsl.Fold', fold=0, folds=5, dataset=_base_.train_dataloader.dataset.dataset)
    )
)
train_cfg = dict(max_epochs=15)
_base_.param_scheduler[-1].T_max = 15
