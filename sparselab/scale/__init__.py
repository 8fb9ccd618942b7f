"""Many runs: sweeps over grids, on one machine or a cluster, and the search for fronts; and one training on several processes."""
from typing import TYPE_CHECKING

from .._surface import lazy

_HOME = {  # public name -> the module that defines it
    "Estimate": "estimates",
    "Executor": "executors",
    "Job": "execution",
    "Local": "executors",
    "Outcome": "execution",
    "ParallelLearner": "ranks",
    "Point": "grids",
    "Ray": "on_ray",
    "Slurm": "on_slurm",
    "Sweep": "sweeps",
    "estimate": "estimates",
    "execute": "execution",
    "execute_all": "sweeps",
    "expand": "grids",
    "front": "fronts",
    "read_sweep": "grids",
    "search": "fronts",
    "sweep": "sweeps",
    "train_parallel": "ranks",
}
__all__ = [
    "Estimate",
    "Executor",
    "Job",
    "Local",
    "Outcome",
    "ParallelLearner",
    "Point",
    "Ray",
    "Slurm",
    "Sweep",
    "estimate",
    "execute",
    "execute_all",
    "expand",
    "front",
    "read_sweep",
    "search",
    "sweep",
    "train_parallel",
]
__getattr__, __dir__ = lazy(__name__, _HOME)

if TYPE_CHECKING:
    from .estimates import Estimate, estimate
    from .execution import Job, Outcome, execute
    from .executors import Executor, Local
    from .fronts import front, search
    from .grids import Point, expand, read_sweep
    from .on_ray import Ray
    from .on_slurm import Slurm
    from .ranks import ParallelLearner, train_parallel
    from .sweeps import Sweep, execute_all, sweep
