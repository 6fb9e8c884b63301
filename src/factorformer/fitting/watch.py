"""What the layers of a block read, and what their outputs are added to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Reached(Exception):
    """A forward pass has come as far as it was to."""


@dataclasses.dataclass
class Stage:
    """Layers of a block that read one tensor.

    Args:
        names: of the layers.
        residual: whether the output, of the one layer there is then, is added to something.
        inputs, residuals: what the dense block has there, by batch and without padding.
    """

    names: list[str]
    residual: bool = False
    inputs: list[Tensor] = dataclasses.field(default_factory=list)
    residuals: list[Tensor] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        """One of the layers."""
        return self.names[0]


ADDITIONS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
"""How the output of a layer meets the residual stream."""


class Watch(TorchFunctionMode):
    """What layers read, and what their outputs are added to.

    Args:
        layers: names by layer.
        until: what of a layer the forward pass is to come to, and no further; to its end if None.
    """

    def __init__(self, layers: Mapping[nn.Module, str], until: Literal["read", "added"] | None = None) -> None:
        super().__init__()
        self.layers, self.until = layers, until
        self.read: dict[str, list[Tensor]] = {}
        self.added: dict[str, Tensor] = {}
        self._outputs: list[tuple[str, Tensor, int]] = []
        self._called: dict[str, int] = {}
        self._made = 0  # functions that were called so far; tensors bear the number of the one that made them
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        for layer, name in self.layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._before(name)))
            self._handles.append(layer.register_forward_hook(self._after(name)))
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        for handle in self._handles:
            handle.remove()
        self._outputs.clear()

    def _before(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.read.setdefault(name, []).append(args[0])
            self._called[name] = self._made
            if self.until == "read":
                raise Reached

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        return lambda _, __, output: self._outputs.append((name, output, self._called[name]))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ADDITIONS and len(args) == 2 and not kwargs and all(isinstance(value, Tensor) for value in args):
            for output, other in (args, args[::-1]):
                name, called = next(((n, when) for n, known, when in self._outputs if known is output), (None, 0))
                # What was made after the layer was called may be made of its output, as in some activations.
                before = getattr(other, "_made", 0) <= called
                if name is not None and before and other.shape == output.shape and name not in self.added:
                    self.added[name] = other.clone() if func in (Tensor.add_, Tensor.__iadd__) else other
                    if self.until == "added":
                        raise Reached
        result = func(*args, **(kwargs or {}))
        self._made += 1
        in_place = getattr(func, "__name__", "").endswith("_")
        for value in result if isinstance(result, (tuple, list)) else [result]:
            # Some functions return what they were given, such as dropout that is switched off.
            if isinstance(value, Tensor) and (in_place or not any(value is given for given in args)):
                value._made = self._made  # pyright: ignore[reportAttributeAccessIssue]
        return result

    def stages(self, hidden: Tensor) -> list[Stage]:
        """Layers that read one tensor, of those that are called once, for every token of the hidden states."""
        stages: list[Stage] = []
        last: Tensor | None = None
        for name, calls in self.read.items():
            if len(calls) > 1 or calls[0].shape[:-1] != hidden.shape[:-1]:
                continue
            if calls[0] is last:
                stages[-1].names.append(name)
            else:
                stages.append(Stage([name]))
            last = calls[0]
        for stage in stages:
            stage.residual = len(stage.names) == 1 and stage.name in self.added
        return stages
