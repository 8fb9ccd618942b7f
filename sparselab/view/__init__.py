"""Figures: pure functions from a run or a mask history to a plotly figure."""
from importlib.util import find_spec

if find_spec("plotly") is None:
    raise ImportError("sparselab.view draws with plotly, which is not installed: pip install 'sparselab[lab]'")
