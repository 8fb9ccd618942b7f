"""Figures: functions f(source, step) from a training to a panel, figures of many runs, and the explorer made of them."""
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .._surface import lazy

if find_spec("plotly") is None:
    raise ImportError("sparselab.view draws with plotly, which is not installed: pip install 'sparselab[lab]'")

_HOME = {  # public name -> the module that defines it
    "Explorer": "explorer.explorer",
    "PANELS": "figures.report",
    "Panel": "figures.panels",
    "Report": "figures.report",
    "RunBrowser": "explorer.browser",
    "RunPicker": "explorer.browser",
    "accuracy_bars": "runs.results",
    "accuracy_by_flops": "runs.trade_offs",
    "accuracy_by_sparsity": "runs.trade_offs",
    "difference_panel": "figures.masks",
    "effective_sparsity": "runs.networks",
    "explorer_html": "explorer.page",
    "filters_panel": "figures.neurons",
    "layer_densities": "runs.networks",
    "layers_panel": "figures.masks",
    "left_out": "runs.table",
    "margins_panel": "figures.margins",
    "mask_panel": "figures.masks",
    "masks_panel": "figures.masks",
    "matrices": "figures.evidence",
    "metrics_panel": "figures.metrics",
    "neuron_panel": "figures.neurons",
    "neurons_panel": "figures.neurons",
    "ordered": "runs.table",
    "overlap_by_method": "runs.networks",
    "results_table": "runs.results",
    "run_csv": "runs.table",
    "run_rows": "runs.table",
    "run_table": "runs.table",
    "save_html": "explorer.page",
    "seed_dots": "figures.evidence",
    "selected": "runs.table",
    "show": "figures.panels",
    "stability_by_method": "runs.networks",
    "stability_panel": "figures.neurons",
    "table_of": "runs.table",
    "titled": "figures.theme",
    "trade_off": "runs.trade_offs",
    "updates_panel": "figures.updates",
}
__all__ = [
    "Explorer",
    "PANELS",
    "Panel",
    "Report",
    "RunBrowser",
    "RunPicker",
    "accuracy_bars",
    "accuracy_by_flops",
    "accuracy_by_sparsity",
    "difference_panel",
    "effective_sparsity",
    "explorer_html",
    "filters_panel",
    "layer_densities",
    "layers_panel",
    "left_out",
    "margins_panel",
    "mask_panel",
    "masks_panel",
    "matrices",
    "metrics_panel",
    "neuron_panel",
    "neurons_panel",
    "ordered",
    "overlap_by_method",
    "results_table",
    "run_csv",
    "run_rows",
    "run_table",
    "save_html",
    "seed_dots",
    "selected",
    "show",
    "stability_by_method",
    "stability_panel",
    "table_of",
    "titled",
    "trade_off",
    "updates_panel",
]
__getattr__, __dir__ = lazy(__name__, _HOME, extra="lab")

if TYPE_CHECKING:
    from .explorer.browser import RunBrowser, RunPicker
    from .explorer.explorer import Explorer
    from .explorer.page import explorer_html, save_html
    from .figures.evidence import matrices, seed_dots
    from .figures.margins import margins_panel
    from .figures.masks import difference_panel, layers_panel, mask_panel, masks_panel
    from .figures.metrics import metrics_panel
    from .figures.neurons import filters_panel, neuron_panel, neurons_panel, stability_panel
    from .figures.panels import Panel, show
    from .figures.report import PANELS, Report
    from .figures.theme import titled
    from .figures.updates import updates_panel
    from .runs.networks import effective_sparsity, layer_densities, overlap_by_method, stability_by_method
    from .runs.results import accuracy_bars, results_table
    from .runs.table import left_out, ordered, run_csv, run_rows, run_table, selected, table_of
    from .runs.trade_offs import accuracy_by_flops, accuracy_by_sparsity, trade_off
