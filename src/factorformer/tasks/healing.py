"""Healing: a compressed model learns from inputs alone to embed, or to score, as the original does."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from factorformer.errors import DataError, ModelError
from factorformer.hf.callbacks import moving
from factorformer.hf.compat import use_one_gpu
from factorformer.hf.description import describe
from factorformer.hf.fused import in_one_call
from factorformer.layers.embeddings import embeddings_of
from factorformer.layers.modes import requiring_gradients
from factorformer.layers.nn import FactorizedMatrix
from factorformer.progress import Progress, silent
from factorformer.tasks.checkpoints import FILES, check_same_run, last_checkpoint, locked
from factorformer.tasks.closest import Closest
from factorformer.tasks.data import check_lengths, collator, hold_out
from factorformer.tasks.evaluation import read_all
from factorformer.tasks.reproducible import ReproducibleTrainer, finish
from factorformer.tasks.targets import Embeddings, Target
from factorformer.tasks.trainer import Settings, Watch, frozen_embeddings, seeded
from factorformer.training.dynamic_rank import DynamicRank
from factorformer.training.rank_checkpoint import STATE
from factorformer.training.straight_through import StraightThrough

ROW = "row"
"""The column of the number of a row, by which what the original made of it is remembered."""

ENDLESS = 10**9
"""Steps of a training that time ends."""

WARMING = 20
"""Steps in which the learning rate rises at least, however short the training: the first ones of Adam are as long
whatever gradients say."""

FASTEST = 5e-4
"""The peak of the learning rate, unless one is given, for a model that is far from the original. One that is near
learns more slowly, by the root of its distance: what a good fit left to learn is little beside what long steps
disturb."""

FAR = 0.1
"""The distance from which on this is the rate: of embeddings one minus their cosine."""

WIDTH = 384
"""Of hidden states, up to which these rates serve; beyond they fall as it grows (Yang et al., arXiv 2203.03466)."""

DEPTH = 6
"""Layers, likewise; beyond, rates fall with the root of their number (Yang et al., arXiv 2310.02244)."""

REMEMBERED = 2**32
"""Bytes of the original's outputs that are remembered; for further rows it is asked each time."""


@dataclasses.dataclass(frozen=True)
class HealingSettings(Settings):
    """How a compressed model is healed; see `Settings` for the rest.

    Args:
        learning_rate: peak of a linear schedule with warm-up; None sets it by how far the model is from the original
            before training, and how wide and deep it is.
        minutes: of training, what is measured and saved on the way included; if given, `epochs` does not count, and
            the learning rate falls with time.
        points: at which held-out rows are compared and a checkpoint is written.
        freeze_embeddings: leave dense tables of word embeddings as they are; factorized ones are trained in any case.
    """

    chooses_rate: ClassVar[bool] = True
    learning_rate: float | None = None
    batch_size: int = 128
    warmup: float = 0.03
    minutes: float | None = None
    points: int = 10
    freeze_embeddings: bool = True


