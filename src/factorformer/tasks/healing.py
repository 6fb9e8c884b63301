"""Healing: a compressed model learns from inputs alone to embed, or to score, as the original does."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from factorformer.errors import DataError, MethodError, ModelError
from factorformer.hf.callbacks import moving
from factorformer.hf.compat import recomputed
from factorformer.hf.description import describe
from factorformer.hf.fused import in_one_call
from factorformer.layers.embeddings import embeddings_of
from factorformer.layers.modes import requiring_gradients
from factorformer.layers.nn import FactorizedMatrix
from factorformer.progress import Progress, silent
from factorformer.tasks.checkpoints import FILES, check_same_run, last_checkpoint, locked
from factorformer.tasks.closest import Closest
from factorformer.tasks.data import check_lengths, collator, hold_out, unlike
from factorformer.tasks.healing_trainer import ROW, HealingSettings, HealingTrainer, Points, Reading
from factorformer.tasks.language_modelling import padding_right
from factorformer.tasks.reproducible import finish
from factorformer.tasks.targets import Embeddings, Target
from factorformer.tasks.trainer import Watch, frozen_embeddings, seeded
from factorformer.training.dynamic_rank import DynamicRank
from factorformer.training.rank_checkpoint import STATE
from factorformer.training.straight_through import StraightThrough

ENDLESS = 10**9
"""Steps of a training that time ends."""

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


def heal(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
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
    before: Callable[[Mapping[str, float]], object] = dict,
) -> list[dict[str, float]]:
    """Train a compressed model in place to do as the original does: no labels, nothing but inputs.

    What is learned are embeddings, of text, images or sound, the scores of a cross-encoder, or the next tokens of a
    causal language model (`target`), which can learn from text alone as well. Integers have to be held as floats
    (`compress(..., hold_floats=True)`); `quantize` makes them integers afterwards. A run that was interrupted goes on
    from the last checkpoint in `output`. Where nothing but values is trained, and the model ends more than 1 % farther
    from the original than at one of the points at which they were compared, the one before training among them, the
    closest is brought back.

    Args:
        model: compressed.
        teacher: the original; None for a language model that learns from the text alone.
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
        before: told the metrics of the target before any training, unless that goes on with an interrupted one.

    Returns:
        The curve, one row for each point: `step`, `seconds`, and the metrics of the target; and one more of an earlier
        step if what came after it was undone.

    Raises:
        DataError: texts longer than the model can read, or of different lengths without a tokenizer, or too few rows to
            hold some out.
        ModelError: factors are stored in integers.
        MethodError: factors alone are to be trained where ranks are still to be found.
        DivergedError: the loss became NaN or infinite.
        OutputError: `output` holds what a run with other settings has kept, or another process trains into it.
    """
    settings, target = settings or HealingSettings(), target or Embeddings()
    if data.format["type"] == "custom":
        raise DataError("rows are transformed when they are read (with_transform), and cannot be numbered: use map")
    if held is None:
        data, held = hold_out(data, settings.seed, "held=", 3 if target.remembers else 1)
        data = data.select(unlike(data, held))
    _check_trainable(model)
    if ranks is not None and settings.factors_only:
        raise MethodError("ranks are found in whole matrices, which are no factors yet: leave factors_only out")
    if tokenizer is not None:
        check_lengths(model, data, "the training data")
        check_lengths(model, held, "the held-out texts")
    elif "input_ids" in data.column_names and len(set(map(len, data["input_ids"]))) > 1:
        raise DataError("texts of different lengths have to be padded: give the tokenizer of the model (tokenizer=)")
    if reading is not None:
        assert teacher is not None
        reading.check(teacher, data, held)
    judge = target.judge(teacher, *((tokenizer, held) if reading is None else (reading.tokenizer, reading.held)))
    closest = None if straight or ranks else Closest(model, output)
    distance, measured = math.inf, 0

    def measure(step: int, seconds: float) -> dict[str, float]:
        nonlocal distance, measured
        measured += 1
        found, apart = judge(model, tokenizer, held)
        distance = math.inf if math.isnan(apart) else apart
        values = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items())
        report(f"{phase}: after {seconds / 60:.1f} minutes {values} (among {len(held)} held-out rows)")
        if closest is not None:
            closest.see(step, found, distance)
        return found

    # Positions count from the start of every text, as where a language model is measured.
    pads = tokenizer if tokenizer is None or target.remembers else padding_right(tokenizer)
    an_epoch = math.ceil(len(data) / settings.batch_size)
    steps = ENDLESS if settings.minutes is not None else math.ceil(settings.epochs * an_epoch)
    numbered = data.add_column(ROW, list(range(len(data))))
    if "length" not in data.column_names:
        numbered = numbered.add_column("length", [1] * len(data))
    description: dict[str, Any] = {**dataclasses.asdict(settings), "rows": len(data), "target": type(target).__name__}
    description |= {"data": _digest(data), "held": _digest(held)}
    if not target.remembers:
        description |= {"signals": _digest_of(target), "teacher": teacher is not None}
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
        requiring_gradients(() if teacher is None else teacher.parameters(), False),
        requiring_gradients(_dense(model) if settings.factors_only else (), False),
        recomputed(model, settings.checkpointing) as recompute,
        _quickly(teacher, settings) as one_call,
    ):
        check_same_run(folder, description)
        begun = last_checkpoint(folder)
        if closest is not None and closest.load():
            distance = closest.start
            if begun is None:
                closest.restore()
        elif begun is None:
            before(measure(0, 0.0))
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
            data_collator=collator(pads, data, None if tokenizer is None else settings.multiple(model, data)),
            callbacks=acting,
            teacher=teacher,
            target=target,
            settings=settings,
            rows=len(data),
            measure=measure,
            reading=reading,
            one_call=one_call,
            recompute=recompute,
        )
        trainer.add_callback(Points(trainer, progress, phase, saves=output is not None))
        distance, measured = math.inf, 0  # of the end, once it is measured
        try:
            history = finish(trainer, begun, steps)
            if closest is not None and not measured:  # it was over when it was interrupted
                distance = judge(model, tokenizer, held)[1]
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
            f"{phase}: undone from step {closest.point['step']} on, where the model was closest to "
            f"{'the text' if teacher is None else 'the original'}; a lower learning rate may help"
        )
    return curve


def _dense(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Parameters that are no factors."""
    layers = [module for module in model.modules() if isinstance(module, FactorizedMatrix)]
    factors = {id(p) for layer in layers for name, p in layer.named_parameters(recurse=False) if name != "bias"}
    return (parameter for parameter in model.parameters() if id(parameter) not in factors)


def _quickly(teacher: PreTrainedModel | None, settings: HealingSettings) -> contextlib.AbstractContextManager[bool]:
    """While this lasts, the layers of a teacher that is known run in one call; whether they do."""
    if teacher is None:
        return contextlib.nullcontext(False)
    return in_one_call(teacher, "bfloat16" if settings.precision == "bf16" else None)


def _rate(model: PreTrainedModel, distance: float) -> float:
    """The peak of the learning rate for a model so far from its original."""
    config = model.config.get_text_config()
    width, depth = getattr(config, "hidden_size", WIDTH), getattr(config, "num_hidden_layers", DEPTH)
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
