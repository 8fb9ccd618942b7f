"""Figures: functions from a run or a mask history to a panel, and the explorer made of them."""
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .._surface import lazy

if find_spec("plotly") is None:
    raise ImportError("sparselab.view draws with plotly, which is not installed: pip install 'sparselab[lab]'")

_HOME = {  # public name -> the module that defines it
    "Explorer": "explorer",
    "Live": "live",
}
__all__ = ["Explorer", "Live"]
__getattr__, __dir__ = lazy(__name__, _HOME)

if TYPE_CHECKING:
    from .explorer import Explorer
    from .live import Live
