"""Factorformer makes Transformers small and fast by storing every weight matrix in factorized form."""

__version__ = "0.1.0"

from factorformer.compression import Report, compress, initialize, plan
from factorformer.errors import FactorformerError
from factorformer.hf.checkpoint import load
from factorformer.nn import FactorizedEmbedding, FactorizedLinear
from factorformer.planning import Plan
from factorformer.structures import DenseSparse, KroneckerSum, LowRank, Structure

__all__ = [
    "DenseSparse",
    "FactorformerError",
    "FactorizedEmbedding",
    "FactorizedLinear",
    "KroneckerSum",
    "LowRank",
    "Plan",
    "Report",
    "Structure",
    "__version__",
    "compress",
    "initialize",
    "load",
    "plan",
]
