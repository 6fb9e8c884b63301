"""The options of `compress`, and which of them go together."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from factorformer import compression, recipes
from factorformer.cli._options import note
from factorformer.cli._text_files import Source, names_of
from factorformer.errors import DataError, MethodError
from factorformer.layers.matrix import Scope
from factorformer.planning import Plan, Share, Unit
from factorformer.tasks.data import Columns
from factorformer.tasks.finetuning import TrainingSettings
from factorformer.tasks.healing import HealingSettings
from factorformer.tasks.labels import Kind


@dataclasses.dataclass(frozen=True)
class CompressJob:
    """The options of `compress`; their help texts say what they are."""

    model: str
    output: str
    method: str | None
    ratio: float | None
    budget: Unit | None
    int8: bool
    int4: bool
    scope: Scope | None
    include: list[str] | None
    exclude: list[str] | None
    share: Share | None
    rank_multiple: int | None
    unique_layers: int | None
    trim_vocabulary: str | None
    plan: Plan | None
    columns: Columns
    task: Kind | None
    train: Source | None
    evaluation: Source | None
    calibration: Source | None
    calibration_rows: int | None
    max_length: int | None
    sequence_length: int | None
    batch_size: int | None
    settings: TrainingSettings
    healing: HealingSettings
    distill: str | None
    stream: bool | None
    sequential: bool
    device: str
    overwrite: bool

    @property
    def chosen(self) -> str:
        """The method, by default the data-aware one where there is text."""
        method = self.method if self.plan is None else self.plan.method
        return method or recipes.default_method(calibrated=self.calibration is not None or self.train is not None)

    @property
    def needs(self) -> str:
        """What data the fit of the method needs."""
        return recipes.get(self.chosen).needs

    def to_dict(self) -> dict[str, Any]:
        """All options, and the sizes of the files, by which a resumed run is known to be the same."""
        left_out = ("output", "overwrite", "device", "plan")
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}
        content |= {name: dataclasses.asdict(content[name]) for name in ("columns", "settings", "healing")}
        content["plan"] = None if self.plan is None else self.plan.to_dict()
        files = names_of(self.train, self.evaluation, self.calibration, self.trim_vocabulary)
        content["file_bytes"] = {name: Path(name).stat().st_size for name in files if Path(name).is_file()}
        return json.loads(json.dumps(content))


def check(job: CompressJob) -> CompressJob:
    """Refuse options that do not go together, and drop, with a note, what nothing reads.

    Raises:
        MethodError: an unknown method, or options of methods that do not go together.
        DataError: data, or the name of a column, that is missing.
        BudgetError: a ratio that no model can meet.
    """
    _check_method(job)
    _check_data(job)
    recipe, label, untrained = recipes.get(job.chosen), job.columns.label, job.train is None
    unread = job.needs == "nothing" and untrained and job.evaluation is None and job.calibration is not None
    for happens, text in (
        (unread, "measures nothing: --calibration is not used"),
        (recipe.training == "none" and not untrained, "is a fit without training, which --train adds to it"),
        (
            recipe.training == "straight-through" and untrained,
            "learns in training: without --train, this is its start alone",
        ),
        (
            recipe.allocation == "dynamic" and untrained,
            "finds its ranks in training: without --train, all matrices shrink alike",
        ),
    ):
        if happens:
            note(f"method '{job.chosen}' {text}")
    if job.unique_layers is not None and untrained:
        note("--unique-layers makes layers that share matrices the mean of what they were: without --train it stays so")
    measured = job.calibration is not None or job.train is not None
    given = job.method if job.plan is None else job.plan.method
    note(
        f"method: {job.chosen}"
        + ("" if given else f" (the default {'with' if measured else 'without'} calibration data)")
    )
    if label is not None and untrained and job.evaluation is None and job.needs != "labelled text":
        note(f"method '{job.chosen}' reads no labels: --label is not used without --train or --eval")
        job = dataclasses.replace(job, columns=dataclasses.replace(job.columns, label=None))
    return dataclasses.replace(job, calibration=(job.calibration or job.train) if job.needs != "nothing" else None)


def _check_method(job: CompressJob) -> None:
    options = (job.method, job.ratio, job.budget, job.scope, job.include, job.exclude, job.share, job.rank_multiple)
    if job.plan is not None and (job.int8 or job.int4 or any(option is not None for option in options)):
        raise MethodError(
            "--plan holds method, ratio, budget, scope, patterns, sharing, multiples of ranks and integers already: "
            "leave these options out"
        )
    if job.unique_layers is not None and not (job.int8 or job.int4):
        raise MethodError("--unique-layers stores shared matrices in integers: give --int8 or --int4")
    if job.plan is not None and (job.unique_layers is not None or job.trim_vocabulary is not None):
        raise MethodError("--plan is of a model as it is: leave --unique-layers and --trim-vocabulary out")
    if job.int8 and job.int4:
        raise MethodError("--int8 and --int4 are two widths of integers: give one")
    if recipes.get(job.chosen).training == "from scratch":
        raise MethodError(
            f"method '{job.chosen}' trains a new model from scratch, not the weights of one: use `factorformer train`, "
            "or method 'kronecker' to fit these"
        )
    compression.check_options(job.chosen, job.ratio, job.share, job.budget or "bytes", job.rank_multiple or 1)


def _check_data(job: CompressJob) -> None:
    label = job.columns.label
    if job.distill is not None and job.train is None:
        raise DataError("--distill needs text to learn on: give --train")
    if job.healing.minutes is not None and job.train is not None and label is not None:
        raise MethodError("--minutes is for models that learn without labels: with labels give --epochs")
    if label is not None and job.train is None and job.evaluation is None and job.calibration is None:
        raise DataError("--label is the name of a column: give --train, --eval or --calibration")
    if job.task not in (None, "tokens") and label is None:
        raise DataError("--task is about labels: name their column with --label, or give --source and --target")
    if job.needs != "nothing" and job.calibration is None and job.train is None:
        raise DataError(
            f"method '{job.chosen}' needs {job.needs} to measure on: give --calibration or --train, or use 'svd'"
        )
    if job.needs == "labelled text" and label is None:
        raise DataError(f"method '{job.chosen}' needs labelled text: name the column of the labels with --label")
