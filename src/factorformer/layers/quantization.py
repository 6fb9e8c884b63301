"""Factors of whole models in integers: storing them, and holding them as floats for quantization-aware training."""

from __future__ import annotations

from torch import Tensor, nn

from factorformer import registration
from factorformer.errors import ModelError
from factorformer.layers.nn import FactorizedMatrix
from factorformer.layers.surgery import unchanged_on_error
from factorformer.structures import Factors, integers


def quantize(model: nn.Module) -> None:
    """Store in integers the factors that a plan wants so, after quantization-aware training.

    Args:
        model: from `compress(..., hold_floats=True)`, `initialize` or dynamic ranks; nothing changes in other models.

    Raises:
        ModelError: layers train straight through still, or are not finite; nothing was changed.
    """
    named = {name: m for name, m in model.named_modules() if isinstance(m, FactorizedMatrix) and m.fake_quantized}
    wrong = [name for name, m in named.items() if not all(bool(t.isfinite().all()) for t in m.factors.values())]
    if wrong:
        raise ModelError(f"layer '{wrong[0]}': its factors are not finite, and cannot be stored in integers")
    training = [name for name, layer in named.items() if layer.form is not None]
    if training:
        raise ModelError(
            f"layer '{training[0]}' trains straight through: call finish() before it is stored in integers"
        )
    known: dict[int, Factors] = {}  # layers may hold the very same factors, and go on doing so
    with unchanged_on_error(model):
        for layer in named.values():
            codes: dict[str, Tensor] = {}
            for name, factor in layer.factors.items():
                if id(factor) not in known:
                    made = integers.quantize({name: factor.detach()}, layer.bits)
                    known[id(factor)] = {
                        key: nn.Parameter(t) if key.endswith(integers.SCALE) else t for key, t in made.items()
                    }
                codes |= known[id(factor)]
            layer.quantize(codes)
        if named:
            registration.attach(model)


def hold_floats(model: nn.Module) -> bool:
    """Turn integers into floats that the forward pass rounds (quantization-aware training); `quantize` ends that.

    Factors that were frozen before `quantize` are frozen again.

    Args:
        model: from a directory in integers, say; nothing changes in others.

    Returns:
        Whether there were any.
    """
    layers = [m for m in model.modules() if isinstance(m, FactorizedMatrix) and m.quantized]
    known: dict[int, Tensor] = {}
    with unchanged_on_error(model):
        for layer in layers:
            codes, values = layer.factors, {}
            for name, tensor in layer.trainable().items():
                held = nn.Parameter(tensor) if tensor.is_floating_point() else tensor
                values[name] = known.setdefault(id(codes[name]), held)
            layer.hold_floats(values)
        if layers:
            registration.attach(model)
    return bool(layers)
