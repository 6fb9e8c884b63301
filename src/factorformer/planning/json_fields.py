"""Fields of dataclasses from JSON, checked against their annotations."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from factorformer.errors import MethodError, one_of


def read_fields(kind: type, content: Mapping[str, Any], where: str, **other_types: Any) -> dict[str, Any]:
    """Arguments of a dataclass from JSON.

    Args:
        kind: the dataclass, whose annotations say what is allowed.
        content: by name of the field.
        where: begins messages.
        other_types: of fields that look different in JSON; None for those that are not there.

    Raises:
        MethodError: a field is missing, or of another type.
    """
    found: dict[str, Any] = {}
    for name, hint in {**get_type_hints(kind), **other_types}.items():
        if hint is None:
            continue
        if name not in content:
            raise MethodError(f"{where} is malformed: it has no '{name}'")
        value = content[name]
        if not _is(value, hint):
            allowed = [choice for choice in get_args(hint) if isinstance(choice, str)]
            unknown = f"unknown {name} {one_of(str(value), allowed)}" if allowed else f"'{name}' cannot be {value!r}"
            raise MethodError(f"{where} is malformed: {unknown}")
        found[name] = tuple(value) if isinstance(value, list) else value
    return found


def _is(value: object, hint: Any) -> bool:
    """Whether a value of JSON is of an annotated type; lists stand for tuples, and whole numbers are numbers too."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in parts
    if origin in (Union, UnionType):
        return any(_is(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        kinds = [parts[0]] * len(value) if Ellipsis in parts else parts
        return len(value) == len(kinds) and all(map(_is, value, kinds))
    if hint is list:
        return isinstance(value, (list, tuple))
    return type(value) in ((int, float) if hint is float else (hint,))
