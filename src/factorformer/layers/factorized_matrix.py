"""A matrix in factorized form as a module: what it holds, and the states it goes through in training and storage."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from factorformer.errors import ModelError
from factorformer.kernels._compat import unobserved, version_of
from factorformer.structures import Factors, Selection, Shape, Structure, TensorSpec, integers
from factorformer.structures.integers import Bits


def new_factors(
    spec: Structure, shape: Shape, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Factors of a structure, all zero: `spec.initialize` fills them."""
    return _zeros(spec.tensors(shape), device, dtype)


def _zeros(
    tensors: Mapping[str, TensorSpec], device: torch.device | str | None, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    return {
        name: torch.zeros(tensor.size, device=device, dtype=tensor.dtype or dtype) for name, tensor in tensors.items()
    }


TEMPORARY = ("shadow", "projection", "frozen", "moment")
"""Tensors that a matrix holds beside its factors only while it trains in another form."""


class Mode(enum.Enum):
    """How a matrix stores its factors and multiplies by them."""

    FLOATS = "floats"
    """Float factors, multiplied as they are."""

    FAKE_QUANTIZED = "fake_quantized"
    """Float factors, rounded to integers in the forward pass: quantization-aware training."""

    QUANTIZED = "quantized"
    """Codes in integers with scales, which are not trained."""


@runtime_checkable
class Form(Protocol):
    """What stands in for the factors in products: a form in which the matrix trains, or in which it is exported."""

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x @ W.T + bias` in that form."""
        ...

    def rows(self, index: Tensor) -> Tensor:
        """`W[index]` in that form."""
        ...

    def pack(self) -> None:
        """Write the present value of the form into the factors."""
        ...


class FactorizedMatrix(nn.Module):
    """A matrix `W` of shape `(out, in)` that is only ever stored as the factors of `spec`.

    The factors are registered directly under their own names (`weight`, `right`, ...), values as parameters and
    integers as buffers, so a state dict holds exactly what the structure stores.

    A matrix is in one `Mode`, and a `Form` may stand in for its factors. These methods go from one state to the next,
    and raise `ModelError` from any other than those named:

    | method | from | to |
    |---|---|---|
    | `fake_quantize(bits)` | floats, fake-quantized; no form | fake-quantized |
    | `quantize()` | floats, fake-quantized; no form | quantized |
    | `hold_floats()` | quantized; no form | fake-quantized |
    | `substitute(form)` | any mode; no form | that form over the same mode |
    | `restore()` | a form | the same mode without it |
    | `keep(selection)` | floats, fake-quantized; no form; nothing shared | fewer units |

    Args:
        spec: the structure of the matrix.
        shape: `(out, in)`.
        factors: the tensors to hold; without them new ones are drawn so that the entries of `W` have the variance of
            a fresh `nn.Linear`.
        shared: names of factors that other layers hold too, as the very same parameters.
        bits: of the integers in which the factors are stored, with scales; None for floats.
        device, dtype: for new tensors.

    Raises:
        ModelError: the shape does not admit the structure, or a factor is missing, extra or misshapen.
    """

    untrained: tuple[str, ...] = ()
    """Factors that were not trained when they were stored in integers, and will not be when they are floats again."""

    def __init__(
        self,
        spec: Structure,
        shape: Shape,
        factors: Factors | None = None,
        *,
        shared: Sequence[str] = (),
        bits: Bits | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        spec.check(shape, shared)
        self.shape, self.shared = shape, tuple(shared)
        self._mode, self._form = Mode.FLOATS if bits is None else Mode.QUANTIZED, None
        self.bits: Bits = bits or 8
        """Of integers, in which the factors are stored or to which they are rounded, if that is their mode."""
        self._in_int8: tuple[tuple[object, ...], Factors] | None = None
        self.register_load_state_dict_pre_hook(_check_incoming)
        if factors is not None:
            self._adopt(spec, factors)
        elif bits is not None:
            self._adopt(spec, _zeros(integers.stored(spec.tensors(shape), bits), device, dtype))
        else:
            self._adopt(spec, new_factors(spec, shape, device, dtype))
        if self.values.is_meta:
            return
        if factors is not None:
            self.check_factors()
        elif bits is None:
            with torch.no_grad():
                spec.initialize(self.factors, std=(3 * shape[1]) ** -0.5)

    @property
    def mode(self) -> Mode:
        """How the factors are stored and multiplied."""
        return self._mode

    @property
    def form(self) -> Form | None:
        """What stands in for the factors; None if they multiply themselves."""
        return self._form

    @property
    def quantized(self) -> bool:
        """Whether the factors are stored in integers."""
        return self._mode is Mode.QUANTIZED

    @property
    def fake_quantized(self) -> bool:
        """Whether float factors are rounded in the forward pass, for a training that is to end in integers."""
        return self._mode is Mode.FAKE_QUANTIZED

    def _require(self, what: str, *, floats: bool) -> None:
        """Raise `ModelError` unless the factors multiply themselves and are floats, or codes."""
        if self._form is not None:
            raise ModelError(f"{self.spec} {what} while a {type(self._form).__name__} stands in for it: finish() first")
        if self.quantized == floats:
            raise ModelError(
                f"{self.spec} {what}: it {f'is stored in int{self.bits}' if floats else 'holds floats'} already"
            )

    def _adopt(self, spec: Structure, factors: Mapping[str, Tensor]) -> None:
        expected = spec.tensors(self.shape)
        expected = integers.stored(expected, self.bits) if self.quantized else expected
        sizes = {name: tuple(tensor.shape) for name, tensor in factors.items()}
        wanted = {name: tensor.size for name, tensor in expected.items()}
        if sizes != wanted:
            raise ModelError(f"{spec} of a {self.shape[0]}x{self.shape[1]} matrix stores {wanted}, got {sizes}")
        self.spec, self._names, self._in_int8 = spec, tuple(expected), None
        for name, tensor in factors.items():
            if expected[name].dtype is not None:
                if name in dict(self.named_parameters(recurse=False)):
                    delattr(self, name)
                self.register_buffer(name, tensor)
            elif isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)  # tied layers hold the very same parameter
            else:
                self.register_parameter(name, nn.Parameter(tensor.contiguous()))
        self.fix_scales()

    def fix_scales(self) -> None:
        """Keep scales out of training: they belong to codes that stay as they are."""
        for name in self._names if self.quantized else ():
            if name.endswith(integers.SCALE):
                self.get_parameter(name).requires_grad_(False)

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Name, size and type of what is stored."""
        tensors = self.spec.tensors(self.shape)
        return integers.stored(tensors, self.bits) if self.quantized else tensors

    @property
    def factors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: getattr(self, name) for name in self._names}

    @property
    def sharing(self) -> tuple[str, ...]:
        """Names of all that a layer of this structure can have in common with others."""
        ends = integers.ENDS[self.bits] if self.quantized else ("",)
        return tuple(name + end for name in self.spec.shareable for end in ends)

    @property
    def values(self) -> Tensor:
        """A factor in the floating type of the layer: `weight`, or its scales."""
        return self.get_parameter("weight" + integers.SCALE if self.quantized else "weight")

    def fake_quantize(self, bits: Bits = 8) -> None:
        """Round float factors to integers in the forward pass from now on, for a training that is to end in these.

        Args:
            bits: of the integers.

        Raises:
            ModelError: the factors are in integers already, or a form stands in for them.
        """
        self._require("cannot be fake-quantized", floats=True)
        self._mode, self.bits = Mode.FAKE_QUANTIZED, bits

    def quantize(self, codes: Factors | None = None) -> None:
        """Store the factors in integers of `bits` from now on, which cannot be trained any further.

        Args:
            codes: codes and scales of the factors as they are stored, where other layers hold some of them too.

        Raises:
            ModelError: they are in integers already, or a form stands in for them.
        """
        self._require(f"cannot be stored in int{self.bits}", floats=True)
        codes = integers.quantize(self.factors, self.bits) if codes is None else codes
        self.untrained = tuple(n for n, t in self.factors.items() if t.is_floating_point() and not t.requires_grad)
        self._mode = Mode.QUANTIZED
        self._adopt(self.spec, codes)

    def hold_floats(self, values: Factors | None = None) -> None:
        """Hold the factors as floats again, fake-quantized: to train what was stored in integers.

        Args:
            values: the factors, where other layers hold some of them too.

        Raises:
            ModelError: they are floats already, or a form stands in for them.
        """
        self._require("cannot be turned into floats", floats=False)
        values = self.trainable() if values is None else values
        for name in self._names:
            delattr(self, name)
        self._mode = Mode.FAKE_QUANTIZED
        self._adopt(self.spec, values)
        for name in self.untrained:
            self.get_parameter(name).requires_grad_(False)

    def substitute(self, form: Form) -> None:
        """Let a form multiply in place of the factors.

        Raises:
            ModelError: another one does already.
        """
        if self._form is not None:
            raise ModelError(f"a {type(self._form).__name__} stands in for {self.spec} already: finish() that first")
        self._form = form

    def restore(self) -> None:
        """Let the factors multiply themselves again."""
        self._form = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactorizedMatrix:
        """Casts leave integers alone, as those of `Module.to(dtype)` do: `Module.type(dtype)` does not, and an index or
        a code in floats would mean nothing."""
        whole = {name: tensor for name, tensor in self.factors.items() if not tensor.is_floating_point()}
        super()._apply(fn, recurse)
        self._in_int8 = None
        for name, tensor in whole.items():
            if getattr(self, name).dtype != tensor.dtype:
                self.register_buffer(name, tensor.to(getattr(self, name).device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files hold what is stored, and not what products make of it."""
        return {**self.__dict__, "_in_int8": None}

    def check_factors(self) -> None:
        """Raise `ModelError` if integer factors are out of range; called on all tensors that come from outside."""
        self.spec.check_factors(self.shape, self.factors)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + bias`, `(..., in)` to `(..., out)`."""
        if self._form is not None:
            return self._form.matmul(x, bias)
        return self.spec.matmul(self.shape, self.multiplied, x, bias)

    def rows(self, index: Tensor) -> Tensor:
        """`W[index]`, integers `(...)` to `(..., in)`."""
        if self._form is not None:
            return self._form.rows(index)
        return self.spec.rows(self.shape, self.multiplied, index)

    def to_dense(self) -> Tensor:
        """`W`, `(out, in)`; nothing else builds it."""
        if self._form is not None:
            self._form.pack()
        return self.spec.to_dense(self.shape, self.multiplied)

    @property
    def multiplied(self) -> Factors:
        """The factors as products read them: floats, rounded to what will be stored or not, or int8 with scales."""
        if self.fake_quantized:
            return integers.Rounded(self.factors, self.bits)
        if not self.quantized or self.bits == 8:
            return self.factors
        if torch.compiler.is_compiling():  # a graph holds what the last product before it read
            held = self._in_int8
            return self._as_int8() if held is None else held[1]
        state = tuple(map(_state, self.factors.values()))
        if self._in_int8 is not None and self._in_int8[0] == state:
            return self._in_int8[1]
        made = self._as_int8()
        if unobserved():
            self._in_int8 = state, made
        return made

    def _as_int8(self) -> Factors:
        return integers.in_int8(self.factors, self.spec.tensors(self.shape), self.bits)

    def floats(self) -> Factors:
        """The values of the factors, however they are stored."""
        if self.quantized and self.bits != 8:
            return integers.restored(self.factors, self.spec.tensors(self.shape), self.bits)
        return integers.floats(self.factors)

    def trainable(self) -> Factors:
        """The values of factors in integers to go on training from: the same integers are made of them."""
        values = self.floats()
        if self.bits == 8:
            return values
        return {n: integers.settled(t, self.bits) if t.is_floating_point() else t for n, t in values.items()}

    def keep(self, selection: Selection) -> None:
        """Drop the units that `spec.select` left out; the rest stays bit for bit what it is.

        Raises:
            ModelError: other layers hold a factor too, the factors are stored in integers, or a form stands in for
                them.
        """
        self._require("cannot lose units", floats=True)
        if self.shared:
            raise ModelError(f"{self.spec} cannot lose units: other layers hold its {self.shared[0]} too")
        factors = {name: cut(getattr(self, name).detach()) for name, cut in selection.cut.items()}
        trainable = {name: getattr(self, name).requires_grad for name in factors}
        self._adopt(selection.spec, {**factors, **selection.fixed})
        for name, flag in trainable.items():
            getattr(self, name).requires_grad_(flag)

    def extra_repr(self) -> str:
        """Spec and shape, for `print(model)`."""
        return f"{self.spec}, shape={self.shape[0]}x{self.shape[1]}" + (f", int{self.bits}" if self.quantized else "")


def _state(tensor: Tensor) -> tuple[object, ...]:
    """Another one where a tensor holds other values."""
    return id(tensor), tensor.data_ptr(), version_of(tensor)


def _check_incoming(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuse integers out of range before they replace what the layer holds; sizes are for torch to compare."""
    assert isinstance(module, FactorizedMatrix)
    module._in_int8 = None
    factors = module.factors
    incoming = {name: state[prefix + name] for name in factors if isinstance(state.get(prefix + name), Tensor)}
    whole = module.tensors
    for name, tensor in incoming.items():
        if whole[name].dtype is not None and tensor.dtype != whole[name].dtype:
            raise ModelError(f"'{prefix}{name}' is stored as {tensor.dtype}, but has to be {whole[name].dtype}")
    # torch copies every tensor whose size is right, even if it raises for another.
    copied = {
        name: tensor
        for name, tensor in incoming.items()
        if not tensor.is_floating_point() and not tensor.is_meta and tensor.shape == factors[name].shape
    }
    if not copied or any(t.is_meta for n, t in (factors | copied).items() if whole[n].dtype is not None):
        return
    try:
        module.spec.check_factors(module.shape, factors | copied)
    except ModelError as error:
        raise ModelError(f"layer '{prefix.removesuffix('.')}': {error}" if prefix else str(error)) from error
