"""Encoders whose layers the compiled kernels know: all of them in one call, for inference on a CPU."""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.utils.generic import ModelOutput

from factorformer.hf import compat
from factorformer.hf.encoder_layout import MODELS, kind_of, layers_of, stacks_of
from factorformer.kernels import Dense, served
from factorformer.kernels.encoder import Encoder, EncoderLayer, Linear, Norm, Products, readable
from factorformer.layers._compat import Snapshot
from factorformer.layers.nn import FactorizedLinear

PLAIN = ("models.mpnet.", "models.distilbert.")
"""Where stacks return nothing but hidden states and attentions, no keys and values of the past."""

INDIFFERENT = ("position_ids", "use_cache", "return_dict")
"""Arguments of a stack that change nothing of what its layers make."""

CAPTURING = "output_capturing_hook"
"""The hook that transformers leaves behind where it once collected what layers make, and that does nothing else."""

ALIKE = (nn.Linear, FactorizedLinear, nn.LayerNorm)
"""Modules that do the same in training."""

# Asked in every pass, of every layer.
STATE = operator.attrgetter("mode", "bits", "form")
TRAINING = operator.attrgetter("training")
OWN_FORWARD = operator.methodcaller("__contains__", "forward")

DISTANCES = 512
"""Tokens up to which relative positions are laid out at first."""


def forwards_of(model: nn.Module, products: Products | None) -> dict[nn.Module, FusedForward | FusedModel]:
    """Forward passes in one call of such stacks, and of models around them.

    Args:
        model: its modules are looked at.
        products: in which type they are made; None for each as its matrix is stored.
    """
    stacks = {stack: FusedForward(stack, products) for stack in stacks_of(model) if _is_own(stack)}
    models: dict[nn.Module, FusedForward | FusedModel] = {}
    for module in model.modules():
        place, typed = MODELS.get(kind_of(module), ("", False))
        layers = stacks.get(getattr(module, place, module))
        if place and layers is not None and _is_own(module):
            models[module] = FusedModel(module, place, layers, typed=typed)
    return models | stacks


def _is_own(module: nn.Module) -> bool:
    """Whether nobody else has given a module another forward pass."""
    return isinstance(vars(module).get("forward"), (FusedForward, FusedModel, type(None)))


def _linear(layer: nn.Linear | FactorizedLinear) -> Linear:
    if isinstance(layer, nn.Linear):
        return Linear([Dense(layer.weight)], layer.bias)
    matrices = layer.spec.chain(layer.multiplied)
    known = matrices and readable(matrices, layer.in_features, layer.out_features)
    return Linear(matrices if known else [Dense(layer.to_dense())], layer.bias)


