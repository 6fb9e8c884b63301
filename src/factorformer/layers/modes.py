"""In which mode a model runs, and what it leaves behind."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SHORT = 128
"""Tokens up to which attention in bfloat16 goes back faster through its matrices than through the fused operator.

Measured on AMD EPYC with AVX-512 in bfloat16, 2 cores, forward and backward pass of 2,048 tokens, 12 heads of width 32,
in milliseconds: 43 fused and 5 by its matrices at 16 tokens, 24 and 12 at 64, 29 and 18 at 128, 24 and 41 at 256.
"""


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while; afterwards every module is in the mode that it was in.

    >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with evaluating(model):
    ...     model.training, model[0].training
    (False, False)
    >>> model.training, model[0].training, model[1].training
    (True, True, False)
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No gradients, no random numbers taken, no word from anyone."""
    silenced = logging.root.manager.disable
    with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(max(silenced, logging.ERROR))
        try:
            yield
        finally:
            logging.disable(silenced)


@contextlib.contextmanager
def requiring_gradients(parameters: Iterable[nn.Parameter], required: bool) -> Iterator[None]:
    """Parameters with gradients, or without, for a while; those that are so already are left alone."""
    changed = [parameter for parameter in parameters if parameter.requires_grad is not required]
    try:
        for parameter in changed:
            parameter.requires_grad_(required)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not required)


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether the processor has instructions for products of bfloat16 that are summed in float32."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def fast_products(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Products of a float32 model in bfloat16, summed in float32, where its processor has instructions for them."""
    kinds = {(parameter.device.type, parameter.dtype) for parameter in model.parameters()}
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16_products() and kinds == {("cpu", torch.float32)})


def exact_products(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Products in the type of their factors, whatever is around."""
    return torch.autocast(device.type, enabled=False)


@contextlib.contextmanager
def fast_float32(device: torch.device, *, rounding: bool = False) -> Iterator[None]:
    """Products of float32 matrices on a CPU by oneDNN, twice as fast as by MKL on processors of AMD.

    oneDNN is what PyTorch takes where products of less precision are allowed. Where it has no faster ones, as without
    AMX, it multiplies float32 as it is.

    Args:
        device: of the matrices; nothing changes on others than CPUs.
        rounding: allow it to round factors to bfloat16, with sums in float32.
    """
    products = getattr(torch.backends.mkldnn, "matmul", None)  # older versions of PyTorch have none
    if device.type != "cpu" or products is None or not (rounding or _multiplies_float32()):
        yield
        return
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


def fast_attention(device: torch.device, tokens: int, *, rounded: bool) -> contextlib.AbstractContextManager[object]:
    """Attention whose backward pass is fast on short texts.

    Args:
        device: of the model; nothing changes on others than CPUs.
        tokens: of the longest text of a batch.
        rounded: whether products are made in bfloat16; the fused operator is slow there alone.
    """
    if device.type == "cpu" and rounded and tokens <= SHORT:
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


@functools.cache
def _multiplies_float32() -> bool:
    """Whether oneDNN rounds nothing although it is allowed to."""
    fine = torch.full((256, 256), 1 + 2**-12, dtype=torch.float32, device="cpu")
    with exact_products(fine.device), fast_float32(fine.device, rounding=True):
        return bool(torch.equal(fine @ torch.eye(256, dtype=torch.float32, device="cpu"), fine))
