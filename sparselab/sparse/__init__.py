"""Masks, layer distributions, and the methods that train sparse networks."""
from typing import TYPE_CHECKING

from .._surface import lazy

_HOME = {  # public name -> the module that defines it
    "Cursor": "cursor",
    "DISTRIBUTIONS": "distributions",
    "METHODS": "sparsify",
    "METHOD_FAMILIES": "sparsifier",
    "MaskHistory": "history",
    "Masks": "masks",
    "Score": "scores",
    "Sparsifier": "sparsifier",
    "budget": "distributions",
    "by_head": "attention",
    "compact": "compaction",
    "effective": "paths",
    "exploration": "explored",
    "layer_budgets": "distributions",
    "mask_overlap": "overlap",
    "method_options": "sparsify",
    "projections": "attention",
    "prunable": "masks",
    "sparsify": "sparsify",
}
__all__ = [
    "Cursor",
    "DISTRIBUTIONS",
    "METHODS",
    "METHOD_FAMILIES",
    "MaskHistory",
    "Masks",
    "Score",
    "Sparsifier",
    "budget",
    "by_head",
    "compact",
    "effective",
    "exploration",
    "layer_budgets",
    "mask_overlap",
    "method_options",
    "projections",
    "prunable",
    "sparsify",
]
__getattr__, __dir__ = lazy(__name__, _HOME)

if TYPE_CHECKING:
    from .attention import by_head, projections
    from .compaction import compact
    from .cursor import Cursor
    from .distributions import DISTRIBUTIONS, budget, layer_budgets
    from .explored import exploration
    from .history import MaskHistory
    from .masks import Masks, prunable
    from .overlap import mask_overlap
    from .paths import effective
    from .scores import Score
    from .sparsifier import METHOD_FAMILIES, Sparsifier
    from .sparsify import METHODS, method_options, sparsify
