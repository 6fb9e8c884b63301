"""Everything that this package uses of torch and that torch does not document; the same of transformers: `hf.compat`.

`tests/hf/test_compat.py` asserts that all of it is there. What is missing in another release is said once, and costs
speed: a compressed model loads and is right without.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from factorformer.errors import FactorformerWarning


def _probes() -> tuple[Callable[[], Any], ...] | None:
    """Functions whose results are false unless something watches or transforms what torch computes.

    Relies on `torch._C._len_torch_dispatch_stack` (modes that count or fake operators), `peek_interpreter_stack` (vmap,
    grad and others of `torch.func`), `_get_tracing_state` (`torch.jit.trace`) and `forward_ad._current_level`, -1
    outside of forward-mode differentiation: torch 2.13, torch/_C and torch/autograd/forward_ad.py.
    """
    try:
        from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingModuleSource]

        assert forward_ad._current_level < 0
        return torch._C._len_torch_dispatch_stack, peek_interpreter_stack, torch._C._get_tracing_state
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"factorformer's kernels do not know torch {torch.__version__} ({error}): torch multiplies instead",
            FactorformerWarning,
            stacklevel=2,
        )
        return None


_PROBES = _probes()


def unobserved() -> bool:
    """Whether torch just computes: nothing counts its operators, takes their graph, or asks for derivatives forward."""
    if _PROBES is None:
        return False
    modes, transforms, tracing = _PROBES
    return not modes() and transforms() is None and tracing() is None and forward_ad._current_level < 0


def reference(operator: Any) -> Callable[..., Any]:
    """The function that a `torch.library.custom_op` was made of.

    Relies on `CustomOpDef._init_fn`: torch 2.13, torch/_library/custom_ops.py.
    """
    return operator._init_fn


def version_of(tensor: Tensor) -> int | None:
    """A number that grows whenever a tensor is written to; None for one of inference mode, which counts nothing.

    Relies on `Tensor._version`: torch 2.13, torch/_tensor.py.
    """
    return None if tensor.is_inference() else tensor._version
