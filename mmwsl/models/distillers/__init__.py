"""Which output of student and teacher goes to which loss."""

from mmwsl.models.distillers.wsl_distiller import WSLDistiller

__all__ = ['WSLDistiller']
