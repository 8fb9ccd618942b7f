"""Bounds, attacks, neuron stability and verification of any network that can be read."""
from typing import TYPE_CHECKING

from .._surface import lazy

_HOME = {  # public name -> the module that defines it
    "Certificate": "certificates",
    "Contradiction": "replay",
    "ENGINES": "bounds",
    "Engine": "bounds",
    "Grafted": "grafting",
    "LEARNED": "bounds",
    "LayerStability": "neurons",
    "METHODS": "bounds",
    "Property": "properties",
    "UnsupportedLayer": "rules",
    "VERDICTS": "cascade",
    "Verdict": "cascade",
    "Verdicts": "cascade",
    "Verification": "verification",
    "bounds": "bounds",
    "certify": "certificates",
    "check_order": "verification",
    "crown_ibp": "crown",
    "decide": "cascade",
    "decide_instances": "properties",
    "decide_property": "properties",
    "engine_table": "bounds",
    "eval_mode": "modes",
    "fgsm": "attacks",
    "from_onnx": "onnx_files",
    "full_precision": "modes",
    "fused_upper": "crown",
    "graft": "grafting",
    "grafted_like": "grafting",
    "input_box": "boxes",
    "interval_pass": "ibp",
    "margin_matrix": "boxes",
    "opinion": "opinions",
    "pgd": "attacks",
    "read_instances": "properties",
    "read_vnnlib": "properties",
    "recorded_statistics": "ibp",
    "robustness": "properties",
    "sites": "grafting",
    "stability": "neurons",
    "survivors": "attacks",
    "verify": "verification",
    "worst_margin": "modes",
    "write_vnnlib": "properties",
    "written_out": "grafting",
}
__all__ = [
    "Certificate",
    "Contradiction",
    "ENGINES",
    "Engine",
    "Grafted",
    "LEARNED",
    "LayerStability",
    "METHODS",
    "Property",
    "UnsupportedLayer",
    "VERDICTS",
    "Verdict",
    "Verdicts",
    "Verification",
    "bounds",
    "certify",
    "check_order",
    "crown_ibp",
    "decide",
    "decide_instances",
    "decide_property",
    "engine_table",
    "eval_mode",
    "fgsm",
    "from_onnx",
    "full_precision",
    "fused_upper",
    "graft",
    "grafted_like",
    "input_box",
    "interval_pass",
    "margin_matrix",
    "opinion",
    "pgd",
    "read_instances",
    "read_vnnlib",
    "recorded_statistics",
    "robustness",
    "sites",
    "stability",
    "survivors",
    "verify",
    "worst_margin",
    "write_vnnlib",
    "written_out",
]
__getattr__, __dir__ = lazy(__name__, _HOME)

if TYPE_CHECKING:
    from .attacks import fgsm, pgd, survivors
    from .boxes import input_box, margin_matrix
    from .certificates import Certificate, certify
    from .crown import crown_ibp, fused_upper
    from .bounds import ENGINES, LEARNED, METHODS, Engine, bounds, engine_table
    from .cascade import VERDICTS, Verdict, Verdicts, decide
    from .grafting import Grafted, graft, grafted_like, sites, written_out
    from .ibp import interval_pass, recorded_statistics
    from .modes import eval_mode, full_precision, worst_margin
    from .neurons import LayerStability, stability
    from .onnx_files import from_onnx
    from .properties import Property, decide_instances, decide_property, read_instances, read_vnnlib, robustness, write_vnnlib
    from .opinions import opinion
    from .replay import Contradiction
    from .rules import UnsupportedLayer
    from .verification import Verification, check_order, verify
