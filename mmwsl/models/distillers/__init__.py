"""Distillers: they pass the outputs of student and teacher to the losses."""

from mmwsl.models.distillers.wsl_distiller import WSLDistiller

__all__ = ['WSLDistiller']
