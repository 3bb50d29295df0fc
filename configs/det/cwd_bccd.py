# MMRazor's channel-wise distillation (arXiv 2011.13256) of what the neck outputs, with the settings of its own configs.
_base_ = ['wsl_bccd.py']

# ChannelWiseDivergence calls `view`, which fails in channels_last
custom_hooks = [hook for hook in _base_.custom_hooks if hook['type'] != 'mmwsl.ChannelsLastHook']

_recorders = dict(fpn=dict(type='ModuleOutputs', source='neck'))

model = dict(
    distiller=dict(
        student_recorders=_recorders,
        teacher_recorders=_recorders,
        distill_losses=dict(
            _delete_=True,
            **{f'loss_cwd{i}': dict(type='mmrazor.ChannelWiseDivergence', tau=1.0, loss_weight=10.0) for i in range(3)},
        ),
        loss_forward_mappings={
            f'loss_cwd{i}': dict(
                preds_S=dict(recorder='fpn', from_student=True, data_idx=i),
                preds_T=dict(recorder='fpn', from_student=False, data_idx=i),
            )
            for i in range(3)
        },
    )
)
del _recorders
