"""The algorithm that trains a student with one or several frozen teachers."""

from mmwsl.models.algorithms.wsl_distill import WSLDistill

__all__ = ['WSLDistill']
