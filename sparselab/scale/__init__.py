"""From one run to many, and from one process to several."""
from typing import TYPE_CHECKING

from .._surface import lazy

_HOME = {  # public name -> the module that defines it
    "ParallelLearner": "ranks",
    "train_parallel": "ranks",
}
__all__ = [
    "ParallelLearner",
    "train_parallel",
]
__getattr__, __dir__ = lazy(__name__, _HOME)

if TYPE_CHECKING:
    from .ranks import ParallelLearner, train_parallel
