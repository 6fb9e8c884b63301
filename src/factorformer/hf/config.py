"""The `quantization_config` of a compressed model: every factorized layer, its structure, and what it shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, get_args, runtime_checkable

from torch import Tensor
from transformers.utils.quantization_config import QuantizationConfigMixin

from factorformer.errors import CheckpointError, FactorformerError
from factorformer.structures import Shape, Structure, TensorSpec, from_dict, integers
from factorformer.structures.integers import Bits

METHOD = "factorformer: run `import factorformer` before the model is loaded"
"""The name of the method in config.json. Where this package was not imported, transformers says first of all that it
does not know a method of this name, before it compares any weights."""

SHORT = "factorformer"
"""The name before."""

METHODS = (METHOD, SHORT)
FORMAT = 2
EQUAL_STEPS = 1
"""The format before, which says the same but for what values in 4 and 3 bits are."""

STORED: dict[str, Bits] = {f"int{bits}": bits for bits in get_args(Bits)}
"""The `values` of a layer whose factors are stored in integers with scales."""

FAKE = "fake_"
"""Begins the `values` of a layer whose factors are floats that every product rounds to such integers."""


def _in_few_bits(layer: Mapping[str, Any]) -> bool:
    return str(layer.get("values", "")).removeprefix(FAKE) in {name for name, bits in STORED.items() if bits != 8}


class FactorformerConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed model.

    Args:
        layers: for each factorized matrix, by module name, its `shape`, the fields of its structure, the names of
            modules `tied` to it, the name of the layer whose factors it `shares`, if it does, and its `values`:
            `int8`, `int4` or `int3` if its factors are stored so, `fake_int8` and so on for floats that products round
            to these (quantization-aware training), and nothing for plain floats.
        format: version of this description.

    Raises:
        CheckpointError: a description that this version cannot read.
    """

    def __init__(self, layers: Mapping[str, Mapping[str, Any]] | None = None, format: int = FORMAT, **_: Any) -> None:
        if format not in (FORMAT, EQUAL_STEPS):
            raise CheckpointError(
                f"the model was saved in format {format}, this version reads format {FORMAT} and most of "
                f"{EQUAL_STEPS}; a newer version may read it"
            )
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]  # a name, as for every plug-in
        self.format = FORMAT
        try:
            self.layers = {name: dict(layer) for name, layer in (layers or {}).items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"config.json describes no layers but {layers!r}") from error
        if format != FORMAT and any(map(_in_few_bits, self.layers.values())):
            raise CheckpointError(
                f"the model was saved in format {format}, of which this version reads nothing that is stored in 4 or 3 "
                "bits; compress the original again"
            )

    def structure(self, name: str) -> tuple[Structure, Shape]:
        """Spec and shape of a layer."""
        try:
            spec, shape = self._read(name)
            spec.check(shape, self.shared(name))
            owner = self.layers[name].get("shares")
            if owner is not None:
                self._check_sharing(name, spec, shape, owner)
        except (KeyError, IndexError, TypeError, FactorformerError) as error:
            raise CheckpointError(f"config.json describes layer '{name}' wrongly: {error}") from error
        return spec, shape

    def shared(self, name: str) -> tuple[str, ...]:
        """Names of the factors that a layer has in common with others, whether it owns them or not."""
        sharing = {owner for layer in self.layers.values() if isinstance(owner := layer.get("shares"), str)}
        if "shares" in self.layers[name] or name in sharing:
            return self._read(name)[0].shareable
        return ()

    def quantized(self, name: str) -> Bits | None:
        """Of how many bits the integers are in which the factors of a layer are stored; None for floats."""
        return STORED.get(self._values(name))

    def fake_quantized(self, name: str) -> Bits | None:
        """Of how many bits the integers are to which products round the factors of a layer; None for no rounding."""
        values = self._values(name)
        return STORED[values.removeprefix(FAKE)] if values.startswith(FAKE) else None

    def _values(self, name: str) -> str:
        values = self.layers[name].get("values") or ""
        allowed = [prefix + stored for prefix in ("", FAKE) for stored in STORED]
        if values not in ("", *allowed):
            raise CheckpointError(
                f"config.json gives layer '{name}' values of type {values!r}; allowed: {', '.join(allowed)}"
            )
        return values

    def tensors(self, name: str) -> dict[str, TensorSpec]:
        """Name, size and type of what is stored of a layer."""
        spec, shape = self.structure(name)
        bits = self.quantized(name)
        return spec.tensors(shape) if bits is None else integers.stored(spec.tensors(shape), bits)

    def _read(self, name: str) -> tuple[Structure, Shape]:
        layer = self.layers[name]
        shape = (int(layer["shape"][0]), int(layer["shape"][1]))
        others = ("shape", "tied", "shares", "values")
        return from_dict({key: value for key, value in layer.items() if key not in others}), shape

    def _check_sharing(self, name: str, spec: Structure, shape: Shape, owner: object) -> None:
        if not isinstance(owner, str) or owner not in self.layers or "shares" in self.layers[owner]:
            raise CheckpointError(f"it shares factors with {owner!r}, which is no layer that has some of its own")
        if self.quantized(owner) != self.quantized(name):
            raise CheckpointError(f"it shares factors with '{owner}', which stores them in another type")
        other, size = self._read(owner)
        if not spec.shareable or type(other) is not type(spec):
            raise CheckpointError(f"{spec} cannot share factors with '{owner}', which is {other}")
        for factor in spec.shareable:
            ours, theirs = spec.tensors(shape)[factor].size, other.tensors(size)[factor].size
            if ours != theirs:
                raise CheckpointError(f"its {factor} has the size {list(ours)}, that of '{owner}' {list(theirs)}")


@runtime_checkable
class Quantizer(Protocol):
    """What is asked of the plug-in's quantizer by those that it calls itself.

    Args:
        quantization_config: what its model's layers are.
        state_dict: what is being saved in the place of the model's own tensors, if anything is.
    """

    quantization_config: FactorformerConfig
    state_dict: dict[str, Tensor] | None
