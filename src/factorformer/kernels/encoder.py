"""A stack of encoder layers in one call of the compiled kernels: what they read of it, and the call.

Activations lie features by tokens, so weights are read row by row: in words of one float, two bfloat16 or four int8.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from factorformer.kernels import cpu
from factorformer.kernels.dense import Dense

Products = Literal["float32", "bfloat16", "int8"]
"""In which type products are made."""

FORMATS: dict[Products, int] = {"float32": 0, "bfloat16": 1, "int8": 2}
"""Their numbers, by which a word holds `2**number` values."""


PAIRED = cpu.variant() in ("avx512_bf16", "amx", "amx_emulated")
"""Whether bfloat16 is multiplied by instructions of its own."""

_TILE = 16 if cpu.variant() in ("amx", "amx_emulated") else 1
"""Words and rows of which tiles are made."""

WORTH = 2**16
"""Words of a layer's matrices for which one more thread is worth waiting for, with each vector of tokens: ten
microseconds of products, where a thread waits for the others some twenty times in a layer."""

PHASES = ("products", "rounding", "norms", "attention", "moving", "waiting")
"""What time is spent on; products with bias, residual and GELU."""


class Linear(NamedTuple):
    """`x @ W_1.T @ W_2.T ... + bias`.

    Args:
        matrices: `(out, in)` each, floats or int8.
        bias: of the last product.
    """

    matrices: Sequence[Dense]
    bias: Tensor | None


class Norm(NamedTuple):
    """A layer norm: its weight, bias and epsilon."""

    weight: Tensor
    bias: Tensor
    epsilon: float


class EncoderLayer(NamedTuple):
    """Attention and two products with a GELU between, each with what it reads added and normalized afterwards."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    up: Linear
    down: Linear
    after_attention: Norm
    after_products: Norm


def readable(matrices: Sequence[Dense], inner: int, out: int) -> bool:
    """Whether the kernels read a chain of matrices that make `out` values of `inner`."""
    sizes = [inner, *(size for matrix in matrices for size in reversed(matrix.weight.shape)), out]
    fits = all(a == b for a, b in zip(sizes[::2], sizes[1::2], strict=True))
    return fits and len(matrices) <= cpu.LONGEST and not any(matrix.columns for matrix in matrices)


class Encoder:
    """A stack of encoder layers as the compiled kernels read it, of weights that stay where they are or copies of them.

    Args:
        layers: all of one width.
        heads: of attention.
        products: in which type they are made, int8 or floats that are rounded to it; None for each in that of its
            matrix.
        bias: of scores, `(heads, 2 * reach + 1)`, by how far the query is behind the key, from `-reach` on.
    """

    def __init__(
        self, layers: Sequence[EncoderLayer], heads: int, products: Products | None, bias: Tensor | None = None
    ) -> None:
        self._kept: list[Tensor] = []
        self._between, self._deepest, self._read = 1, 1, 0
        self.exact = True
        """Whether all products are made in float32, and attention with them."""
        self.width = layers[0].query.matrices[0].weight.shape[1]
        self.reach = 0 if bias is None else bias.shape[1] // 2
        numbers: list[int] = []
        scale = (self.width // heads) ** -0.5
        for layer in layers:
            for linear in layer[:6]:
                numbers += self._linear(linear, products, scale if linear is layer.query else 1.0)
            for norm in layer[6:]:
                numbers += self._norm(norm)
        inner = max(layer.up.matrices[-1].weight.shape[0] for layer in layers)
        # What is read in whole vectors goes beyond the last distance.
        address = 0 if bias is None else self._keep(F.pad(bias.float().flatten(), (0, 64)))
        numbers = [
            len(layers),
            self.width,
            heads,
            inner,
            self._between,
            self._deepest,
            address,
            self.reach,
            self.exact,
            0,
            max(self._read // (WORTH * len(layers)), 1),
            *numbers,
        ]
        self._fields = (ctypes.c_int64 * len(numbers))(*numbers)

    def __call__(self, x: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
        """The hidden states after the last layer, `(n, width)`, 0 for tokens of no sequence.

        Args:
            x: the hidden states before the first one, `(n, width)`, contiguous, float32.
            rows: of the tokens of all sequences, one after the other, int64.
            starts: where in `rows` each sequence begins, and their length in the end, int64.

        Raises:
            MemoryError: there is not enough for intermediate results.
        """
        y = torch.zeros_like(x) if len(rows) < len(x) else torch.empty_like(x)
        cpu.encode(self._fields, x, rows, starts, y)
        return y

    @contextlib.contextmanager
    def watched(self) -> Iterator[dict[str, float]]:
        """Seconds of all threads together by what they are spent on, of all calls while this lasts."""
        spent = torch.zeros(len(PHASES), dtype=torch.int64)
        seconds: dict[str, float] = {}
        self._fields[9] = spent.data_ptr()
        try:
            yield seconds
        finally:
            self._fields[9] = 0
            seconds.update(zip(PHASES, (spent / 1e9).tolist(), strict=True))

    def _keep(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _linear(self, linear: Linear, products: Products | None, scale: float) -> list[int]:
        numbers: list[int] = []
        count = len(linear.matrices)
        for place, matrix in enumerate(linear.matrices):
            kind: Products = products or ("float32" if matrix.scales is None else "int8")
            kind = "float32" if matrix.weight.shape[1] > cpu.WIDEST else kind  # sums of integers would not fit
            numbers += self._packed(matrix, kind, scale if place == count - 1 else 1.0)
            out, inner = matrix.weight.shape
            self.exact &= kind == "float32"
            self._deepest = max(self._deepest, _words(inner, kind))
            self._read += out * _words(inner, kind)
            if place < count - 1:
                self._between = max(self._between, out)
        numbers += [0] * (7 * (cpu.LONGEST - count))
        bias = 0 if linear.bias is None else self._keep(linear.bias.float() * scale)
        return [*numbers, count, bias]

    def _packed(self, matrix: Dense, products: Products, scale: float) -> list[int]:
        out, inner = matrix.weight.shape
        depth, form = _words(inner, products), FORMATS[products]
        missing = (0, depth * 2**form - inner, 0, 0 if products == "float32" else -out % _TILE)
        if products != "int8":
            dtype = torch.float32 if products == "float32" else torch.bfloat16
            values = matrix.values(torch.float32)
            words = (values if scale == 1 else values * scale).to(dtype)
            words = F.pad(words, missing) if any(missing) else words
            return [self._keep(words), 0, 0, out, inner, depth, form]
        codes, scales = matrix.weight, matrix.scales
        if scales is None:
            scales = codes.abs().amax(1).clamp_min(1e-30) / 127
            codes = (codes / scales[:, None]).round().to(torch.int8)
        sums = codes.sum(1, dtype=torch.float32)
        codes = F.pad(codes, missing) if any(missing) else codes
        kept = (self._keep(codes), self._keep(scales.float() * scale), self._keep(sums))
        return [*kept, out, inner, depth, form]

    def _norm(self, norm: Norm) -> list[int]:
        (bits,) = struct.unpack("<i", struct.pack("<f", norm.epsilon))
        return [self._keep(norm.weight.float()), self._keep(norm.bias.float()), bits]


def _words(values: int, products: Products) -> int:
    """Words of a row of so many values, with those that fill the last tile."""
    words = -(-values // 2 ** FORMATS[products])
    return words if products == "float32" else -(-words // _TILE) * _TILE
