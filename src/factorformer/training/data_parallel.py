"""Data-parallel training of matrices whose parameters change, which `DistributedDataParallel` cannot follow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from factorformer.errors import ModelError
from factorformer.layers._compat import IGNORED


class GradientAveraging:
    """Averages the gradients of some parameters over all processes as soon as they are there.

    Args:
        model: where `DistributedDataParallel` finds the names that it is to leave to this object; build it before the
            model is wrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._before = vars(model).get(IGNORED)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def follow(self, parameters: Iterable[nn.Parameter], names: Sequence[str]) -> None:
        """Average these from now on, and no others.

        Args:
            parameters: whose gradients are averaged.
            names: of all parameters and buffers of the model that this object, not the wrapper, keeps alike.
        """
        self._remove_hooks()
        vars(self.model)[IGNORED] = [*(self._before or ()), *names]
        self._hooks = [parameter.register_post_accumulate_grad_hook(_average) for parameter in parameters]

    def detach(self) -> None:
        """Leave the model as it was."""
        self._remove_hooks()
        vars(self.model).pop(IGNORED, None)
        if self._before is not None:
            vars(self.model)[IGNORED] = self._before

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def processes() -> int:
    """How many processes train together."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def check_whole(parameters: Iterable[Tensor], training: str) -> None:
    """Raise `ModelError` if a parameter is held in parts by several processes, as `fully_shard` has it."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise ModelError(
            f"{training} need whole parameters in every process, and these are sharded: train in "
            "DistributedDataParallel, or compress first and shard factors that are trained as they are"
        )


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Give all processes the values that these tensors have in the first one, in place."""
    if processes() > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)


def _average(parameter: Tensor) -> None:
    """The mean over processes; of a mean of earlier batches, which accumulate, it is that mean again."""
    if processes() > 1 and parameter.grad is not None:
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= processes()
