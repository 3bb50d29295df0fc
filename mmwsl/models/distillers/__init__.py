from mmwsl.models.distillers.wsl_distiller import WSLDistiller

__all__ = ['WSLDistiller']
