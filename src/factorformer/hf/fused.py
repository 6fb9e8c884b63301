"""Fused kernels for inference on a CPU: what lies between products is most of what is left once matrices are small.

`fuse` runs the layers of encoders that the kernels know in one call. It gives other models our attention through the
attention interface of transformers, and computes GELUs inside of the product before them where that is all that a block
does with it. A model whose architecture asks for its attention by name, or passes it arguments that it does not know,
keeps the attention it has.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from factorformer.errors import FactorformerWarning, ModelError, one_of
from factorformer.hf import compat
from factorformer.hf.encoder import FusedForward, forwards_of
from factorformer.kernels import cpu, gelu
from factorformer.kernels.dense import served
from factorformer.kernels.encoder import FORMATS, PAIRED, Products
from factorformer.layers._compat import TorchDispatchMode
from factorformer.layers.dummies import configurations, dummy_inputs, setting
from factorformer.layers.nn import FactorizedLinear

ATTENTION = "factorformer"
"""Name of the attention implementation."""

INDIFFERENT = (
    "sliding_window",
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
)
"""Arguments that say what the mask or the cache contains already, or ask for nothing of attention itself."""

WINDOWS = ("sliding_window", "index_topk", "attention_chunk_size", "local_attention", "attention_window")
"""Settings of how far attention reaches; a trial has to be longer."""

LONGEST = 512
"""Tokens of a trial, at most."""

DEVIATION = 1e-2
"""Relative deviation of outputs that still is rounding in float32; three times that in smaller types."""

ROUGHLY = 0.5
"""The same for layers in one call whose products are rounded, which a random batch magnifies more than texts do:
all-mpnet-base-v2 in int8 deviates by 0.24 here, and by 0.06 on sentences."""

_unknown: set[str] = set()
"""Arguments met that are not known here."""


class FusedGELU(nn.Module):
    """The exact GELU, by the compiled kernel where it serves; nothing where the product before has done it already.

    Args:
        product: what may have.
    """

    def __init__(self, product: FactorizedLinear | None = None) -> None:
        super().__init__()
        self._product = [product]  # in a list, so that it does not become a part of this module

    def forward(self, x: Tensor) -> Tensor:
        """`(...)` to `(...)`."""
        product = self._product[0]
        return x if product is not None and product.gelu else gelu(x)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of transformers' interface: by the compiled kernel where it serves, by torch otherwise.

    Args:
        module: the attention layer.
        query, key, value: `(batch, heads, tokens, width)`.
        attention_mask: booleans, or None for all tokens.
        dropout, scaling, is_causal, others: as for transformers' own implementations. The kernel serves only where
            `others` holds nothing that it does not know.
    """
    unknown = [name for name, value in others.items() if value is not None and name not in INDIFFERENT]
    _unknown.update(unknown)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    whole = attention_mask is None and not (causal and query.shape[2] > 1)
    masked = attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.dim() == 4
    lies_well = all(t.stride(-1) == 1 and t.shape[-1] == query.shape[-1] for t in (query, key, value))
    fits = key.shape == value.shape and key.shape[0] == query.shape[0] and query.shape[1] % key.shape[1] == 0
    plain = fits and not dropout and not unknown
    ready = served(query) and not torch.compiler.is_compiling() and cpu.serves(key) and cpu.serves(value)
    differentiated = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
    if ready and plain and lies_well and (whole or masked) and not differentiated:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return cpu.attention(query, key, value, attention_mask, scale), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
    )


