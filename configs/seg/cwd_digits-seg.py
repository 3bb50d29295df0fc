# Channel-wise distillation (arXiv 2011.13256): MMRazor's loss, of logits before they are resized, as in its own config.
# Its authors use temperature 1 and weight 5.
_base_ = ['wsl_digits-seg.py']

model = dict(
    distiller=dict(
        resolution='logits',
        distill_losses=dict(
            _delete_=True, loss_cwd=dict(type='mmrazor.ChannelWiseDivergence', tau=1.0, loss_weight=5.0)
        ),
    )
)
