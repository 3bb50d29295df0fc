"""A student that learns from one or several teachers."""

from mmwsl.models.algorithms.wsl_distill import WSLDistill

__all__ = ['WSLDistill']
