"""Knowledge distillation with weighted soft labels for OpenMMLab.

This module imports none of the stack, and :mod:`mmwsl.functional` needs torch alone. Importing :mod:`mmwsl.registry`,
or any module that uses it, makes mmpretrain and mmrazor importable and mmengine's checkpoints safe to load.
"""

from mmwsl.version import __version__

__all__ = ['__version__']
