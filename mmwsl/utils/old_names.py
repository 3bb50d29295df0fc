"""Old names of public objects, which keep working for one release and warn."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

from mmengine.registry import Registry


def renamed(module: str, **names: str) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that finds objects under their old names and warns.

    Args:
        module: Name of the module, as in ``sys.modules``.
        names: New name of each object, by its old name.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f'module {module!r} has no attribute {name!r}')
        warn_of_old_name(f'{module}.{name}', f'{module}.{names[name]}')
        return getattr(sys.modules[module], names[name])

    return find


def keep_registered(registry: Registry, old: str, new: Callable[..., Any]) -> None:
    """Let configs name a registered class or function by its old name, with a warning when it is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        warn_of_old_name(f'{registry.scope}.{old}', f'{registry.scope}.{new.__name__}')
        return new(*args, **kwargs)

    registry.register_module(name=old, module=call)


def warn_of_old_name(old: str, new: str) -> None:
    """Warn that an object has another name now."""
    warnings.warn(f'{old} is now called {new}; the old name ends with 0.3', FutureWarning, stacklevel=3)
