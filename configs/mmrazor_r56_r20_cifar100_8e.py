# MMRazor's own distillation and loss: the mathematics of wsl_r56_r20_cifar100_8e_eval.py
_base_ = [
    '_base_/models/resnet56_cifar.py',
    '_base_/models/resnet20_cifar.py',
    '_base_/datasets/cifar100_bs128.py',
    '_base_/schedules/cifar_8e.py',
    '_base_/default_runtime.py',
]

model = dict(
    type='mmrazor.SingleTeacherDistill',
    architecture=_base_.resnet20,
    teacher=_base_.resnet56,
    teacher_ckpt='checkpoints/resnet56_cifar100.pth',
    distiller=dict(
        type='mmrazor.ConfigurableDistiller',
        student_recorders=dict(
            fc=dict(type='mmrazor.ModuleOutputs', source='head.fc'),
            targets=dict(type='mmrazor.ModuleInputs', source='head.loss_module'),
        ),
        teacher_recorders=dict(fc=dict(type='mmrazor.ModuleOutputs', source='head.fc')),
        distill_losses=dict(loss_wsld=dict(type='mmrazor.WSLD', tau=4.0, loss_weight=2.25, num_classes=100)),
        loss_forward_mappings=dict(
            loss_wsld=dict(
                student=dict(recorder='fc', from_student=True),
                teacher=dict(recorder='fc', from_student=False),
                gt_labels=dict(recorder='targets', from_student=True, data_idx=1),
            )
        ),
    ),
)

custom_hooks = [*_base_.custom_hooks, dict(type='mmwsl.ChannelsLastHook')]
