"""Annotations that name no shape are checked by beartype alone, at a twelfth of the time that jaxtyping adds."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping

_with_shapes = jaxtyping.jaxtyped


def install() -> None:
    """Let the import hook of jaxtyping decorate by what is here; `jaxtyping_disable` switches both checks off."""
    jaxtyping.jaxtyped = _jaxtyped


def _jaxtyped(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    def decorate(found: Any) -> Any:
        if inspect.isfunction(found):
            return _checked(found, typechecker)
        simple = dataclasses.is_dataclass(found) and "__init__" in vars(found)
        if simple and all(field.default_factory is dataclasses.MISSING for field in dataclasses.fields(found)):
            found.__init__ = _checked(found.__init__, typechecker)
            return found
        return _with_shapes(found, typechecker=typechecker)

    return decorate


def _checked(function: Any, typechecker: Callable[..., Any]) -> Any:
    hints = {name: _resolved(annotation, function) for name, annotation in function.__annotations__.items()}
    if inspect.isgeneratorfunction(function) or "jaxtyping." in repr(list(hints.values())):
        return _with_shapes(function, typechecker=typechecker)
    twin = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    twin.__kwdefaults__, twin.__annotations__ = function.__kwdefaults__, hints
    twin.__module__, twin.__qualname__ = function.__module__, function.__qualname__
    strict = typechecker(twin)

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return (function if jaxtyping.config.jaxtyping_disable else strict)(*args, **kwargs)

    return either


def _resolved(annotation: Any, function: Any) -> Any:
    """As jaxtyping does it: one by one, and anything goes where a name is not known."""

    def holder(value): ...

    holder.__annotations__ = {"value": annotation}
    try:
        return typing.get_type_hints(holder, function.__globals__, include_extras=True)["value"]
    except Exception:
        return Any
