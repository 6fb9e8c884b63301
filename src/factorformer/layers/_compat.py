"""Everything that layers and trainings use of torch's modules and tensors and that torch does not document.

What kernels use of it is in `factorformer.kernels._compat`, what is transformers' in `factorformer.hf.compat`.
`tests/hf/test_compat.py` asserts that all of it is there.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves

Model = TypeVar("Model", bound=nn.Module)

IGNORED = "_ddp_params_and_buffers_to_ignore"
"""Where `DistributedDataParallel` looks, in a model, for names that it is to leave alone."""


def place_of(tensor: Tensor) -> int:
    """Which memory a tensor is a view of, or stands for: the same number for the same.

    Relies on `UntypedStorage._cdata`, which storages without memory have as well.
    """
    return tensor.untyped_storage()._cdata


def is_grouped_product(operator: Any) -> bool:
    """Whether an operator multiplies by the matrices of several experts in one call: `aten::_grouped_mm`."""
    return operator is torch.ops.aten._grouped_mm.default


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks have a part in the calls of a module.

    Relies on `_forward_hooks` and `_forward_pre_hooks`: torch/nn/modules/module.py.
    """
    return bool(module._forward_hooks or module._forward_pre_hooks)


def placement_of(module: nn.Module) -> Any | None:
    """What of accelerate brings inputs to the device of a module's weights, as `device_map` asks for.

    None where that is not all that has a part in its calls, or where the weights are offloaded. Relies on `_hf_hook`,
    `_old_forward` and the fields of `AlignDevicesHook`: accelerate/hooks.py.
    """
    hook = vars(module).get("_hf_hook")
    own = getattr(vars(module).get("_old_forward"), "__func__", None) is type(module).forward
    if hook is None or type(hook).__name__ != "AlignDevicesHook" or hook.offload or not own or is_hooked(module):
        return None
    return hook


def place_like(module: nn.Module, other: nn.Module) -> None:
    """Let accelerate bring inputs to a module that takes the place of another one, if it did so for that."""
    placement = placement_of(other)
    if placement is not None:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        # A new one: that of the other holds on to its weights, where these are tied.
        known = {name: getattr(placement, name) for name in ("execution_device", "io_same_device", "skip_keys")}
        add_hook_to_module(module, AlignDevicesHook(**known))


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the weights of a module into memory for each call alone; see `placement_of`."""
    return "_hf_hook" in vars(module) and any(parameter.is_meta for parameter in module.parameters(recurse=False))


def undivided(model: Model) -> Model:
    """A deep copy that can be moved to one device: accelerate has no part in it."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        _release(module)
    return twin


def _release(module: nn.Module) -> None:
    """Let accelerate have no part in the calls of a module."""
    if "_hf_hook" in vars(module):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(module)
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del vars(module)["forward"]  # that of the class, which may become another one


def drop_hooks(module: nn.Module) -> None:
    """Let nothing but the module itself have a part in its calls; see `is_hooked` and `placement_of`."""
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()
    _release(module)


def initialize(model: transformers.PreTrainedModel, module: nn.Module) -> None:
    """Give a module of a model random weights, as its architecture does.

    Relies on `PreTrainedModel._init_weights`, through which every module goes that is loaded.
    """
    model._init_weights(module)


def with_parameters(module: nn.Module, parameters: Mapping[str, nn.Parameter | None]) -> nn.Module:
    """A shallow copy of a module with other parameters.

    Relies on `_parameters`, where a module holds its own: torch/nn/modules/module.py.
    """
    twin = copy.copy(module)
    vars(twin)["_parameters"] = dict(parameters)
    if placement_of(module) is not None:  # it would call the module itself
        del vars(twin)["forward"]
    return twin


_VERSION = operator.attrgetter("_version")
"""A number that grows whenever a tensor is written to; those of inference mode have none."""


class Snapshot:
    """What a module is made of at one moment, to tell in little time whether it is so at another.

    Relies on `_modules`, `_parameters`, `_buffers`, `_forward_pre_hooks` and `_forward_hooks`, which are the same
    dictionaries for as long as a module lives, and on `_global_forward_hooks` and `_global_forward_pre_hooks`: torch
    2.13, torch/nn/modules/module.py. What fused optimizers write, and what is written through `.data`, no tensor tells.

    Args:
        module: with all below it.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self._stores = [store for m in modules for store in (m._modules, m._parameters, m._buffers)]
        self.tensors = [part for part in self._parts() if isinstance(part, Tensor)]
        self._counting = [tensor for tensor in self.tensors if not tensor.is_inference()]
        self._hooks = [hooks for m in modules for hooks in (m._forward_pre_hooks, m._forward_hooks)]
        # So that no other object, and no other values, get the place of one of them.
        self._kept = [*self._parts(), *(tensor.detach() for tensor in self.tensors)]
        self._state = self._now()

    def _parts(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(map(dict.values, self._stores))

    def _now(self) -> tuple[list[int], ...]:
        versions = list(map(_VERSION, self._counting))
        return list(map(id, self._parts())), versions, list(map(Tensor.data_ptr, self.tensors))

    def holds(self) -> bool:
        """Whether all parts are still there, and no tensor was written to."""
        return self._now() == self._state

    def hooked(self, harmless: str) -> bool:
        """Whether anything but functions of this name waits for what modules read or make."""
        if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
            return True
        if not any(self._hooks):
            return False
        return any(getattr(hook, "__name__", "") != harmless for hooks in self._hooks for hook in hooks.values())
