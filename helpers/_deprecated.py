"""Old names that go on working for one release, with a warning that says the new one."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take old keywords, too: `@renamed(old="new")`; `TypeError` for both."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in names.keys() & kwargs.keys():
                if (new := names[old]) in kwargs:
                    raise TypeError(f"{function.__name__}() got both {old} and {new}: drop {old}.")
                _warn(f"{function.__name__}({old}=…)", f"{new}=…")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapped

    return decorate


def old_names(module: str, **names: str) -> Callable[[str], Any]:
    """Return a module's `__getattr__`, as in `__getattr__ = old_names(__name__, old="new")`."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", f"{module}.{names[name]}")
        return getattr(sys.modules[module], names[name])

    return find


def _warn(old: str, new: str) -> None:
    text = f"{old} is now {new}; the old name will go with the next release."
    warnings.warn(text, DeprecationWarning, stacklevel=3)
