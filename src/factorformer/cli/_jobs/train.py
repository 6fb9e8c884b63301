"""What `train` does, step by step."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerFast

from factorformer import compression
from factorformer.cli._inputs import columns_of, hold_out, plain_columns, read_table, write
from factorformer.cli._options import note
from factorformer.errors import DataError, FactorformerError, ModelError, OutputError
from factorformer.files import check_output, output_directory
from factorformer.hf.source import load_tokenizer
from factorformer.layers.matrix import Scope
from factorformer.planning import Plan, left_dense
from factorformer.progress import Progress, bars
from factorformer.report import Result, inventory
from factorformer.tasks import language_modelling, translation
from factorformer.tasks.architectures import Architecture, Task, new_model
from factorformer.tasks.from_scratch import IGNORED, ScratchSettings, last_checkpoint, token_loss
from factorformer.tasks.tokenization import train_tokenizer

DENSE = "dense"
"""The method that leaves every matrix as it is."""

TRAINING_FILE = "training.json"
"""Options and learning curve of the run that made a directory lie in it under this name."""


@dataclasses.dataclass(frozen=True)
class Job:
    """The options of `train`, checked; their help texts say what they are."""

    output: Path
    source: str | None
    target: str | None
    eval_source: str | None
    eval_target: str | None
    train: str | None
    evaluation: str | None
    text: list[str] | None
    max_length: int
    config: str
    overrides: list[str]
    vocabulary: int
    method: str
    ratio: float
    scope: Scope
    include: list[str] | None
    exclude: list[str] | None
    settings: ScratchSettings

    @property
    def work(self) -> Path:
        """Where an unfinished run keeps tokenizer and checkpoints: a hidden neighbour of the output."""
        return self.output.parent / f".{self.output.name}.training"

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.work / "checkpoints"

    def to_dict(self) -> dict[str, Any]:
        """All options, and the sizes of the files, by which a resumed run is known to be the same."""
        content = dataclasses.asdict(self)
        del content["output"]
        files = [self.source, self.target, self.eval_source, self.eval_target, self.train, self.evaluation]
        sizes = {name: Path(name).stat().st_size for name in files if name is not None and Path(name).is_file()}
        return json.loads(json.dumps({**content, "file_bytes": sizes}))


@dataclasses.dataclass(frozen=True)
class Text:
    """What is learned, and what is held out to measure on: pairs for a translation, texts for a language model."""

    train: Sequence[Any]
    evaluation: Sequence[Any]

    @property
    def texts(self) -> list[str]:
        """Everything that is trained on."""
        return [text for item in self.train for text in (item if isinstance(item, tuple) else (item,))]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything that stands before the first step of training.

    Args:
        task: what is learned.
        text: read from the files.
        tokenizer: trained on it.
        model: new, still dense.
        plan: what becomes of its matrices; for a dense model, what it is made of.
    """

    task: Task
    text: Text
    tokenizer: PreTrainedTokenizerFast
    model: PreTrainedModel
    plan: Plan


def preview(job: Job) -> Result:
    """What `run` would train; nothing is written."""
    started = time.perf_counter()
    with bars() as progress:
        ready = _prepare(job, progress, resume=False)
    return Result.of(
        ready.plan,
        method=_method(job),
        metrics=_amounts(ready),
        seconds={"total": time.perf_counter() - started},
        seed=job.settings.seed,
        layers=ready.plan.entries,
    )


