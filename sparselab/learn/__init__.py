"""Data, models, objectives, training, and runs on disk."""
from typing import TYPE_CHECKING

from .._surface import lazy

_HOME = {  # public name -> the module that defines it
    "ALL_METHODS": "experiments",
    "CORRUPTIONS": "corruptions",
    "Callback": "learner",
    "Claim": "claims",
    "Comparison": "claims",
    "Config": "config",
    "DATASETS": "known",
    "Data": "data",
    "Deck": "decks",
    "ENCODERS": "text",
    "Given": "reading",
    "Learner": "learner",
    "Live": "live",
    "MODELS": "models",
    "OBJECTIVES": "objectives",
    "Run": "runs",
    "Source": "reading",
    "TEXTS": "text",
    "TextTraining": "text_tickets",
    "Track": "trackers",
    "TrainingStopped": "learner",
    "Unrolled": "unrolled",
    "as_floats": "data",
    "as_texts": "text",
    "build": "models",
    "certify": "certifying",
    "corrupt": "corruptions",
    "corruption_accuracy": "corruptions",
    "evaluate": "evaluation",
    "examples": "runs",
    "family": "experiments",
    "fine_tuned": "text_tickets",
    "growth_scores": "growth",
    "learn_gates": "text_tickets",
    "lightning_callback": "loops",
    "load": "data",
    "make_optimizer": "optimizers",
    "margins_of": "margins",
    "objective": "objectives",
    "own_data": "samples",
    "own_model": "factories",
    "read_parameters": "parameters",
    "resources": "footprint",
    "robust_accuracy": "text_attacks",
    "runs_in": "runs",
    "sentences": "text",
    "spelling_accuracy": "text_attacks",
    "text_model": "text",
    "to_float": "data",
    "train": "experiments",
    "trainer_callback": "loops",
}
__all__ = [
    "ALL_METHODS",
    "CORRUPTIONS",
    "Callback",
    "Claim",
    "Comparison",
    "Config",
    "DATASETS",
    "Data",
    "Deck",
    "ENCODERS",
    "Given",
    "Learner",
    "Live",
    "MODELS",
    "OBJECTIVES",
    "Run",
    "Source",
    "TEXTS",
    "TextTraining",
    "Track",
    "TrainingStopped",
    "Unrolled",
    "as_floats",
    "as_texts",
    "build",
    "certify",
    "corrupt",
    "corruption_accuracy",
    "evaluate",
    "examples",
    "family",
    "fine_tuned",
    "growth_scores",
    "learn_gates",
    "lightning_callback",
    "load",
    "make_optimizer",
    "margins_of",
    "objective",
    "own_data",
    "own_model",
    "read_parameters",
    "resources",
    "robust_accuracy",
    "runs_in",
    "sentences",
    "spelling_accuracy",
    "text_model",
    "to_float",
    "train",
    "trainer_callback",
]
__getattr__, __dir__ = lazy(__name__, _HOME)

if TYPE_CHECKING:
    from .certifying import certify
    from .claims import Claim, Comparison
    from .config import Config
    from .corruptions import CORRUPTIONS, corrupt, corruption_accuracy
    from .data import Data, as_floats, load, to_float
    from .decks import Deck
    from .evaluation import evaluate
    from .experiments import ALL_METHODS, family, train
    from .factories import own_model
    from .footprint import resources
    from .growth import growth_scores
    from .known import DATASETS
    from .learner import Callback, Learner, TrainingStopped
    from .live import Live
    from .loops import lightning_callback, trainer_callback
    from .margins import margins_of
    from .models import MODELS, build
    from .objectives import OBJECTIVES, objective
    from .optimizers import make_optimizer
    from .parameters import read_parameters
    from .reading import Given, Source
    from .runs import Run, examples, runs_in
    from .samples import own_data
    from .text import ENCODERS, TEXTS, as_texts, sentences, text_model
    from .text_attacks import robust_accuracy, spelling_accuracy
    from .text_tickets import TextTraining, fine_tuned, learn_gates
    from .trackers import Track
    from .unrolled import Unrolled
