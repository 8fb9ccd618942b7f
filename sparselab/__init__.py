"""Sparse neural networks that come with a proof.

`import sparselab` costs next to nothing: a public name is imported from its module when it is first used.
"""
__version__ = "0.1.0"

_WINGS = ("sparse", "robust", "learn", "view")
_HOME = {  # public name -> the module that defines it
    "Masks": "sparse.masks",
    "Sparsifier": "sparse.sparsifier",
    "sparsify": "sparse.sparsify",
    "bounds": "robust.bounds",
    "verify": "robust.verify",
    "Config": "learn.config",
    "train": "learn.train",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    from importlib import import_module

    if name in _WINGS:
        return import_module(f"{__name__}.{name}")
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from difflib import get_close_matches

    names = [*_HOME, *_WINGS]
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}."
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; {hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_WINGS})