def run(job: Job, *, resume: bool, overwrite: bool) -> Result:
    """Tokenizer, plan, training, scores, output directory; checkpoints meanwhile."""
    check_output(job.output, overwrite=overwrite)
    with _workplace(job, resume=resume, overwrite=overwrite):
        started = time.perf_counter()
        with bars() as progress:
            ready = _prepare(job, progress, resume=resume)
            if job.method != DENSE:
                for line in left_dense(ready.plan.entries, ready.plan.original.bytes):
                    note(f"left dense: {line}")
                compression.initialize(ready.model, ready.plan)
            data = _encode(job, ready, progress)
            prepared = time.perf_counter()
            curve = _train(job, ready, data, progress)
            trained = time.perf_counter()
            metrics = _measure(job, ready, data[1], progress)
        seconds = {
            "prepare": prepared - started,
            "train": curve[-1]["seconds"],  # those of interrupted runs included
            "evaluate": time.perf_counter() - trained,
            "total": time.perf_counter() - started,
        }
        result = Result.of(
            ready.plan,
            method=_method(job),
            metrics={**_amounts(ready), **metrics},
            seconds=seconds,
            seed=job.settings.seed,
            output=str(job.output),
        )
        if ready.task == "translation" and ready.model.generation_config is not None:
            ready.model.generation_config.max_length = job.max_length  # the default cuts translations at 20 tokens
        with output_directory(job.output, overwrite=overwrite) as partial:
            write(result, ready.model, partial, tokenizer=ready.tokenizer)
            content = json.dumps({"options": job.to_dict(), "curve": curve}, indent=1)
            (partial / TRAINING_FILE).write_text(content + "\n", encoding="utf-8")
    return result


