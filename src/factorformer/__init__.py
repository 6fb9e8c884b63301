"""Factorformer makes Transformers small and fast by storing every weight matrix in factorized form.

Importing the package imports neither torch nor transformers; a public name is imported when it is first used.
"""

import importlib
import typing

from factorformer import moved as _moved
from factorformer import registration as _registration

if typing.TYPE_CHECKING:
    from factorformer.compression import Report, compress, initialize, plan
    from factorformer.errors import FactorformerError
    from factorformer.hf.checkpoint import load
    from factorformer.hf.fused import fuse
    from factorformer.layers.nn import FactorizedEmbedding, FactorizedLinear
    from factorformer.layers.quantization import hold_floats, quantize
    from factorformer.planning import Plan
    from factorformer.streaming import compress_checkpoint
    from factorformer.structures import DenseSparse, KroneckerSum, LowRank, Structure
    from factorformer.tasks.healing import HealingSettings, heal

__version__ = "0.1.0"

__all__ = [
    "DenseSparse",
    "FactorformerError",
    "FactorizedEmbedding",
    "FactorizedLinear",
    "HealingSettings",
    "KroneckerSum",
    "LowRank",
    "Plan",
    "Report",
    "Structure",
    "__version__",
    "compress",
    "compress_checkpoint",
    "fuse",
    "heal",
    "hold_floats",
    "initialize",
    "load",
    "plan",
    "quantize",
]

_NAMES = {
    "compression": ("Report", "compress", "initialize", "plan"),
    "errors": ("FactorformerError",),
    "hf.checkpoint": ("load",),
    "hf.fused": ("fuse",),
    "layers.nn": ("FactorizedEmbedding", "FactorizedLinear"),
    "layers.quantization": ("hold_floats", "quantize"),
    "planning": ("Plan",),
    "streaming": ("compress_checkpoint",),
    "structures": ("DenseSparse", "KroneckerSum", "LowRank", "Structure"),
    "tasks.healing": ("HealingSettings", "heal"),
}
_HOMES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> typing.Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_registration.register()
_moved.register()