@dataclasses.dataclass(frozen=True)
class Reading:
    """The same rows as the teacher reads them, whose vocabulary is another.

    Args:
        tokenizer: of the teacher.
        data: to learn on, in the same order.
        held: to compare on, likewise.
    """

    tokenizer: PreTrainedTokenizerBase
    data: datasets.Dataset
    held: datasets.Dataset

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Some rows of the data."""
        names = [name for name in self.data.column_names if name != "length"]
        chosen = self.data.select_columns(names)
        return dict(collator(self.tokenizer, chosen)([chosen[row] for row in rows.tolist()]))

    def check(self, teacher: PreTrainedModel, data: datasets.Dataset, held: datasets.Dataset) -> None:
        """Raise `DataError` where these are not the rows of the model, or not such as the teacher can read."""
        if (len(self.data), len(self.held)) != (len(data), len(held)):
            raise DataError("the teacher reads other rows than the model: give `reading` and `held` of the same ones")
        check_lengths(teacher, self.data, "what the teacher reads")
        check_lengths(teacher, self.held, "what the teacher reads")


class HealingTrainer(ReproducibleTrainer):
    """A `Trainer` whose model is to do with rows as a teacher does.

    What the teacher makes of a row is remembered: in a second epoch it is not asked again.

    Args:
        teacher: kept in evaluation mode; it reads the same inputs.
        target: which outputs are compared, and how.
        settings: of the training.
        rows: of the training data, numbered in the column `ROW`.
        measure: the metrics of the model as it is, after so many steps and seconds.
        reading: what the teacher reads, if that is not what the model does.
        one_call: whether the teacher's layers run in one call, which makes products in its own way.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel,
        target: Target,
        settings: HealingSettings,
        rows: int,
        measure: Callable[[int, float], dict[str, float]],
        reading: Reading | None,
        one_call: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.follow(teacher)
        self.target, self.settings, self.measure, self.reading = target, settings, measure, reading
        self.one_call = one_call
        self.remembered: Tensor | None = None
        self.known = torch.zeros(rows, dtype=torch.bool)
        use_one_gpu(self.args)  # several would each need their part of what is remembered

    @property
    def part(self) -> float:
        """How much of the training is over, 0 to 1."""
        if self.settings.minutes is not None:
            return min(self.clock.seconds / (60 * self.settings.minutes), 1.0)
        return self.state.global_step / max(self.state.max_steps, 1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """How far what the model makes of a batch is from what the teacher does."""
        model.eval()  # no dropout: outputs are compared as users get them
        student = self.accelerator.unwrap_model(model)
        assert isinstance(student, PreTrainedModel)
        known = dict(inputs)
        rows = known.pop(ROW).cpu()
        with self._products():
            found = self.target.read(student, known)
        loss = self.target.loss(found, self._wanted(rows, known))
        return (loss, {"outputs": found}) if return_outputs else loss

    def _products(self) -> contextlib.AbstractContextManager[object]:
        """The precision that the Trainer asks for is that of the whole model's forward pass, and not met by a part."""
        precision = self.settings.precision
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(self.args.device.type, dtype, enabled=precision != "fp32")

    def _wanted(self, rows: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        if self.remembered is not None and bool(self.known[rows].all()):
            return self.remembered[rows].to(self.args.device)
        if self.reading is not None:
            inputs = {name: value.to(self.args.device) for name, value in self.reading.batch(rows).items()}
        called = self.one_call and self.teacher.device.type == "cpu"
        with torch.no_grad(), contextlib.nullcontext() if called else self._products():
            made = self.target.read_teacher(self.teacher, inputs)
        if self.remembered is None:
            most = REMEMBERED // (made.element_size() * made.shape[1])
            self.remembered = torch.empty(min(len(self.known), most), made.shape[1], dtype=made.dtype)
        kept = rows < len(self.remembered)
        self.remembered[rows[kept]], self.known[rows[kept]] = made.cpu()[kept], True
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Linear, with warm-up, by what part of the training is over."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            assert isinstance(optimizer, torch.optim.Optimizer)
            warmup = max(self.settings.warmup, 1e-6)

            def rate(step: int) -> float:
                part = self.part
                return max(min((part + warmup / 100) / warmup, (1 - part) / (1 - warmup), (step + 1) / WARMING), 0.0)

            self.lr_scheduler = LambdaLR(optimizer, rate)
        assert isinstance(self.lr_scheduler, LambdaLR)
        return self.lr_scheduler

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Compare what is made of held-out rows with what the teacher makes of them."""
        metrics = self.measure(self.state.global_step, self.clock.seconds)
        return self.measured({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})


class _Points(TrainerCallback):
    """Measures, and saves if asked to, at regular parts of a training, and ends it when its time is over."""

    def __init__(self, trainer: HealingTrainer, progress: Progress, phase: str, *, saves: bool) -> None:
        self.trainer, self.progress, self.phase, self.saves = trainer, progress, phase, saves
        self.done = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done = math.floor(self.trainer.part * self.trainer.settings.points)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        part, minutes = self.trainer.part, self.trainer.settings.minutes
        if minutes is not None:
            self.progress(self.phase, min(int(self.trainer.clock.seconds), int(60 * minutes)), int(60 * minutes))
            state.max_steps = math.ceil(state.global_step / part) + 1  # by which ranks move
        if part >= 1:
            control.should_training_stop = True
        if math.floor(part * self.trainer.settings.points) > self.done:
            self.done = math.floor(part * self.trainer.settings.points)
            control.should_log = control.should_evaluate = True
            control.should_save = self.saves


def heal(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    data: datasets.Dataset,
    settings: HealingSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    held: datasets.Dataset | None = None,
    target: Target | None = None,
    output: Path | None = None,
    straight: StraightThrough | None = None,
    ranks: DynamicRank | None = None,
    report: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
    phase: str = "train",
    reading: Reading | None = None,
) -> list[dict[str, float]]:
    """Train a compressed model in place to do as the original does: no labels, nothing but inputs.

    What is learned are embeddings, of text, images or sound, or the scores of a cross-encoder (`target`). Integers have
    to be held as floats (`compress(..., hold_floats=True)`); `quantize` makes them integers afterwards. A run that was
    interrupted goes on from the last checkpoint in `output`. Where nothing but values is trained, what is left is the
    model as it was when it was closest to the original, of all points at which they were compared, the one before
    training among them.

    Args:
        model: compressed.
        teacher: the original.
        data: inputs to learn on: text from `tasks.data.encode`, or rows of other inputs of the model, all of one size.
        settings: see `HealingSettings`.
        tokenizer: of the model, for the padding of text.
        held: rows on which the two are compared on the way, and nothing else; by default a part of the data.
        target: what is learned; by default mean-pooled embeddings.
        output: directory of checkpoints; none are kept without one.
        straight: made of the model, if it trains straight through; finished at the end.
        ranks: made of the model, if its ranks are found in training; finished at the end.
        report: told in one line how similar the two are, at each point.
        progress: progress callback, in steps, or in seconds where time ends the training.
        phase: name of the phase reported to `progress`.
        reading: what the teacher reads, if its vocabulary is another; `held` has to be given then.

    Returns:
        The curve, one row for each point: `step`, `seconds`, and the metrics of the target; and one more of an earlier
        step if what came after it was undone.

    Raises:
        DataError: texts longer than the model can read, or of different lengths without a tokenizer, or too few rows to
            hold some out.
        ModelError: factors are stored in integers.
        DivergedError: the loss became NaN or infinite.
        OutputError: `output` holds what a run with other settings has kept, or another process trains into it.
    """
    settings, target = settings or HealingSettings(), target or Embeddings()
    if data.format["type"] == "custom":
        raise DataError("rows are transformed when they are read (with_transform), and cannot be numbered: use map")
    if held is None:
        data, held = hold_out(data, settings.seed, "held=")
    _check_trainable(model)
    if tokenizer is not None:
        check_lengths(model, data, "the training data")
        check_lengths(model, held, "the held-out texts")
    elif "input_ids" in data.column_names and len(set(map(len, data["input_ids"]))) > 1:
        raise DataError("texts of different lengths have to be padded: give the tokenizer of the model (tokenizer=)")
    if reading is not None:
        reading.check(teacher, data, held)
    theirs = (tokenizer, held) if reading is None else (reading.tokenizer, reading.held)
    wanted = read_all(partial(target.read_teacher, teacher), teacher, *theirs)
    closest = None if straight or ranks else Closest(model, output)
    distance = math.inf

    def measure(step: int, seconds: float) -> dict[str, float]:
        nonlocal distance
        made = read_all(partial(target.read, model), model, tokenizer, held)
        # Not by metrics: correlations do not tell of an offset, and agreement of few rows moves in steps.
        found, apart = target.compare(wanted, made), target.distance(made, wanted)
        distance = math.inf if math.isnan(apart) else apart
        values = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items())
        report(f"{phase}: after {seconds / 60:.1f} minutes {values} (among {len(held)} held-out rows)")
        if closest is not None:
            closest.see(step, found, distance)
        return found

    an_epoch = math.ceil(len(data) / settings.batch_size)
    steps = ENDLESS if settings.minutes is not None else math.ceil(settings.epochs * an_epoch)
    numbered = data.add_column(ROW, list(range(len(data))))
    if "length" not in data.column_names:
        numbered = numbered.add_column("length", [1] * len(data))
    description: dict[str, Any] = {**dataclasses.asdict(settings), "rows": len(data), "target": type(target).__name__}
    description |= {"data": _digest(data), "held": _digest(held)}
    del description["precision"]  # which the processor decides, and another may go on
    if ranks is None:  # which change them
        description["layers"] = _digest_of(describe(model).layers)
    else:
        description[FILES] = [STATE]
    acting: list[TrainerCallback] = [Watch(silent if settings.minutes is not None else progress, phase)]
    acting += moving(straight, ranks)
    table = embeddings_of(model, "input_embeddings")
    frozen = settings.freeze_embeddings and (ranks is None or table is None or not ranks.holds(table))
    keeping = tempfile.TemporaryDirectory() if output is None else contextlib.nullcontext(output)
    with (
        keeping as place,
        locked((folder := Path(place)) / ".lock"),
        seeded(settings.seed),
        frozen_embeddings(model, frozen),
        requiring_gradients(teacher.parameters(), False),
        in_one_call(teacher, "bfloat16" if settings.precision == "bf16" else None) as one_call,
    ):
        check_same_run(folder, description)
        begun = last_checkpoint(folder)
        if closest is not None and closest.load():
            distance = closest.start
            if begun is None:
                closest.restore()
        elif begun is None:
            measure(0, 0.0)
        if settings.learning_rate is None:
            # Ranks start from the whole model, which has no distance yet.
            rate = _rate(model, math.inf if ranks is not None else distance)
            settings = dataclasses.replace(settings, learning_rate=rate)
            if begun is None or closest is not None:  # others go on with the rate of their checkpoint
                report(f"{phase}: learning rate {rate:.2g}")
        trainer = HealingTrainer(
            model=model,
            args=settings.arguments(
                folder,
                on_cpu=model.device.type == "cpu",
                max_steps=steps,
                max_grad_norm=1.0,
                remove_unused_columns=False,
                logging_strategy="no",
                eval_strategy="no",
                save_strategy="no",
                save_total_limit=2,
            ),
            train_dataset=numbered,
            data_collator=collator(tokenizer, data, None if tokenizer is None else settings.multiple(model, data)),
            callbacks=acting,
            teacher=teacher,
            target=target,
            settings=settings,
            rows=len(data),
            measure=measure,
            reading=reading,
            one_call=one_call,
        )
        trainer.add_callback(_Points(trainer, progress, phase, saves=output is not None))
        distance = math.inf  # of the end, once it is measured
        try:
            history = finish(trainer, begun, steps)
        finally:
            if straight is not None:
                straight.finish()
            if ranks is not None:
                ranks.detach()
    model.eval()
    curve = _curve(history)
    if (
        closest is not None
        and closest.point
        and closest.point["step"] != curve[-1]["step"]
        and closest.is_worth(distance)
    ):
        closest.restore()
        curve.append({"seconds": curve[-1]["seconds"], **closest.point})
        report(
            f"{phase}: undone from step {closest.point['step']} on, where the model was closest to the original; a "
            "lower learning rate may help"
        )
    return curve


def _rate(model: PreTrainedModel, distance: float) -> float:
    """The peak of the learning rate for a model so far from its original."""
    width = getattr(model.config, "hidden_size", WIDTH)
    depth = getattr(model.config, "num_hidden_layers", DEPTH)
    part = min(max(distance, 0.0) / FAR, 1.0)
    return FASTEST * math.sqrt(part * min(DEPTH / max(depth, 1), 1.0)) * min(WIDTH / width, 1.0)


def _check_trainable(model: PreTrainedModel) -> None:
    """Raise `ModelError` if factors are stored in integers, which nothing would change."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FactorizedMatrix) and m.quantized}
    if layers:
        name, layer = next(iter(layers.items()))
        raise ModelError(
            f"the factors of '{name}', and of {len(layers)} layers in all, are stored in int{layer.bits} and cannot be "
            "trained: call factorformer.hold_floats(model) before, and factorformer.quantize(model) afterwards"
        )


def _digest(data: datasets.Dataset) -> str:
    """Another one for other rows, as far as a few of them and their number tell."""
    return _digest_of([len(data), [data[row] for row in range(0, len(data), max(len(data) // 32, 1))]])


def _digest_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]


def _curve(history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    rows = []
    for entry in history:
        values = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
        if values:
            rows.append({"step": entry["step"], "seconds": entry["seconds"], **values})
    return rows
