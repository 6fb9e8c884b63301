"""The job of `compress --stream`: a model of which memory holds one block at a time."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import psutil
from transformers import PreTrainedModel

from factorformer.cli._inputs import off_target, predictions
from factorformer.cli._jobs.compress_inputs import read_inputs
from factorformer.cli._jobs.compress_options import CompressJob, check
from factorformer.cli._options import LENGTH, command_line, note
from factorformer.cli._texts import calibration_batches
from factorformer.compression import Report
from factorformer.errors import FactorformerError, MethodError
from factorformer.files import RESULT_FILE
from factorformer.fitting.batches import Batch
from factorformer.hf.layout import place
from factorformer.hf.source import find
from factorformer.layers.surgery import find_blocks
from factorformer.progress import bars
from factorformer.report import Result
from factorformer.report.result import fits
from factorformer.streaming import compress_checkpoint, streams
from factorformer.streaming.curvature import bytes_on_disk
from factorformer.streaming.stored import files_of, skeleton
from factorformer.streaming.unfinished import Run
from factorformer.tasks.classification import is_causal
from factorformer.tasks.windows import CALIBRATED, sequence_length

TOO_MUCH = 0.5
"""Part of the free memory beyond which weights are not read as a whole."""

ROOM = 0.8
"""Part of what is free on disk that may be taken for a while."""


def is_too_large(job: CompressJob) -> bool:
    """Whether a model had better be compressed block by block, and can be; a note says so."""
    if _refused(job) or job.device != "cpu":
        return False
    path = find(job.model)
    try:
        files = set(files_of(place(path).folder).values())
        size, free = sum(file.stat().st_size for file in files), psutil.virtual_memory().available
        if size <= TOO_MUCH * free:
            return False
        model, _ = skeleton(path)
    except FactorformerError:  # whatever is wrong is said where the model is read as a whole
        return False
    chains = {_list_of(block) for block in find_blocks(model)}
    if job.calibration is not None and len(chains) > 1:  # those of an encoder-decoder, or of what sees
        return False
    note(
        f"the weights take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free: compressed block by block, "
        "as by --stream (--no-stream reads the model as a whole)"
    )
    return True


def _list_of(block: str) -> str:
    return block.rpartition(".")[0]


def _with_text(job: CompressJob) -> str:
    """The method for calibration data: by the loss, where the disk has room for what that keeps."""
    begun = Run(Path(job.output), {}, overwrite=False).method
    if begun is not None:
        return begun
    model, _ = skeleton(find(job.model))
    causal = is_causal(model.config)
    length = sequence_length(model.config, job.sequence_length) if causal else job.max_length or LENGTH
    tokens = CALIBRATED if job.calibration_rows is None else job.calibration_rows * length
    output = Path(job.output).absolute()
    parent = next(folder for folder in output.parents if folder.is_dir())
    needed, free = bytes_on_disk(model, tokens), shutil.disk_usage(parent).free
    if needed < ROOM * free:
        note(f"block by block, 'fisher' keeps about {needed / 1e9:.1f} GB on disk until it is done")
        return "fisher"
    note(
        f"block by block, both sides of the curvature would take {needed / 1e9:.1f} GB on disk, of which "
        f"{free / 1e9:.1f} are free: 'whitened' reads inputs alone"
    )
    return "whitened"


def run(job: CompressJob) -> Result:
    """Check, and compress block by block.

    Raises:
        MethodError: an option that is about the model as a whole.
    """
    refused = _refused(job)
    if refused:
        raise MethodError(f"--stream holds one block of the model at a time, and does not go with {', '.join(refused)}")
    if job.method is None:
        job = dataclasses.replace(job, method="svd" if job.calibration is None else _with_text(job))
    job = check(job)
    if job.device != "cpu":
        note("block by block, models are compressed on the CPU")
    if job.sequential and job.needs == "nothing":
        note(f"not used by '{job.chosen}', which reads no text: --sequential")
    inputs = read_inputs(job)

    def batches(model: PreTrainedModel) -> list[Batch]:
        assert inputs.tokenizer is not None
        assert inputs.calibration is not None
        rows, seed, size = job.calibration_rows, job.settings.seed, job.settings.batch_size
        return [*calibration_batches(model, inputs.tokenizer, inputs.calibration, rows, seed, size)]

    results: list[Result] = []

    def beside(report: Report, directory: Path) -> None:
        warnings = [*report.notes, *filter(None, [off_target(report.plan)])]
        for line in warnings:
            note(line)
        result = Result.of(
            report.plan,
            method=job.chosen,
            metrics=predictions(report.plan),
            seconds=report.seconds | {"total": sum(report.seconds.values())},
            seed=None if inputs.tokenizer is None else job.settings.seed,
            output=job.output,
            warnings=warnings,
            command=command_line(),
            fits=fits(report.plan, report.errors),
            streamed=True,
        )
        (directory / RESULT_FILE).write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
        results.append(result)

    with bars() as progress:
        compress_checkpoint(
            inputs.path,
            job.output,
            job.method,
            job.ratio,
            job.include,
            job.exclude,
            int8=job.int8,
            int4=job.int4,
            rank_multiple=job.rank_multiple or 1,
            calibration=None if inputs.calibration is None else batches,
            sequential=job.sequential,
            overwrite=job.overwrite,
            progress=progress,
            beside=beside,
        )
    return results[0]


def _refused(job: CompressJob) -> list[str]:
    """Options that are about the model as a whole."""
    given = {
        "--train, --source": job.train is not None,
        "--eval, --eval-source": job.evaluation is not None,
        "--scope all": job.scope == "all",
        "--budget": job.budget not in (None, "bytes"),
        "--share": job.share is not None,
        "--unique-layers": job.unique_layers is not None,
        "--trim-vocabulary": job.trim_vocabulary is not None,
        "--plan": job.plan is not None,
        f"--method {job.method}": job.method is not None and not streams(job.method),
    }
    return [name for name, is_given in given.items() if is_given]