def fuse(model: PreTrainedModel, products: Products | None = None) -> PreTrainedModel:
    """Use fused kernels for inference on a CPU, in place; results change within rounding, files do not.

    The layers of BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT and MPNet run in one call, in which padding takes
    no time: what is made of it is 0. Other models get our attention and GELU. Training goes on to work, but gains
    nothing. Without compiled kernels, and for other devices and types, torch does the same as before. Forward passes of
    a random batch, before and after, tell whether something may be replaced: where they differ it is left as it is.

    Args:
        model: compressed or dense.
        products: in which type layers in one call make them: `float32`, or `bfloat16` or `int8`, to which weights are
            rounded then; by default each in that in which its matrix is stored.

    Raises:
        ModelError: not a model of transformers, or no such type.
    """
    if products not in (None, *FORMATS):
        raise ModelError(f"fuse: unknown type of products {one_of(products, FORMATS)}")
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"fuse takes a model of transformers, not a {type(model).__name__}: of a SentenceTransformer `st`, fuse "
            "st[0].model"
        )
    if compat.settable_attention(model) == "sdpa":
        _set_attention(model)
    inside = _set_stacks(model, products)
    for module in list(model.modules()):
        if module in inside:
            continue
        for name, child in list(module.named_children()):
            if type(child) is GELUActivation or (type(child) is nn.GELU and child.approximate == "none"):
                setattr(module, name, FusedGELU())
        _fuse_pair(module)
    return model


@contextlib.contextmanager
def in_one_call(model: PreTrainedModel, products: Products | None) -> Iterator[bool]:
    """While this lasts, the layers of a model run in one call without gradients; whether they are known.

    Args:
        model: on a CPU, in float32; others are left alone.
        products: as for `fuse`.
    """
    known = cpu.AVAILABLE and model.device.type == "cpu" and model.dtype == torch.float32
    products = None if products == "bfloat16" and not PAIRED else products  # which would be emulated
    forwards = forwards_of(model, products) if known else {}
    before = [vars(module).get("forward") for module in forwards]
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield bool(forwards)
    finally:
        for module, forward in zip(forwards, before, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def _set_stacks(model: PreTrainedModel, products: Products | None) -> set[nn.Module]:
    """Run layers that are known in one call; the modules of which they are made.

    Whether they are what they seem to be, products in float32 tell, of them and of torch, without any rounding. Where
    outputs are others than before, the layers stay as they are, and a warning says so.
    """
    forwards = forwards_of(model, products) if cpu.AVAILABLE else {}
    reason = None if forwards else "its layers are not known"
    if not cpu.AVAILABLE:
        reason = "there are no compiled kernels"
    elif model.device.type != "cpu" or model.dtype != torch.float32:
        reason = f"it is {str(model.dtype).removeprefix('torch.')} on {model.device.type}, not float32 on a CPU"
    if reason is not None:
        asked = f", nor its products in {products}" if products else ""
        _say(f"{type(model).__name__} does not run in one call{asked}: {reason}")
    stacks = [module for module, forward in forwards.items() if isinstance(forward, FusedForward)]
    inside = {module for stack in stacks for module in stack.modules()}
    if not stacks:
        return inside
    earlier = {module: vars(module).pop("forward", None) for module in forwards}
    exact = _outputs_with(model, {stack: _Exactly(stack) for stack in stacks})
    apart, limit = _deviation(exact, _outputs_with(model, forwards_of(model, "float32"))), DEVIATION
    known = apart <= limit
    differ = "no batch could be made up to try them" if exact is None else f"outputs would differ by {apart:.2g}"
    if apart <= limit and products != "float32":
        apart, limit = _deviation(exact, _outputs_with(model, forwards)), ROUGHLY
        differ = f"rounding to {products or 'integers'} would change outputs by {apart:.2g}"
    if not apart <= limit:
        for module, forward in earlier.items():
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward
        _say(f"the layers of {type(model).__name__} are not run in one call: {differ}")
        return inside if known else set()  # what rounding spoils may run in one call of another type
    for module, forward in forwards.items():
        module.forward = forward
    return inside


class _Aside(TorchDispatchMode):
    """While this is entered, the compiled kernels leave everything to torch, which rounds nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Exactly:
    """The forward pass of a module as torch makes it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **others: Any) -> Any:
        with _Aside():
            return type(self.module).forward(self.module, *args, **others)


