"""Sparse neural networks that come with a proof.

`import sparselab` costs next to nothing: a public name is imported from its module when it is first used.
"""
from typing import TYPE_CHECKING

from ._surface import lazy

__version__ = "0.1.0"
__all__ = ["Config", "Masks", "Sparsifier", "__version__", "bounds", "certify", "sparsify", "train", "verify"]
__getattr__, __dir__ = lazy(__name__, {"Config": "learn", "Masks": "sparse", "Sparsifier": "sparse", "bounds": "robust",
                                       "certify": "learn", "sparsify": "sparse", "train": "learn", "verify": "robust"},
                            also=("sparse", "robust", "learn", "view", "scale"))

if TYPE_CHECKING:
    from . import learn as learn
    from . import robust as robust
    from . import scale as scale
    from . import sparse as sparse
    from . import view as view
    from .learn import Config, certify, train
    from .robust import bounds, verify
    from .sparse import Masks, Sparsifier, sparsify
