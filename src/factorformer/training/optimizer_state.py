"""Parameters that change their size while an optimizer holds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from factorformer.errors import ModelError

State = dict[str, Any]

SQUARED = ("exp_avg_sq", "max_exp_avg_sq")
"""States that average squares of gradients (Adam and its relatives)."""


def bare(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, where Accelerate or another library has wrapped it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def converted(state: State, parameter: Tensor, convert: Callable[[str, Tensor], Tensor]) -> State:
    """What becomes of an optimizer's state of a parameter.

    Tensors as large as the parameter go through `convert`, which is also told their names; single numbers, such as
    counts of steps, stay. If anything is of another size (factored moments, quantized states) nothing of the state can
    be carried over: it is empty, and the optimizer begins a new one.
    """
    result: State = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            result[name] = convert(name, value)
        elif isinstance(value, Tensor) and value.numel() > 1:
            return {}
        else:
            result[name] = value.clone() if isinstance(value, Tensor) else value
    return result


def linear(state: State, parameter: Tensor) -> list[Tensor]:
    """Tensors of a state that are as large as the parameter and averages or sums of its gradients."""
    large = {n: v for n, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape}
    return [value for name, value in large.items() if name not in SQUARED]


def substitute(optimizer: Optimizer, old: nn.Parameter, new: Sequence[nn.Parameter], states: Sequence[State]) -> None:
    """Put other parameters in the place of one, in its group and with the options of that.

    Raises:
        ModelError: the optimizer does not hold the old one.
    """
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            if parameter is old:
                group["params"][place : place + 1] = new
                optimizer.state.pop(old, None)
                for added, state in zip(new, states, strict=True):
                    if state:
                        optimizer.state[added] = state
                return
    raise ModelError(
        f"the optimizer does not hold a parameter of size {list(old.shape)} that changes its size: give it all "
        "parameters of the model"
    )
