"""Weights that a forward pass, or the initialization, of a weightless copy of a model reads outside of their layers."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from factorformer.layers._compat import (
    TorchDispatchMode,
    drop_hooks,
    initialize,
    is_grouped_product,
    place_of,
    tree_leaves,
)
from factorformer.layers.dummies import dummy_inputs
from factorformer.layers.modes import quiet

ROUNDS = 8
"""Trials with weights in int8, each without the layers that the ones before found."""


class _Watch(TorchDispatchMode):
    """Sees every operation of a trial: those on a watched weight, and those that make int8 of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, str] = {}
        self.used: set[str] = set()
        self.cast: set[str] = set()
        self.reached: set[str] = set()
        self.last: str | None = None

    def blame(self) -> None:
        """The layer whose weight was read last."""
        if self.last is not None:
            self.cast.add(self.last)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        storages = {place_of(tensor) for tensor in tensors}
        names = {self.storages[storage] for storage in storages & self.storages.keys()}
        if func is not torch.ops.aten.detach.default:
            self.used |= names
        if is_grouped_product(func):  # of experts, whose repeated numbers it would not take
            return args[0].new_zeros(len(args[0]), args[1].shape[-1])
        result = func(*args, **(kwargs or {}))
        if not names and isinstance(result, Tensor) and result.dtype == torch.int8:
            if tensors and tensors[0].is_floating_point() and tensors[0].shape == result.shape:
                self.blame()
                return tensors[0].clone()  # so that the trial goes on as the dense model would
            if all(t.dtype != torch.int8 for t in tensors):
                self.blame()
        return result


@functools.cache
def _watched(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass that says when its weight is read, and makes up what comes out."""

    def read(self: nn.Module, name: str) -> Any:
        if name == "weight":
            watch, path, _ = self.__dict__["_watch"]
            watch.last = path
        return cls.__getattr__(self, name)

    def forward(self: nn.Module, x: Tensor, *_: Any, **__: Any) -> Tensor:
        watch, path, output = self.__dict__["_watch"]
        watch.reached.add(path)
        if issubclass(cls, nn.Embedding):
            return output.expand(*x.shape, -1).clone()
        return output.to(x.dtype if x.is_floating_point() else output.dtype).expand(*x.shape[:-1], -1).clone()

    return type(cls.__name__, (cls,), {"__getattr__": read, "forward": forward})


def found_in_trials(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    *,
    int8: bool,
    batch: Mapping[str, Any] | None,
    known: set[str] | None = None,
    unreached: set[str] | None = None,
) -> set[str]:
    """Layers that a trial finds used or, in int8, cast to; with those of `unreached` that no trial reached."""
    found: set[str] = set()
    codes: set[str] = set()
    for _ in range(ROUNDS if int8 else 1):
        codes = set(layers) - found - (known or set()) if int8 else set()
        watch = _trial(model, layers, codes, batch)
        if watch is None:
            return found | (unreached or set())
        new = (watch.cast if int8 else watch.used) - found
        found |= new
        if not int8 or not new:
            return found | ((unreached or set()) - watch.reached)
    return found | codes


def _trial(
    model: nn.Module, layers: Mapping[str, nn.Module], codes: set[str], batch: Mapping[str, Any] | None
) -> _Watch | None:
    """Run a copy of the model, and those models inside of it that it did not reach; None where it cannot be copied."""
    with torch.device("cpu"):  # a model that is being loaded is made on another one
        return _watched_run(model, layers, codes, batch)


def _watched_run(
    model: nn.Module, layers: Mapping[str, nn.Module], codes: set[str], batch: Mapping[str, Any] | None
) -> _Watch | None:
    try:
        twin = _without_memory(model)
    except Exception:  # whatever the modules of an unknown architecture hold
        return None
    watch = _Watch()
    for name, layer in layers.items():
        copied = twin.get_submodule(name)
        _observe(copied, layer, name, watch, name in codes)
    inner = [(n, m) for n, m in twin.named_modules() if n and isinstance(m, transformers.PreTrainedModel)]
    with quiet(), watch:
        _run(twin, watch, itertools.chain([batch] if batch else [], dummy_inputs(model)), bool(codes))
        for name, part in inner:
            if not any(path.startswith(f"{name}.") for path in watch.reached):
                _run(part, watch, dummy_inputs(part), bool(codes))
    return watch


def found_in_initialization(model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """Layers whose weight, if it has another shape, makes the initialization of the module that holds them fail."""
    try:
        twin = _without_memory(model).to("meta")
    except Exception:  # as in a trial
        return set()
    watch, copies = _Watch(), {name: twin.get_submodule(name) for name in layers}
    parts = [part for part in twin.modules() if isinstance(part, transformers.PreTrainedModel)]
    found: set[str] = set()

    def works(part: transformers.PreTrainedModel, module: nn.Module) -> bool:
        watch.last = None
        try:
            initialize(part, module)
        except Exception:  # initialization of many architectures
            return False
        return True

    with quiet():
        own = {id(layer) for layer in copies.values()}
        able = [(part, m) for part in parts for m in part.modules() if id(m) not in own and works(part, m)]
        whole = {name: layer.get_parameter("weight") for name, layer in copies.items()}
        for name, layer in copies.items():
            _observe(layer, layers[name], name, watch, False)
            layer.weight = nn.Parameter(whole[name][:, :1], requires_grad=False)
        for part, module in able:
            while not works(part, module) and (name := watch.last) is not None and name not in found:
                found.add(name)
                copies[name].weight = whole[name]
    return found


def _observe(layer: nn.Module, original: nn.Module, name: str, watch: _Watch, as_codes: bool) -> None:
    weight = layer.get_parameter("weight")
    turned = weight.shape[0] if isinstance(original, nn.Linear) else weight.shape[-1]
    output = torch.linspace(-1, 1, turned, dtype=weight.dtype)
    if as_codes:
        del layer.weight
        layer.register_buffer("weight", torch.zeros(1, dtype=torch.int8).expand(weight.shape))
        weight = layer.get_buffer("weight")
    watch.storages[place_of(weight)] = name
    layer.__dict__["_watch"] = (watch, name, output)
    layer.__class__ = _watched(type(layer))


def _run(module: nn.Module, watch: _Watch, batches: Iterable[Mapping[str, Any]], int8: bool) -> None:
    """The first of the batches that the module takes; what it used of the others before it failed counts as well."""
    for batch in itertools.islice(batches, 12):
        watch.last = None
        try:
            module(**{key: _copied(value) for key, value in batch.items()})
        except TypeError:
            if int8 and watch.last is not None:  # `torch.finfo` of int8
                watch.blame()
            continue
        except Exception:  # an input of another kind than the model takes: the next one may fit
            continue
        return


def _copied(value: Any) -> Any:
    return value[:2].clone() if isinstance(value, Tensor) and value.dim() else value


def _without_memory(model: nn.Module) -> nn.Module:
    """A copy on the CPU all of whose parameters are one number, repeated without taking memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        value = torch.full((), 0.02 if parameter.is_floating_point() else 0, dtype=parameter.dtype)
        memo[id(parameter)] = nn.Parameter(value.expand(parameter.shape), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer.detach().cpu().clone()
    twin = copy.deepcopy(model, memo).eval()
    for module in twin.modules():  # hooks are for the model itself
        drop_hooks(module)
    return twin
