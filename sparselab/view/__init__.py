"""Figures: pure functions from a run or a mask history to a plotly figure, and the explorer made of them."""
from importlib import import_module
from importlib.util import find_spec

if find_spec("plotly") is None:
    raise ImportError("sparselab.view draws with plotly, which is not installed: pip install 'sparselab[lab]'")

_HOME = {"Explorer": "explorer", "Live": "live"}  # public name -> its module, imported when it is first used
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
