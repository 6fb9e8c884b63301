"""What a compressed model is to do as its original does, where nothing but inputs are there to learn from."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from factorformer.tasks.evaluation import Pool, compare_embeddings, compare_predictions, pooled, real_tokens
from factorformer.training.distillation import logit_loss, mean_pool, pooled_loss


class Target(Protocol):
    """Outputs of a model, what is remembered of the original's, and how far the two are apart."""

    fields: ClassVar[tuple[str, ...]]
    """Of configurations, in which a model and the one that it learns from have to agree."""

    def read(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Float[Tensor, "rows outputs"]:
        """The outputs of a compressed model for a batch, float32."""
        ...

    def read_teacher(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Float[Tensor, "rows outputs"]:
        """Those of the original, in the type in which they are remembered."""
        ...

    def loss(self, found: Float[Tensor, "rows outputs"], wanted: Float[Tensor, "rows outputs"]) -> Float[Tensor, ""]:
        """What training makes small, 0 where the two do the same."""
        ...

    def distance(self, found: Float[Tensor, "rows outputs"], wanted: Float[Tensor, "rows outputs"]) -> float:
        """How far held-out rows are apart, from 0 to about 1: it chooses a learning rate, and the closest point."""
        ...

    def compare(self, wanted: Float[Tensor, "rows outputs"], found: Float[Tensor, "rows outputs"]) -> dict[str, float]:
        """Metrics that say what this is worth, of held-out rows."""
        ...


@dataclasses.dataclass(frozen=True)
class Embeddings:
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

    def loss(self, found: Tensor, wanted: Tensor) -> Tensor:
        """One minus the mean cosine."""
        return pooled_loss(found, wanted.float())

    def distance(self, found: Tensor, wanted: Tensor) -> float:
        """The same."""
        return float(self.loss(found, wanted))

    def compare(self, wanted: Tensor, found: Tensor) -> dict[str, float]:
        """See `compare_embeddings`."""
        return compare_embeddings(wanted, found)


@dataclasses.dataclass(frozen=True)
class Predictions:
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

    def loss(self, found: Tensor, wanted: Tensor) -> Tensor:
        """The divergence of the two predictions, or the squared error of scores."""
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
