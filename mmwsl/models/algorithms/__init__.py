from mmwsl.models.algorithms.wsl_distill import WSLDistill

__all__ = ['WSLDistill']
