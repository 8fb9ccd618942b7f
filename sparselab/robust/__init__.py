"""Bounds, attacks, neuron stability and verification of any network that can be read."""
from typing import TYPE_CHECKING

from .._surface import lazy

_HOME = {  # public name -> the module that defines it
    "Contradiction": "replay",
    "ENGINES": "engines",
    "LayerStability": "neurons",
    "METHODS": "engines",
    "UnsupportedLayer": "rules",
    "Verification": "verification",
    "bounds": "engines",
    "engine_table": "engines",
    "fgsm": "attacks",
    "input_box": "boxes",
    "margin_matrix": "boxes",
    "pgd": "attacks",
    "recorded_statistics": "ibp",
    "stability": "neurons",
    "verify": "verification",
    "worst_margin": "modes",
}
__all__ = [
    "Contradiction",
    "ENGINES",
    "LayerStability",
    "METHODS",
    "UnsupportedLayer",
    "Verification",
    "bounds",
    "engine_table",
    "fgsm",
    "input_box",
    "margin_matrix",
    "pgd",
    "recorded_statistics",
    "stability",
    "verify",
    "worst_margin",
]
__getattr__, __dir__ = lazy(__name__, _HOME)

if TYPE_CHECKING:
    from .attacks import fgsm, pgd
    from .boxes import input_box, margin_matrix
    from .engines import ENGINES, METHODS, bounds, engine_table
    from .ibp import recorded_statistics
    from .modes import worst_margin
    from .neurons import LayerStability, stability
    from .replay import Contradiction
    from .rules import UnsupportedLayer
    from .verification import Verification, verify
