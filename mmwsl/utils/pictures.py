"""Draw pictures with matplotlib, an extra."""

from typing import Any

from mmwsl.compat import from_extra


def pyplot() -> Any:
    """Return matplotlib's pyplot, set to draw into files.

    Raises:
        ImportError: If matplotlib is not installed; the message names the extra.
    """
    with from_extra('demo'):
        import matplotlib

        matplotlib.use('Agg')
        from matplotlib import pyplot
    return pyplot
