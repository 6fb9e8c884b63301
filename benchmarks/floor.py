"""What an encoder would take at least: its multiplications at the best rates of the machine, and its weights read once.

The best rate of a type is measured in the same run, as the fastest of several products of the very sizes of a model, by
torch (oneDNN or MKL) and by our kernels; that of memory by copies of as many bytes as the weights take in that type,
which caches may hold. Nothing else is counted: no norms, no GELU, no rounding. An encoder is faster than this only if
its products are faster than all of these. Factors that are no chain of dense matrices count as one dense matrix.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factorformer.bench.candidates import real
from factorformer.kernels import Dense, chain
from factorformer.layers.nn import FactorizedLinear
from factorformer.layers.surgery import find_blocks

REPEATS = 7
"""Products of each size and way; the fastest counts."""

WARM_UP = 5
"""Passes of a model before those that count."""

Size = tuple[int, int, int]
"""Tokens, inputs and outputs of a product."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What one pass over a batch has to do.

    Args:
        products: sizes of all products with weights, each as often as it occurs.
        attention: sequences times heads, tokens of each, and width of a head, by layers.
    """

    products: tuple[Size, ...]
    attention: tuple[tuple[int, int, int], ...]

    @property
    def weights(self) -> int:
        """Values of all matrices."""
        return sum(inner * out for _, inner, out in self.products)


def work_of(model: PreTrainedModel, batch: int, tokens: int) -> Work:
    """The products, attention and weights of a model's blocks, for texts without padding."""
    config, products = model.config, []
    blocks = [model.get_submodule(name) for name in find_blocks(model)]
    for block in blocks:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                products.append((batch * tokens, layer.in_features, layer.out_features))
            elif isinstance(layer, FactorizedLinear):
                matrices = layer.spec.chain(layer.multiplied)
                sizes = [layer.in_features, *(m.weight.shape[0] for m in matrices[:-1]), layer.out_features]
                products += [(batch * tokens, a, b) for a, b in itertools.pairwise(sizes)]
    heads = config.num_attention_heads
    attention = [(batch * heads, tokens, config.hidden_size // heads)] * len(blocks)
    return Work(tuple(products), tuple(attention))


def _fastest(runs: Iterable[Callable[[], object]]) -> float:
    """Seconds of the fastest run of all."""
    least = float("inf")
    for run in runs:
        try:
            run()
        except RuntimeError:  # a type that torch does not multiply here
            continue
        for _ in range(REPEATS):
            began = time.perf_counter()
            run()
            least = min(least, time.perf_counter() - began)
    return least


def _products(size: Size, kind: str) -> list[Callable[[], object]]:
    tokens, inner, out = size
    if kind == "int8":
        x, codes = torch.randn(tokens, inner), torch.randint(-127, 128, (out, inner), dtype=torch.int8)
        matrix, rounded = Dense(codes, torch.ones(out)), torch.randint(-127, 128, (tokens, inner), dtype=torch.int8)
        return [lambda: chain(x, (matrix,)), lambda: torch._int_mm(rounded, codes.T)]
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    x, weight = torch.randn(tokens, inner, dtype=dtype), torch.randn(out, inner, dtype=dtype)
    runs: list[Callable[[], object]] = [lambda: x @ weight.T]
    return runs if kind == "bf16" else [*runs, lambda: chain(x, (Dense(weight),))]


def _attention(heads: int, tokens: int, width: int, kind: str) -> list[Callable[[], object]]:
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    q, scores = torch.randn(heads, tokens, width, dtype=dtype), torch.randn(heads, tokens, tokens, dtype=dtype)
    return [lambda: (q @ q.mT, scores @ q)]


@torch.inference_mode()
def floors(work: Work) -> dict[str, dict[str, float]]:
    """By type, `fp32`, `bf16` and `int8`: milliseconds at least, and the rates from which they follow.

    Attention is in bfloat16 where products are in int8. `gflops` is the rate of all products together, which take
    `flops`; `read` is half of the milliseconds in which `weight_bytes` are copied. Each product is a call of a library:
    where they are tiny, most of this floor is the calls, and a model in one call can be below it.
    """
    found = {}
    for kind, size in (("fp32", 4), ("bf16", 2), ("int8", 1)):
        source = torch.zeros(work.weights * size, dtype=torch.uint8)
        target = torch.empty_like(source)
        read = _fastest([lambda source=source, target=target: target.copy_(source)]) / 2
        seconds = {of: _fastest(_products(of, kind)) for of in set(work.products)}
        between = {of: _fastest(_attention(*of, kind)) for of in set(work.attention)}
        products = sum(seconds[of] for of in work.products)
        attention = sum(between[of] for of in work.attention)
        flops = sum(2 * tokens * inner * out for tokens, inner, out in work.products)
        least = max(products, read) + attention
        found[kind] = {
            "flops": flops,
            "weight_bytes": work.weights * size,
            "milliseconds": round(1e3 * least, 4),
            "products": round(1e3 * products, 4),
            "attention": round(1e3 * attention, 4),
            "gflops": round(flops / products / 1e9, 1),
            "read": round(1e3 * read, 4),
        }
    return found


def split(module: PreTrainedModel, ids: Tensor, padding: int | None, passes: int = 9) -> dict[str, float] | None:
    """Milliseconds of a pass of a fused model by what threads spend them on; None where its layers run otherwise.

    What is not in the call of the layers, embeddings and pooler among them, is `everything else`.
    """
    from factorformer.hf.encoder import FusedForward
    from factorformer.hf.encoder_layout import stacks_of

    forwards = [vars(stack).get("forward") for stack in stacks_of(module)]
    encoders = [forward.encoder for forward in forwards if isinstance(forward, FusedForward)]
    if len(encoders) != 1 or encoders[0] is None:
        return None
    mask, each = real(ids, padding), []
    with torch.inference_mode():
        for number in range(WARM_UP + passes):
            began = time.perf_counter()
            with encoders[0].watched() as seconds:
                module(input_ids=ids, attention_mask=mask)
            took = time.perf_counter() - began
            spent = {name: value / torch.get_num_threads() for name, value in seconds.items()}
            if number >= WARM_UP:
                each.append({**spent, "everything else": took - sum(spent.values())})
    return {name: round(1e3 * statistics.median(spent[name] for spent in each), 4) for name in each[0]}
