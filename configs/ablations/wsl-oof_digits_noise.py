# L_t of networks that never saw the image, and learned from the same wrong labels.
_base_ = '../wsl_digits_noise.py'

model = dict(
    distiller=dict(
        distill_losses=dict(
            loss_wsl=dict(
                weighting=dict(type='mmwsl.WSLWeighting', teacher_losses='work_dirs/out_of_fold_digits_noise.npz')
            )
        )
    )
)