class FusedForward:
    """The forward pass of a stack of layers: in one call where the kernels serve, and its own otherwise.

    Its own it is in training, for other types and devices, where attention is to be anything but to all real tokens,
    and where somebody asks for what single layers make.

    Args:
        stack: the module.
        products: in which type they are made; None for each as its matrix is stored.
    """

    def __init__(self, stack: nn.Module, products: Products | None) -> None:
        self.stack: Any = stack
        self.products: Products | None = products
        self._made: _Made | None = None
        self._all_rows: tuple[int, int, Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"stack": self.stack, "products": self.products}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @property
    def encoder(self) -> Encoder | None:
        """What the kernels read; None before the first pass, and where they do not serve."""
        return None if self._made is None else self._made.encoder

    def __call__(self, hidden_states: Tensor, attention_mask: Any = None, *rest: Any, **others: Any) -> Any:
        """As the forward pass of the module."""
        found = None if rest else self.encoded(hidden_states, attention_mask, others)
        if found is None:
            return type(self.stack).forward(self.stack, hidden_states, attention_mask, *rest, **others)
        if others.get("return_dict") is False:
            return (found,)
        plain = kind_of(self.stack).startswith(PLAIN)
        return (BaseModelOutput if plain else BaseModelOutputWithPastAndCrossAttentions)(last_hidden_state=found)

    def encoded(self, x: Tensor, mask: Any, others: Mapping[str, Any]) -> Tensor | None:
        """What the layers make of hidden states `(batch, tokens, width)`; None where they have to do it themselves."""
        if torch.is_grad_enabled() or self.stack.training:
            self._made = None  # fused optimizers change weights, and no tensor tells
            return None
        if torch.compiler.is_compiling():
            return None
        if _asks(others) or x.dim() != 3:
            return None
        ready = self.ready(x, (x.shape[0], x.shape[1]), mask)
        if ready is None or ready[0].width != x.shape[2]:
            return None
        encoder, rows, starts = ready
        return encoder(x.reshape(-1, x.shape[2]).contiguous(), rows, starts).view(x.shape)

    def ready(self, like: Tensor, size: tuple[int, int], mask: Any) -> tuple[Encoder, Tensor, Tensor] | None:
        """The encoder, rows of real tokens, and where sequences begin in them; None where it does not serve.

        Args:
            like: of the type of hidden states, and where they are.
            size: sequences, and tokens of each.
            mask: see `_allowed`.
        """
        batch, length = size
        if not served(like) or not batch * length or compat.capturing():
            if not like.is_cpu or like.dtype != torch.float32:
                self._made = None  # whose weights are others now
            return None
        encoder = self._ready(length)
        if encoder is None:
            return None
        if mask is None:
            return encoder, *self._rows_of_all(batch, length)
        allowed = _allowed(mask, batch, length)
        if allowed is None or (encoder.reach and not _in_one_piece(allowed)):
            return None
        return encoder, allowed.flatten().nonzero().flatten(), F.pad(allowed.sum(1).cumsum(0), (1, 0))

    def _rows_of_all(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        known = self._all_rows
        if known is None or known[:2] != (batch, length):
            starts = torch.arange(batch + 1, device="cpu") * length
            self._all_rows = known = batch, length, torch.arange(batch * length, device="cpu"), starts
        return known[2:]

    def _ready(self, length: int) -> Encoder | None:
        """The encoder, made of the weights as they are; None where it cannot be, or single layers are watched."""
        made = self._made
        short = made is not None and 0 < made.encoder.reach < length
        if made is None or short or not made.of.holds() or made.states != _states(made.factorized):
            self._made = made = self._make(length)
        if made is None or made.of.hooked(CAPTURING):
            return None
        if any(map(TRAINING, made.dropping)) or any(map(OWN_FORWARD, made.inside)):
            return None  # which may drop something, or were given another forward pass
        return made.encoder

    def _make(self, length: int) -> _Made | None:
        layers = layers_of(self.stack)
        factorized = [m for m in self.stack.modules() if isinstance(m, FactorizedLinear)]
        if (
            not layers
            or any(layer.form is not None for layer in factorized)
            or not all(map(_plain, _tensors(self.stack)))
        ):
            return None
        bias, made_of = None, Snapshot(self.stack)
        if hasattr(self.stack, "relative_attention_bias"):  # MPNet's
            reach = max(length, DISTANCES)
            ahead = -torch.arange(-reach, reach + 1, device="cpu")
            bias = self.stack.relative_attention_bias(self.stack.relative_position_bucket(ahead)).T
        encoder = Encoder([_layer(parts) for parts in layers], layers[0]["heads"], self.products, bias)
        inside = [module for module in self.stack.modules() if module is not self.stack]
        dropping = [module for module in inside if type(module) not in ALIKE]
        return _Made(encoder, made_of, factorized, _states(factorized), [vars(module) for module in inside], dropping)


class FusedModel:
    """The forward pass of a model around such a stack, without what transformers does for the sake of other passes.

    Its own it is wherever the stack's is its own, where hidden states or attentions are asked for as well, and for
    inputs other than tokens, their types, and a mask of real ones.

    Args:
        model: one of `MODELS`.
        place: where its stack is.
        layers: the forward pass of that.
        typed: whether its tokens have types.
    """

    def __init__(self, model: nn.Module, place: str, layers: FusedForward, *, typed: bool) -> None:
        self.model: Any = model
        self.place = place
        self.layers = layers
        self.typed = typed
        own = inspect.signature(type(model).forward)  # by which others learn what the model reads
        self.__signature__ = own.replace(parameters=list(own.parameters.values())[1:])

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "place": self.place, "layers": self.layers, "typed": self.typed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __call__(self, *args: Any, **others: Any) -> Any:
        """As the forward pass of the module, also where it is made a method of it once more, as accelerate does."""
        return self._run(*(args[1:] if args and args[0] is self.model else args), **others)

    def _run(self, input_ids: Any = None, attention_mask: Any = None, *rest: Any, **others: Any) -> Any:
        found = None if rest else self._output(input_ids, attention_mask, others)
        if found is None:
            return type(self.model).forward(self.model, input_ids, attention_mask, *rest, **others)
        return found

    def _output(self, ids: Any, mask: Any, others: Mapping[str, Any]) -> ModelOutput | None:
        model, config, others = self.model, self.model.config, dict(others)
        types = {"token_type_ids": others.pop("token_type_ids", None)} if self.typed else {}
        dictionary = others.pop("return_dict", None)
        if _asks(others) or others.get("position_ids") is not None or dictionary is False:
            return None
        if torch.is_grad_enabled() or model.training or torch.compiler.is_compiling():
            return None
        stack = getattr(model, self.place)
        if stack is not self.layers.stack or vars(stack).get("forward") is not self.layers:  # it was replaced
            return None
        if config.output_hidden_states or config.output_attentions or not config.return_dict:
            return None
        if getattr(config, "is_decoder", False) or not isinstance(ids, Tensor) or ids.dim() != 2:
            return None
        if mask is not None and not (isinstance(mask, Tensor) and mask.is_cpu and mask.shape == ids.shape):
            return None
        whole = None if mask is None else mask[:, None, None].bool()
        ready = self.layers.ready(next(stack.parameters()), (ids.shape[0], ids.shape[1]), whole)
        if ready is None:
            return None
        x = model.embeddings(input_ids=ids, **types)
        if hasattr(model, "embeddings_project"):  # ELECTRA's
            x = model.embeddings_project(x)
        encoder, rows, starts = ready
        if not served(x) or x.shape != (*ids.shape, encoder.width):  # somebody has changed the embeddings
            return None
        y = encoder(x.reshape(-1, encoder.width).contiguous(), rows, starts).view(x.shape)
        plain = kind_of(model).startswith(PLAIN)
        if not hasattr(model, "pooler"):
            return (BaseModelOutput if plain else BaseModelOutputWithPastAndCrossAttentions)(last_hidden_state=y)
        pooled = None if model.pooler is None else model.pooler(y)
        kind = BaseModelOutputWithPooling if plain else BaseModelOutputWithPoolingAndCrossAttentions
        return kind(last_hidden_state=y, pooler_output=pooled)


def _asks(others: Mapping[str, Any]) -> bool:
    """Whether arguments ask for more than what layers make in the end, or for something else."""
    return any(value is not None and value is not False for name, value in others.items() if name not in INDIFFERENT)


class _Made(NamedTuple):
    """What the kernels read, and what it was made of."""

    encoder: Encoder
    of: Snapshot
    factorized: Sequence[FactorizedLinear]
    states: Sequence[tuple[Any, ...]]
    inside: Sequence[Mapping[str, Any]]
    dropping: Sequence[nn.Module]


def _states(layers: Sequence[FactorizedLinear]) -> list[tuple[Any, ...]]:
    """How factors are stored, rounded where they are multiplied, and what stands in for them."""
    return list(map(STATE, layers))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor keeps its values where its address says: other classes may keep them elsewhere."""
    known = tensor.is_cpu and tensor.dtype in (torch.float32, torch.int8, torch.uint8)
    return known and type(tensor) in (Tensor, nn.Parameter, nn.Buffer)


def _layer(parts: Mapping[str, Any]) -> EncoderLayer:
    parts = {name: part for name, part in parts.items() if name != "heads"}
    made: dict[str, Any] = {name: _linear(part) for name, part in parts.items() if not name.startswith("after")}
    made |= {name: Norm(p.weight, p.bias, p.eps) for name, p in parts.items() if name.startswith("after")}
    return EncoderLayer(**made)


def _in_one_piece(allowed: Tensor) -> bool:
    """Whether the real tokens of each sequence follow on each other."""
    begins = allowed[:, 1:] & ~allowed[:, :-1]
    return bool((begins.sum(1) + allowed[:, 0] <= 1).all())


def _allowed(mask: Any, batch: int, length: int) -> Tensor | None:
    """Which tokens are real, `(batch, length)`; None where queries see different ones, or some more than others."""
    if not isinstance(mask, Tensor) or not mask.is_cpu or not (mask.dtype == torch.bool or mask.is_floating_point()):
        return None
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or mask.shape[3] != length:
        return None
    first = mask[:, 0, 0]
    if mask.shape[2] > 1 and mask.stride(2) and not torch.equal(mask[:, 0], first[:, None].expand_as(mask[:, 0])):
        return None
    if mask.dtype != torch.bool:
        allowed = first == 0
        if not bool((allowed | (first <= torch.finfo(mask.dtype).min / 2)).all()):
            return None
        first = allowed
    return first.expand(batch, length)
