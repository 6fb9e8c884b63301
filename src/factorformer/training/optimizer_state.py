"""Parameters that change their size while an optimizer holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from factorformer.errors import ModelError

State = dict[str, Any]

LINEAR = ("exp_avg", "momentum_buffer", "grad_avg")
"""States of torch's optimizers that average or add up gradients."""

SQUARED = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta")
"""States that do so with squares of gradients or of steps."""


def bare(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, where Accelerate or another library has wrapped it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def converted(state: State, parameter: Tensor, convert: Callable[[str, Tensor], Tensor | None]) -> State:
    """What becomes of an optimizer's state of a parameter.

    Tensors as large as the parameter go through `convert`, which is also told their names; single numbers, such as
    counts of steps, stay. If anything is of another size (factored moments, quantized states), or `convert` has no
    answer, nothing of the state can be carried over: it is empty, and the optimizer begins a new one.
    """
    result: State = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            found = convert(name, value)
            if found is None:
                return {}
            result[name] = found
        elif isinstance(value, Tensor) and value.numel() > 1:
            return {}
        else:
            result[name] = value.clone() if isinstance(value, Tensor) else value
    return result


def check_holds(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise `ModelError` unless an optimizer holds these parameters, given by name."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    lost = [name for name, parameter in parameters.items() if id(parameter) not in held]
    if lost:
        raise ModelError(
            f"the optimizer does not hold '{lost[0]}', which changes its size (nor {len(lost) - 1} others): give it "
            "all parameters of the model as they are now, after DynamicRank was made"
        )


def substitute(
    optimizer: Optimizer, old: nn.Parameter, new: Mapping[str, nn.Parameter], states: Sequence[State]
) -> None:
    """Put other parameters in the place of one, in its group and with the options of that.

    Args:
        optimizer: holds the old one.
        old: a parameter of some module.
        new: parameters of that module by name.
        states: one for each of them; empty ones are left for the optimizer to begin.
    """
    group = next(g for g in optimizer.param_groups if any(parameter is old for parameter in g["params"]))
    place = next(place for place, parameter in enumerate(group["params"]) if parameter is old)
    group["params"][place : place + 1] = new.values()
    if "param_names" in group:  # of an optimizer that was given `named_parameters()`
        owner = group["param_names"][place].rpartition(".")[0]
        group["param_names"][place : place + 1] = [f"{owner}.{name}" if owner else name for name in new]
    optimizer.state.pop(old, None)
    for added, state in zip(new.values(), states, strict=True):
        if state:
            optimizer.state[added] = state
