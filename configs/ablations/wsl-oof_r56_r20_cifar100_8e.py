# L_t of networks that never saw the image: tools/teacher_losses.py --folds configs/vanilla/r20_cifar100_15e_fold.py ...
_base_ = '../wsl_r56_r20_cifar100_8e.py'

model = dict(
    distiller=dict(
        distill_losses=dict(
            loss_wsl=dict(
                weighting=dict(type='mmwsl.WSLWeighting', teacher_losses='work_dirs/out_of_fold_r20_cifar100.npz')
            )
        )
    )
)
