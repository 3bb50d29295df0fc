# L_t of networks that never saw the image: tools/teacher_losses.py --folds configs/vanilla/digits_student_fold.py ...
_base_ = '../wsl_digits.py'

model = dict(
    distiller=dict(
        distill_losses=dict(
            loss_wsl=dict(weighting=dict(type='mmwsl.WSLWeighting', teacher_losses='work_dirs/out_of_fold_digits.npz'))
        )
    )
)
