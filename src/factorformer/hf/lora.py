"""LoRA of PEFT on factorized layers: by name, and as a part of `all-linear`. Imported after PEFT's own module of LoRA.

An adapter adds its product to that of the factors, in int8 or not, which stay as they are. It cannot be merged into
them: `dequantize()` the model first, and put the adapter on that.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import transformers
from peft.tuners import tuners_utils
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora import model as lora_model
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from factorformer.errors import ModelError
from factorformer.hf import compat
from factorformer.layers.nn import FactorizedLinear

STARTS = (True, False, "gaussian", "orthogonal")
"""What `init_lora_weights` may be: others read the weight."""


class FactorizedLora(lora_layer.Linear):
    """A factorized layer with an adapter.

    Raises:
        ModelError: a kind of adapter that reads or changes the weight, which is never built.
    """

    def _get_in_out_features(self, module: nn.Module) -> Any:
        assert isinstance(module, FactorizedLinear)
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **options: Any) -> None:
        """Add an adapter."""
        if config.use_dora or config.init_lora_weights not in STARTS:
            kind = "use_dora" if config.use_dora else f"init_lora_weights={config.init_lora_weights!r}"
            raise ModelError(f"{kind} needs the weight of a layer, which is factorized: use plain LoRA")
        super().update_layer(adapter_name, r, lora_alpha, config=config, **options)

    def merge(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: factors cannot take an adapter in."""
        raise ModelError(
            "an adapter cannot be merged into factors: keep it beside them, or call dequantize() on the model before "
            "it gets the adapter"
        )


def _dispatch(original: Any) -> Any:
    """Relies on `dispatch_default(target, adapter_name, config, ...)` of peft 0.21: tuners/lora/layer.py."""

    @functools.wraps(original)
    def dispatch(target: nn.Module, adapter_name: str, config: Any, **options: Any) -> nn.Module | None:
        layer = target.get_base_layer() if isinstance(target, tuners_utils.BaseTunerLayer) else target
        if isinstance(layer, FactorizedLinear) and options.get("parameter_name") is None:
            config.fan_in_fan_out = False
            return FactorizedLora(target, adapter_name, config=config, **options)
        return original(target, adapter_name, config, **options)

    return dispatch


def _include_all_linear(original: Any) -> Any:
    @functools.wraps(original)
    def include(peft_config: Any, model: nn.Module) -> Any:
        wanted = str(getattr(peft_config, "target_modules", "")).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
        peft_config = original(peft_config, model)
        if wanted:
            left = {id(head) for head in _heads(model)}
            peft_config.target_modules = set(peft_config.target_modules) | {
                name
                for name, module in model.named_modules()
                if isinstance(module, FactorizedLinear) and id(module) not in left and not name.endswith(".base_layer")
            }
        return peft_config

    return include


def _heads(model: nn.Module) -> list[nn.Module]:
    """What PEFT leaves out of `all-linear`: the head of a language model, and those of classifiers."""
    found = [getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES]
    if isinstance(model, transformers.PreTrainedModel):
        found += compat.token_tables(model)
    return [module for module in found if module is not None]


setattr(lora_model, "dispatch_default", _dispatch(lora_layer.dispatch_default))  # noqa: B010  # not exported
compat.around_all_linear(_include_all_linear)
