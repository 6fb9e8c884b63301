"""What a compressed model is to do as its original does, where nothing but inputs are there to learn from."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, Protocol

import datasets
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorformer.errors import DataError
from factorformer.tasks import language_modelling
from factorformer.tasks.evaluation import Pool, compare_embeddings, compare_predictions, pooled, read_all, real_tokens
from factorformer.training.distillation import logit_loss, mean_pool, pooled_loss

Judge = Callable[[PreTrainedModel, PreTrainedTokenizerBase | None, datasets.Dataset], tuple[dict[str, float], float]]
"""Metrics of a compressed model on held-out rows, as its tokenizer reads them, and its distance from the original: it
chooses a learning rate, and the closest point."""


class Target(Protocol):
    """Outputs of a model, what is remembered of the original's, and how far the two are apart."""

    fields: ClassVar[tuple[str, ...]]
    """Of configurations, in which a model and the one that it learns from have to agree."""

    remembers: ClassVar[bool]
    """Whether what the original makes of a row is small enough to be remembered."""

    def read(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Float[Tensor, "rows outputs"]:
        """The outputs of a compressed model for a batch."""
        ...

    def read_teacher(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Float[Tensor, "rows outputs"]:
        """Those of the original, in the type in which they are remembered."""
        ...

    def loss(
        self,
        found: Float[Tensor, "rows outputs"],
        wanted: Float[Tensor, "rows outputs"] | None,
        inputs: Mapping[str, Any],
    ) -> Float[Tensor, ""]:
        """What training makes small; outputs that are wanted are None where there is nobody to ask."""
        ...

    def judge(
        self, teacher: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None, held: datasets.Dataset
    ) -> Judge:
        """What compares a model with its original, which reads the held-out rows in its own way."""
        ...


class Remembered(abc.ABC):
    """A target whose outputs are a vector for each row."""

    remembers: ClassVar[bool] = True

    @abc.abstractmethod
    def read(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Float[Tensor, "rows outputs"]:
        """See `Target`."""

    @abc.abstractmethod
    def read_teacher(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Float[Tensor, "rows outputs"]:
        """See `Target`."""

    @abc.abstractmethod
    def distance(self, found: Float[Tensor, "rows outputs"], wanted: Float[Tensor, "rows outputs"]) -> float:
        """How far held-out rows are apart, from 0 to about 1."""

    @abc.abstractmethod
    def compare(self, wanted: Float[Tensor, "rows outputs"], found: Float[Tensor, "rows outputs"]) -> dict[str, float]:
        """Metrics that say what this is worth, of held-out rows."""

    def judge(
        self, teacher: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None, held: datasets.Dataset
    ) -> Judge:
        """By the outputs of the original, which is asked once."""
        assert teacher is not None
        wanted = read_all(partial(self.read_teacher, teacher), teacher, tokenizer, held)

        def judge(
            model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, held: datasets.Dataset
        ) -> tuple[dict[str, float], float]:
            made = read_all(partial(self.read, model), model, tokenizer, held)
            # Not by metrics: correlations do not tell of an offset, and agreement of few rows moves in steps.
            return self.compare(wanted, made), self.distance(made, wanted)

        return judge


@dataclasses.dataclass(frozen=True)
class Embeddings(Remembered):
    """Embeddings of an encoder of text, images or sound: the loss is one minus their mean cosine.

    Args:
        pool: what users of the compressed model make of its hidden states; by default the mean over real tokens.
        teacher_pool: the same of the original, if that is another.
    """

    fields: ClassVar[tuple[str, ...]] = ("vocab_size", "hidden_size")
    pool: Pool = mean_pool
    teacher_pool: Pool | None = None

    @contextlib.contextmanager
    def shown(self, model: PreTrainedModel) -> Iterator[None]:
        """While this lasts, the model's outputs tell what is made of its hidden states, as `sentence_embedding`.

        Plans and fits go by that, and else by the mean, of which they know without being told.
        """

        def add(module: PreTrainedModel, args: tuple[Any, ...], inputs: Mapping[str, Any], output: Any) -> None:
            states = getattr(output, "last_hidden_state", None)
            if states is not None:
                output["sentence_embedding"] = self.pool(states, real_tokens(states, inputs))

        hook = None if self.pool is mean_pool else model.register_forward_hook(add, with_kwargs=True)
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()

    def read(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """Pooled hidden states."""
        return pooled(model, inputs, self.pool)

    def read_teacher(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """The same of norm 1, in float16."""
        return F.normalize(pooled(model, inputs, self.teacher_pool or self.pool), dim=1).half()

    def loss(self, found: Tensor, wanted: Tensor | None, inputs: Mapping[str, Any]) -> Tensor:
        """One minus the mean cosine."""
        assert wanted is not None
        return pooled_loss(found, wanted.float())

    def distance(self, found: Tensor, wanted: Tensor) -> float:
        """The same."""
        return float(self.loss(found, wanted, {}))

    def compare(self, wanted: Tensor, found: Tensor) -> dict[str, float]:
        """See `compare_embeddings`."""
        return compare_embeddings(wanted, found)


@dataclasses.dataclass(frozen=True)
class Predictions(Remembered):
    """Scores or classes of a model with a head, such as a cross-encoder.

    Args:
        independent: classes do not exclude each other.
    """

    fields: ClassVar[tuple[str, ...]] = ("vocab_size", "num_labels")
    independent: bool = False

    def read(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """Logits."""
        return model(**inputs).logits.float()

    def read_teacher(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """Logits."""
        return self.read(model, inputs)

    def loss(self, found: Tensor, wanted: Tensor | None, inputs: Mapping[str, Any]) -> Tensor:
        """The divergence of the two predictions, or the squared error of scores."""
        assert wanted is not None
        return logit_loss(found, wanted, temperature=1.0, independent=self.independent)

    def distance(self, found: Tensor, wanted: Tensor) -> float:
        """Half of the squared error of logits, relative to their variance.

        Of vectors of norm 1, as embeddings are compared, half of the squared error is one minus the cosine.
        """
        if found.shape[1] > 1 and not self.independent:  # classes do not depend on what is added to all logits
            found, wanted = (logits - logits.mean(1, keepdim=True) for logits in (found, wanted))
        spread = (wanted - wanted.mean(0)).square().sum().clamp_min(torch.finfo(wanted.dtype).tiny)
        return float((found - wanted).square().sum() / spread) / 2

    def compare(self, wanted: Tensor, found: Tensor) -> dict[str, float]:
        """See `compare_predictions`."""
        return compare_predictions(wanted, found, independent=self.independent)


@dataclasses.dataclass(frozen=True)
class NextTokens:
    """What a causal language model goes on with: as the original would, or as the text itself does.

    Args:
        divergence: weight of KL(original || model) of next tokens, in nats.
        likelihood: weight of the negative log-likelihood of the text, likewise.
    """

    fields: ClassVar[tuple[str, ...]] = ("vocab_size",)
    remembers: ClassVar[bool] = False
    divergence: float = 1.0
    likelihood: float = 0.0

    def read(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """Logits wherever a token follows."""
        return model(**inputs, use_cache=False).logits[:, :-1][self._followed(inputs)]

    def read_teacher(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """The same."""
        return self.read(model, inputs)

    def loss(self, found: Tensor, wanted: Tensor | None, inputs: Mapping[str, Any]) -> Tensor:
        """The weighted sum of both; without an original the second alone, whatever its weight.

        A few places at a time: in the backward pass each part is computed again, so that nothing but logits is kept.
        """
        ids, places = inputs["input_ids"][:, 1:][self._followed(inputs)], language_modelling.PLACES
        known = [None] * len(ids.split(places)) if wanted is None else wanted.split(places)
        parts = zip(found.split(places), known, ids.split(places), strict=True)
        return torch.stack([checkpoint(self._sum, *part, use_reentrant=False) for part in parts]).sum() / len(ids)

    def _sum(self, found: Tensor, wanted: Tensor | None, ids: Tensor) -> Tensor:
        found, total = found.float(), torch.zeros((), device=found.device)
        if wanted is not None and self.divergence > 0:
            total = total + self.divergence * logit_loss(found, wanted.float(), temperature=1.0) * len(ids)
        if wanted is None or self.likelihood > 0:
            total = total + (self.likelihood or 1.0) * F.cross_entropy(found, ids, reduction="sum")
        return total

    def judge(
        self, teacher: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None, held: datasets.Dataset
    ) -> Judge:
        """By perplexity, and by divergence where there is an original."""
        if tokenizer is None:
            raise DataError("a language model is compared on text: give its tokenizer (tokenizer=)")

        def judge(
            model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, held: datasets.Dataset
        ) -> tuple[dict[str, float], float]:
            assert tokenizer is not None
            found = language_modelling.predict(model, tokenizer, held, "causal", 1, original=teacher)
            names = ("perplexity", *(("next_token_divergence", "next_token_agreement") if teacher is not None else ()))
            return {name: found[name] for name in names}, found["loss" if teacher is None else "next_token_divergence"]

        return judge

    @staticmethod
    def _followed(inputs: Mapping[str, Any]) -> Tensor:
        mask = inputs["attention_mask"].bool()
        return mask[:, 1:] & mask[:, :-1]
