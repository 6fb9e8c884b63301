"""The job of `train`, step by step."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from factorformer import compression
from factorformer.cli._inputs import write
from factorformer.cli._jobs.corpus import Corpus, read_corpus
from factorformer.cli._jobs.unfinished import Unfinished
from factorformer.cli._options import note
from factorformer.cli._text_files import TextFiles
from factorformer.files import output_directory
from factorformer.hf.source import load_tokenizer
from factorformer.layers.matrix import Scope
from factorformer.planning import Plan, left_dense
from factorformer.progress import Progress, bars
from factorformer.report import Result, inventory
from factorformer.tasks.architectures import Architecture, new_model
from factorformer.tasks.from_scratch import ScratchSettings, train
from factorformer.tasks.trainer import seeded

DENSE = "dense"
"""The method that leaves every matrix as it is."""

TRAINING_FILE = "training.json"
"""Options and learning curve of the run that made a directory lie in it under this name."""


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """The options of `train`, checked; their help texts say what they are."""

    output: Path
    files: TextFiles
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

    def to_dict(self) -> dict[str, Any]:
        """All options, and the sizes of the files, by which a resumed run is known to be the same."""
        content = dataclasses.asdict(self)
        del content["output"]
        content |= {**content.pop("files"), **content.pop("settings")}
        content["file_bytes"] = {name: Path(name).stat().st_size for name in self.files.names if Path(name).is_file()}
        return json.loads(json.dumps(content))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything that stands before the first step of training.

    Args:
        corpus: read from the files.
        tokenizer: trained on it.
        model: new, still dense.
        plan: what becomes of its matrices; for a dense model, what it is made of.
    """

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    model: PreTrainedModel
    plan: Plan

    def result(self, job: TrainJob, metrics: dict[str, float], **others: Any) -> Result:
        """The costs of the model, with its metrics."""
        amounts = {"vocabulary": len(self.tokenizer), "texts": len(self.corpus.train)}
        method = None if job.method == DENSE else job.method
        return Result.of(self.plan, method=method, metrics={**amounts, **metrics}, seed=job.settings.seed, **others)


def preview(job: TrainJob) -> Result:
    """What `run` would train; nothing is written."""
    started = time.perf_counter()
    with bars() as progress:
        ready = _prepare(job, progress, None, resume=False)
    return ready.result(job, {}, seconds={"total": time.perf_counter() - started}, layers=ready.plan.entries)


def run(job: TrainJob, *, resume: bool, overwrite: bool) -> Result:
    """Tokenizer, plan, training, scores, output directory; checkpoints meanwhile."""
    started = time.perf_counter()
    unfinished = Unfinished(job.output)
    with unfinished.open(job.to_dict(), resume=resume, overwrite=overwrite):
        with bars() as progress:
            ready = _prepare(job, progress, unfinished.tokenizer, resume=resume)
            model, tokenizer, corpus = ready.model, ready.tokenizer, ready.corpus
            if job.method != DENSE:
                for line in left_dense(ready.plan.entries, ready.plan.original.bytes):
                    note(f"left dense: {line}")
                with seeded((job.settings.seed + 1) % 2**32):  # other numbers than the model's own
                    compression.initialize(model, ready.plan)
            data, held = corpus.encode(tokenizer, progress)
            prepared = time.perf_counter()
            curve = train(model, tokenizer, data, held, corpus.task, job.settings, unfinished.checkpoints, progress)
            trained = time.perf_counter()
            metrics = corpus.measure(model, tokenizer, held, progress)
        if job.files.pairs and model.generation_config is not None:
            model.generation_config.max_length = job.max_length  # the default cuts translations at 20 tokens
        now = time.perf_counter()
        # Those of interrupted runs are included in the seconds of training.
        seconds = {"prepare": prepared - started, "train": curve[-1]["seconds"], "evaluate": now - trained}
        result = ready.result(job, metrics, seconds={**seconds, "total": now - started}, output=str(job.output))
        with output_directory(job.output, overwrite=overwrite, inputs=(job.config, *job.files.names)) as partial:
            write(result, model, partial, tokenizer=tokenizer)
            content = json.dumps({"options": job.to_dict(), "curve": curve}, indent=1)
            (partial / TRAINING_FILE).write_text(content + "\n", encoding="utf-8")
    return result


def _prepare(job: TrainJob, progress: Progress, folder: Path | None, *, resume: bool) -> Prepared:
    """Read the text, make or load the tokenizer, and plan the model; the tokenizer is kept in a folder, if given."""
    architecture = Architecture.of(job.config, job.overrides)
    architecture.check(job.vocabulary)
    corpus = read_corpus(job.files, architecture.task, job.config, job.max_length, job.settings.seed)
    if resume and folder is not None and folder.is_dir():
        tokenizer = load_tokenizer(folder)
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
    else:
        tokenizer = corpus.new_tokenizer(job.vocabulary, progress)
        if folder is not None:
            tokenizer.save_pretrained(folder)
    model = new_model(architecture.for_tokenizer(tokenizer), architecture.task, job.settings.seed)
    if job.method == DENSE:
        return Prepared(corpus, tokenizer, model, inventory(model, job.scope))
    plan = compression.plan(model, job.method, job.ratio, job.scope, job.include, job.exclude)
    return Prepared(corpus, tokenizer, model, plan)
