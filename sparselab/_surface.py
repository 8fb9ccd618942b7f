"""The public names of a package, each imported from its module when it is first used."""
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType


class _Package(ModuleType):
    """A package in which a public name stays what it is when a module of the same name is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and name in self.__dict__["__all__"] and name not in self.__dict__["_also"]):
            super().__setattr__(name, value)


def lazy(package: str, home: Mapping[str, str], also: tuple[str, ...] = (), extra: str = "") -> tuple[Callable, Callable]:
    """`__getattr__` and `__dir__` of `package`, whose public names are the keys of `home`: name -> module that defines it.

    `also` are subpackages that are imported when they are first named; `extra` brings the packages that the modules need.
    """
    module = sys.modules[package]
    module._also = also
    module.__class__ = _Package

    def __getattr__(name: str) -> object:
        if name in also:
            return import_module(f"{package}.{name}")
        if name in home:
            try:
                value = getattr(import_module(f"{package}.{home[name]}"), name)
            except ModuleNotFoundError as error:
                if not extra or (error.name or "").startswith("sparselab"):
                    raise
                raise ModuleNotFoundError(f"{package}.{name} needs {error.name}, which is not installed: pip install 'sparselab[{extra}]'",
                                          name=error.name) from error
            setattr(module, name, value)
            return value
        if name.startswith("__"):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        names = [*home, *also]
        near = get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}."
        raise AttributeError(f"module {package!r} has no attribute {name!r}; {hint}")

    def __dir__() -> list[str]:
        return sorted({*vars(module), *home, *also})

    return __getattr__, __dir__