def _outputs_with(model: PreTrainedModel, forwards: Mapping[nn.Module, Any]) -> list[Tensor] | None:
    """As `_outputs`, while modules have these forward passes."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        return _outputs(model)
    finally:
        for module in forwards:
            vars(module).pop("forward", None)


def _say(what: str) -> None:
    warnings.warn(what, FactorformerWarning, stacklevel=4)


def _set_attention(model: PreTrainedModel) -> None:
    """Give a model this attention, unless its outputs, or what it does to get there, are other than before."""
    if _asks_by_name(model):
        return
    before = _outputs(model)
    if before is None:
        return
    _unknown.clear()
    model.set_attn_implementation(ATTENTION)
    after = _outputs(model)
    limit = DEVIATION if model.dtype in (torch.float32, torch.float64) else 3 * DEVIATION
    if _unknown or not _deviation(before, after) <= limit:
        model.set_attn_implementation("sdpa")


def _asks_by_name(model: PreTrainedModel) -> bool:
    """Whether the source of any module compares the name of the attention with `sdpa`."""
    return any(_compares(name) for name in {cls.__module__ for m in model.modules() for cls in type(m).__mro__})


@functools.cache
def _compares(module: str) -> bool:
    if module.startswith("torch.") or module == "transformers.modeling_utils" or module not in sys.modules:
        return False
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError):
        return False
    if "sdpa" not in source:
        return False
    return any(
        isinstance(node, ast.Compare) and "attn_implementation" in (text := ast.unparse(node)) and "sdpa" in text
        for node in ast.walk(ast.parse(source))
    )


@torch.no_grad()
def _outputs(model: PreTrainedModel) -> list[Tensor] | None:
    """The floating-point outputs for a random batch, longer than attention reaches, of padding none.

    None where none can be made.
    """
    reach = [setting(config, name) for config in configurations(model.config) for name in WINDOWS]
    length = min(max([16, *(2 * r for r in reach if isinstance(r, int))]), LONGEST)
    longest = setting(model.config, "max_position_embeddings", "n_positions", default=length)
    length = min(length, longest - 4) if isinstance(longest, int) and longest > 8 else length
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for batch in dummy_inputs(model, 2, length):
            mask = None
            if "input_ids" in batch:  # the mask of a batch with padding is another one
                mask = torch.ones_like(batch["input_ids"])
                mask[1, -2:] = 0
                batch = {**batch, "attention_mask": mask}
            with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                output = model(**{k: _fitting(v, model) for k, v in batch.items()})
                real = [t if mask is None or t.shape[:2] != mask.shape else t[mask.bool()] for t in _tensors(output)]
                return [t.float() for t in real]
    finally:
        for module, training in modes:
            module.training = training
    return None


def _fitting(value: Tensor, model: PreTrainedModel) -> Tensor:
    value = value.to(model.device)
    return value.to(model.dtype) if value.is_floating_point() else value


def _tensors(output: Any) -> Iterator[Tensor]:
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (list, tuple)) else [output]
    for value in values:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                yield value
        elif isinstance(value, (list, tuple)) or hasattr(value, "to_tuple"):
            yield from _tensors(value)


def _deviation(before: list[Tensor] | None, after: list[Tensor] | None) -> float:
    if before is None or after is None or [t.shape for t in before] != [t.shape for t in after]:
        return float("inf")
    apart = [float((b - a).norm() / b.norm().clamp_min(1e-12)) for b, a in zip(before, after, strict=True)]
    return float("inf") if any(map(math.isnan, apart)) else max(apart, default=0.0)


def _fuse_pair(module: nn.Module) -> None:
    """Let a block that is nothing but a product and its GELU compute both in one pass; a trial shows whether it can."""
    children = dict(module.named_children())
    linear = next((child for child in children.values() if isinstance(child, FactorizedLinear)), None)
    name = next((name for name, child in children.items() if isinstance(child, FusedGELU)), None)
    if len(children) != 2 or linear is None or name is None or linear.gelu:
        return
    x = torch.linspace(-3, 3, 6 * linear.in_features).sin().mul(2).view(2, 3, -1).to(linear.values)
    with torch.no_grad():
        try:
            before = module(x)
            setattr(module, name, FusedGELU(linear))
            linear.gelu = True
            same = torch.allclose(module(x), before, rtol=1e-3, atol=1e-4)
        except Exception:  # it takes something else
            same = False
    if not same:
        linear.gelu = False
        setattr(module, name, children[name])


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
