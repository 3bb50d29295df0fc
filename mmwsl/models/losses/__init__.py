from mmwsl.models.losses.wsl_loss import WSLLoss

__all__ = ['WSLLoss']
