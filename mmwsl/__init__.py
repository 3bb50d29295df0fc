"""Knowledge distillation with weighted soft labels for OpenMMLab."""
from mmwsl.compat import ready_the_stack
from mmwsl.version import __version__

__all__ = ['__version__']

ready_the_stack()