@contextlib.contextmanager
def _workplace(job: Job, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """The directory of an unfinished run: found, made, kept for `--resume` where that can help, or deleted."""
    begun = last_checkpoint(job.checkpoints)
    options = job.work / "options.json"
    if begun is not None and not resume and not overwrite:
        raise OutputError(
            f"an interrupted run for '{job.output}' can go on: add --resume, or start anew with --overwrite"
        )
    if resume:
        if begun is None:
            raise OutputError(f"no interrupted run for '{job.output}' has a checkpoint to resume: leave --resume out")
        _check_same(job, options)
        note(f"resumed from step {Path(begun).name.rpartition('-')[2]}")
    else:
        shutil.rmtree(job.work, ignore_errors=True)
        try:
            job.work.mkdir(parents=True)
            options.write_text(json.dumps(job.to_dict(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write to '{job.work.parent}': {error.strerror}") from error
    try:
        yield
    except BaseException as error:
        # A model that diverged would do so again: other options make it another run.
        if last_checkpoint(job.checkpoints) is None or isinstance(error, ModelError):
            shutil.rmtree(job.work, ignore_errors=True)
        elif isinstance(error, FactorformerError):
            note(f"checkpoints are kept in '{job.work}': repeat the command with --resume to go on from there")
        raise
    shutil.rmtree(job.work, ignore_errors=True)


def _check_same(job: Job, options: Path) -> None:
    try:
        begun = json.loads(options.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot read what the interrupted run was: {error}; start anew with --overwrite") from error
    now = _flat(job.to_dict())
    other = [f"{name} was {was}, not {now.get(name)}" for name, was in _flat(begun).items() if now.get(name) != was]
    if other:
        raise OutputError(
            f"the interrupted run had other options: {'; '.join(other)}; repeat its command, or start anew with "
            "--overwrite"
        )


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """Options and those inside of options, side by side."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def _prepare(job: Job, progress: Progress, *, resume: bool) -> Prepared:
    architecture = Architecture.of(job.config, job.overrides)
    task = architecture.task
    if (task == "translation") != (job.source is not None):
        raise DataError(
            f"'{job.config}' is an encoder-decoder, which learns from pairs of texts: give --source and --target"
            if task == "translation"
            else f"'{job.config}' reads a single text: give --train, or a --config that translates, such as t5"
        )
    if task == "translation" and importlib.util.find_spec("sacrebleu") is None:
        raise DataError("BLEU needs sacreBLEU: pip install 'factorformer[translation]'")
    text = _read_pairs(job) if task == "translation" else _read_text(job)
    tokenizer = _tokenizer(job, text, task, progress, resume=resume)
    model = new_model(architecture.for_tokenizer(tokenizer), task, job.settings.seed)
    return Prepared(task, text, tokenizer, model, _plan(job, model))


def _tokenizer(job: Job, text: Text, task: Task, progress: Progress, *, resume: bool) -> PreTrainedTokenizerFast:
    """The tokenizer of the interrupted run if there is one, otherwise a new one."""
    path = job.work / "tokenizer"
    if resume and path.is_dir():
        tokenizer = load_tokenizer(path)
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        return tokenizer
    tokenizer = train_tokenizer(text.texts, job.vocabulary - (task == "masked"), progress)
    if task != "translation":
        tokenizer = language_modelling.adapt_tokenizer(tokenizer, task)
    if job.work.is_dir():
        tokenizer.save_pretrained(path)
    return tokenizer


def _plan(job: Job, model: PreTrainedModel) -> Plan:
    if job.method == DENSE:
        return inventory(model, job.scope)
    return compression.plan(model, job.method, job.ratio, job.scope, job.include, job.exclude)


def _method(job: Job) -> str | None:
    return None if job.method == DENSE else job.method


def _amounts(ready: Prepared) -> dict[str, float]:
    return {"vocabulary": len(ready.tokenizer), "texts": len(ready.text.train)}


def _read_pairs(job: Job) -> Text:
    assert job.source is not None
    assert job.target is not None
    pairs = translation.read_parallel(Path(job.source), Path(job.target))
    if job.eval_source is not None and job.eval_target is not None:
        return Text(pairs, translation.read_parallel(Path(job.eval_source), Path(job.eval_target)))
    rows = datasets.Dataset.from_dict({"row": range(len(pairs))})
    try:
        kept, held = hold_out(rows, job.settings.seed)
    except DataError as error:
        raise DataError(f"{error}-source and --eval-target") from error
    return Text([pairs[row] for row in kept["row"]], [pairs[row] for row in held["row"]])


def _read_text(job: Job) -> Text:
    assert job.train is not None
    columns = columns_of(job.text, None)
    if len(columns.text) > 1:
        raise DataError("a language model reads a single text: give --text once")

    def lines(source: str) -> datasets.Dataset:
        chosen = plain_columns(source, columns)
        rows = read_table(source, chosen).select_columns(list(chosen.text)).rename_columns({chosen.text[0]: "text"})
        filled = rows.filter(lambda text: text is not None and bool(str(text).strip()), input_columns=["text"])
        if len(filled) == 0:
            raise DataError(f"'{source}' holds no text: every row is empty")
        return filled

    rows = lines(job.train)
    kept, held = hold_out(rows, job.settings.seed) if job.evaluation is None else (rows, lines(job.evaluation))
    return Text([str(text) for text in kept["text"]], [str(text) for text in held["text"]])


def _encode(job: Job, ready: Prepared, progress: Progress) -> list[datasets.Dataset]:
    """Token ids of the training and the held-out text."""
    encoded = []
    for phase, texts in (("encode", ready.text.train), ("encode held-out text", ready.text.evaluation)):
        if ready.task == "translation":
            encoded.append(translation.encode(texts, ready.tokenizer, job.max_length, progress, phase))
        else:
            encoded.append(
                language_modelling.encode(texts, ready.tokenizer, ready.task, job.max_length, progress, phase)
            )
    return encoded


def _train(job: Job, ready: Prepared, data: list[datasets.Dataset], progress: Progress) -> list[dict[str, float]]:
    model, tokenizer, (train, held) = ready.model, ready.tokenizer, data
    if ready.task == "translation":
        return translation.train(model, tokenizer, train, held, job.settings, job.checkpoints, progress)
    return language_modelling.train(model, tokenizer, train, held, ready.task, job.settings, job.checkpoints, progress)


def _measure(job: Job, ready: Prepared, held: datasets.Dataset, progress: Progress) -> dict[str, float]:
    if ready.task != "translation":
        return language_modelling.evaluate(ready.model, ready.tokenizer, held, ready.task, progress=progress)
    sources, references = zip(*ready.text.evaluation, strict=True)
    collate = DataCollatorForSeq2Seq(ready.tokenizer, ready.model, label_pad_token_id=IGNORED)
    loss = token_loss(ready.model, collate, held)
    texts = translation.translate(ready.model, ready.tokenizer, sources, max_length=job.max_length, progress=progress)
    scores = translation.bleu(texts, references)
    numbers = {name: score for name, score in scores.items() if not isinstance(score, str)}
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), **numbers}
