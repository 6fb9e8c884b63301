"""The Hugging Face `Trainer` as every training here uses it: settings, progress, seeds, precision."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import TrainOutput

from factorformer.errors import DivergedError, MethodError
from factorformer.hf.compat import own_forward
from factorformer.hf.source import most_tokens
from factorformer.layers.embeddings import embeddings_of
from factorformer.layers.modes import fast_attention, fast_float32, requiring_gradients
from factorformer.progress import Progress

_POSITIVE = (lambda number: 0 < number < math.inf, "a finite number above 0")
_NOT_NEGATIVE = (lambda number: 0 <= number < math.inf, "a finite number of at least 0")
_COUNT = (lambda number: number >= 1, "at least 1")
_FRACTION = (lambda number: 0 <= number < 1, "a fraction of at least 0 and below 1")

ALLOWED: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(("epochs", "clip", "minutes"), _POSITIVE),
    **dict.fromkeys(("learning_rate", "weight_decay"), _NOT_NEGATIVE),
    **dict.fromkeys(("batch_size", "steps", "points"), _COUNT),
    **dict.fromkeys(("warmup", "label_smoothing", "adam_beta2"), _FRACTION),
}
"""Values of the numbers among all settings."""


MULTIPLE = 8
"""Of tokens, which batches in bfloat16 are padded to."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is trained, dense or compressed; what it learns adds its own.

    Args:
        epochs: passes over the training data.
        learning_rate: peak of a linear schedule with warm-up; None leaves it to trainings that choose one.
        batch_size: rows in a step, of similar length.
        seed: of initialization, order and dropout.
        warmup: fraction of all steps in which the learning rate rises.
        weight_decay: of AdamW, on matrices and factors.
        precision: of matrix products; parameters and optimizer stay in their own. fp16 needs a GPU.

    Raises:
        MethodError: a setting is not allowed; the message names it, its value and what is.
    """

    chooses_rate: ClassVar[bool] = False
    epochs: float = 3.0
    learning_rate: float | None = 1e-4
    batch_size: int = 32
    seed: int = 0
    warmup: float = 0.1
    weight_decay: float = 0.01
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    def __post_init__(self) -> None:
        for name, (holds, allowed) in ALLOWED.items():
            value = getattr(self, name, None)
            missing = name == "learning_rate" and value is None and not self.chooses_rate
            if missing or (value is not None and not holds(value)):
                raise MethodError(f"{name.replace('_', ' ')} has to be {allowed}; got {value}")

    def multiple(self, model: PreTrainedModel, data: datasets.Dataset) -> int | None:
        """What the lengths of batches should be multiples of; None where that gains nothing.

        oneDNN, which multiplies in bfloat16 on CPUs, prepares each product for the sizes of its factors, and forgets
        what it prepared where there are many: steps of MiniLM on short sentences take a sixth less with few lengths.

        Args:
            model: that is trained.
            data: encoded rows, which have to stay within the positions of the model.
        """
        if self.precision != "bf16" or model.device.type != "cpu":
            return None
        lengths = data["length"] if "length" in data.column_names else map(len, data["input_ids"])
        positions, longest = most_tokens(model), max(lengths)
        fits = positions is None or -(-longest // MULTIPLE) * MULTIPLE <= positions
        return MULTIPLE if fits else None

    def arguments(self, output: str | Path, *, on_cpu: bool, **others: Any) -> TrainingArguments:
        """The settings in the Trainer's terms.

        Args:
            output: directory of checkpoints.
            on_cpu: leave a GPU alone.
            others: further arguments.
        """
        assert self.learning_rate is not None
        return TrainingArguments(
            output_dir=str(output),
            num_train_epochs=self.epochs,
            learning_rate=self.learning_rate,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size,
            seed=self.seed,
            data_seed=self.seed,
            warmup_steps=self.warmup,
            weight_decay=self.weight_decay,
            bf16=self.precision == "bf16",
            fp16=self.precision == "fp16",
            use_cpu=on_cpu,
            optim="adamw_torch_fused",
            logging_nan_inf_filter=False,  # which would report a finite loss for a run that diverged
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=not on_cpu,
            **others,
        )


class FastTrainer(Trainer):
    """A `Trainer` whose attention is fast on short texts as well, and whose model may follow a teacher."""

    teacher: PreTrainedModel | None = None

    def follow(self, teacher: PreTrainedModel | None) -> None:
        """Keep a teacher, if there is one, in evaluation mode where the model is; the loss is a mean over the batch."""
        self.teacher = teacher
        if teacher is not None:
            nn.Module.to(teacher.eval(), self.args.device)
        self.model_accepts_loss_kwargs = False  # so that the Trainer divides it by the accumulation steps

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """A forward and a backward pass."""
        tokens = max((x.shape[1] for x in inputs.values() if isinstance(x, torch.Tensor) and x.dim() > 1), default=0)
        with fast_attention(self.args.device, tokens, rounded=self.args.bf16):
            return super().training_step(model, inputs, *args, **kwargs)


class Watch(TrainerCallback):
    """Reports progress, and stops a training whose loss is not finite."""

    def __init__(self, progress: Progress, phase: str) -> None:
        self.progress, self.phase = progress, phase

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Progress in steps; the loss of the last ones is logged as well."""
        self.progress(self.phase, state.global_step, state.max_steps)
        if state.global_step == state.max_steps:
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Raise `DivergedError` if the loss since the last log is not finite."""
        loss = others["logs"].get("loss", 0.0)
        if not math.isfinite(loss):
            raise diverged(f"loss {loss}", args, state)


def diverged(how: str, args: TrainingArguments, state: TrainerState) -> DivergedError:
    """The error that ends a training of no use."""
    return DivergedError(
        f"training diverged by step {state.global_step} ({how}): lower the learning rate {args.learning_rate:g}"
    )


def run(trainer: Trainer, checkpoint: Path | None = None) -> TrainOutput:
    """Train, from a checkpoint if there is one; nothing is printed, and the model's `forward` is its own afterwards."""
    trainer.remove_callback(PrinterCallback)
    assert isinstance(trainer.model, nn.Module)
    with own_forward(trainer.model), fast_float32(trainer.args.device):
        return trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch for a while; afterwards they are as they were.

    >>> before = torch.get_rng_state()
    >>> with seeded(3):
    ...     first = torch.rand(1)
    >>> with seeded(3):
    ...     assert torch.equal(torch.rand(1), first)
    >>> torch.equal(torch.get_rng_state(), before)
    True
    """
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            set_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


@contextlib.contextmanager
def frozen_embeddings(model: PreTrainedModel, frozen: bool) -> Iterator[None]:
    """Word embeddings without gradients, for as long as training lasts; tied output heads stay frozen with them.

    Factorized embeddings are trained even so: the fit has just damaged them, and they have to recover.
    """
    embeddings = embeddings_of(model, "input_embeddings")
    frozen = frozen and isinstance(embeddings, nn.Embedding)
    with requiring_gradients(embeddings.parameters() if frozen and embeddings is not None else (), False):
        yield


def in_full_precision(model: nn.Module) -> Callable[[], None]:
    """Turn values that are stored in 16 bits into float32, in place, to train on.

    Args:
        model: its layers may be factorized before what is returned is called.

    Returns:
        What turns the values of each layer back into the type that the layer had.
    """
    types: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        for key, tensor in _values(module):
            types.setdefault(name, tensor.dtype)
            types[f"{name}.{key}"] = tensor.dtype
    for module in model.modules():
        for _, tensor in _values(module):
            if tensor.dtype.itemsize < 4:
                tensor.data = tensor.data.float()

    def restore() -> None:
        for name, module in model.named_modules():
            for key, tensor in _values(module):
                dtype = types.get(f"{name}.{key}", types.get(name, tensor.dtype))
                if tensor.dtype != dtype:
                    tensor.grad = None
                    tensor.data = tensor.data.to(dtype)

    return restore


def _values(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Floating tensors of a module itself."""
    for named in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
        yield from ((name, tensor) for name, tensor in named if tensor.is_floating_point())
