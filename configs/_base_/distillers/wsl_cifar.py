wsl = dict(
    type='mmwsl.WSLDistiller', distill_losses=dict(loss_wsl=dict(type='mmwsl.WSLLoss', tau=4.0, loss_weight=2.25))
)
