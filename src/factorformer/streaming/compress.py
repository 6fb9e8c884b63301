"""The verb `compress_checkpoint`: a checkpoint that memory does not hold, into one of factors."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import factorformer
from factorformer import compression, planning, recipes, registration
from factorformer.compression import Report
from factorformer.errors import DataError, MethodError
from factorformer.files import check_output, output_directory, read_result, whole_file
from factorformer.fitting import statistics as calibrate
from factorformer.fitting.batches import Batch, Calibration, as_batches, fingerprint
from factorformer.fitting.matrices import fit_matrix
from factorformer.fitting.moments import LayerStatistics
from factorformer.fitting.recorder import Recorder
from factorformer.hf import card
from factorformer.hf.source import copy_companions, find, place_of_weights
from factorformer.hf.tensors import read_sizes
from factorformer.layers.quantization import quantize
from factorformer.layers.surgery import factorize, factorized_like, find_blocks, find_matrices, replace_module
from factorformer.planning import Entry, Plan
from factorformer.planning.evidence.prediction import allocated, other_width
from factorformer.progress import Progress, silent
from factorformer.streaming.chain import Chain
from factorformer.streaming.curvature import Curvature
from factorformer.streaming.stored import Stored, skeleton
from factorformer.streaming.unfinished import Run, read_object
from factorformer.structures.integers import Bits
from factorformer.tasks.checkpoints import locked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PART = 2**30
"""Bytes of a file of tensors that belong to no block, unless one tensor has more."""


def streams(method: str) -> bool:
    """Whether a method can go block by block: it gives every matrix its part, or what it predicts of the loss."""
    recipe = recipes.get(method)
    fits = recipe.metric in ("plain", "input_moment") and recipe.allocation == "uniform"
    fits = fits or (recipe.metric == "fisher" and recipe.allocation == "by_loss")
    return fits and recipe.training not in ("straight-through", "from scratch")


def compress_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    method: str | None = None,
    ratio: float | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    *,
    int8: bool = False,
    int4: bool = False,
    rank_multiple: int = 1,
    calibration: Calibration | Callable[[PreTrainedModel], Calibration] | None = None,
    sequential: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    beside: Callable[[Report, Path], None] | None = None,
) -> Report:
    """Compress the blocks of a model on disk, of which one at a time is in memory, into a model directory.

    Memory holds one block, the second moments of what its layers read, and the factors of one matrix on their way;
    hidden states of the calibration batches, and what is finished, are on disk, in a hidden neighbour of the output.
    `fisher` and `auto` go through all blocks twice more before, and keep there as well what every block reads, and the
    moments of both sides of all matrices (`streaming.curvature`). A run that was interrupted, by whatever, goes on
    after the last finished block when it is called with the same arguments, and makes the same files.

    Args:
        source: a model directory of safetensors, or a name on the Hub.
        output: the directory to make; it appears complete or not at all.
        method: one that gives every matrix its part of the budget, or divides it by the predicted rise of the loss
            (`streams`); None for `whitened` with calibration data and `svd` without.
        ratio, include, exclude, int8, int4, rank_multiple: as for `plan`.
        calibration: batches, as for `compress`; or what makes them for the model, which has no weights then.
        sequential: let blocks read what the compressed blocks before them make, in place of the original ones.
        overwrite: replace a model directory that is there, and an interrupted run with other arguments.
        progress: progress callback.
        beside: writes further files into the directory before it appears.

    Raises:
        MethodError: a method that needs labels, or all matrices at once.
        DataError: the method needs calibration data that was not given.
        ModelError: the model's blocks cannot be run one by one, it is compressed already, or a weight is not finite.
        CheckpointError: files that cannot be read tensor by tensor.
        OutputError: the output is there already, or an interrupted run with other arguments.
    """
    name = method or ("svd" if calibration is None else "whitened")
    recipe = recipes.get(name)
    if not streams(name):
        able = [known for known in recipes.RECIPES if streams(known)]
        raise MethodError(
            f"method '{name}' needs labels, or a training, or learns in one: block by block go {', '.join(able)}"
        )
    if recipe.metric != "plain" and calibration is None:
        raise DataError(f"method '{name}' needs calibration data ({recipe.needs}): pass batches, or use 'svd'")
    started, path = time.perf_counter(), find(str(source))
    model, stored = skeleton(path)
    options = {"int8": int8, "int4": int4, "rank_multiple": rank_multiple}
    plan = compression.plan(model, name, ratio, "blocks", include, exclude, **options)
    batches: list[Batch] = []
    if recipe.metric != "plain" and calibration is not None:
        batches += as_batches(model, calibration(model) if callable(calibration) else calibration)
        if not batches:
            raise DataError("calibration data is empty: give at least one batch")
    arguments = {
        "plan": plan.to_dict(),
        "sequential": sequential,
        "config": model.config.to_dict(),
        "source": [
            [file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(set(stored.files.values()))
        ],
        "batches": [[fingerprint(batch), *map(_described, sorted(batch.items()))] for batch in batches],
        "versions": [factorformer.__version__, torch.__version__, transformers.__version__],
    }
    run = Run(Path(output), json.loads(json.dumps(arguments, default=str)), overwrite=overwrite)
    job = _Job(model, stored, plan, batches, sequential, progress)
    check_output(output, overwrite=overwrite, inputs=(path,))
    chain = None
    if batches:
        stored.fill(_outside(job))
        chain = Chain(model, batches[0])
    with locked(run.folder.with_name(f"{run.folder.name}.lock")), run.opened():
        if recipe.metric == "fisher" and chain is not None:
            bits: Bits | None = 8 if int8 else 4 if int4 else None
            job.plan = _planned(job, run, chain, name, include, exclude, bits, rank_multiple)
            chain = chain if sequential else None
        _compress_blocks(job, run, chain)
        report = _report(job, run, name, started)
        shutil.rmtree(run.assembled, ignore_errors=True)
        _assemble(job, run, path, run.assembled)
        if beside is not None:
            beside(report, run.assembled)
        card.write(job.model, run.assembled, read_result(run.assembled) or None, path)
        with output_directory(output, overwrite=overwrite, inputs=(path,)) as partial:
            for part in run.assembled.iterdir():
                part.rename(partial / part.name)
    return report


def _planned(
    job: _Job,
    run: Run,
    chain: Chain,
    method: str,
    include: Sequence[str] | str | None,
    exclude: Sequence[str] | str | None,
    bits: Bits | None,
    multiple: int,
) -> Plan:
    """The plan by what matrices add to the loss, in the place of one that knows nothing of them."""
    draft, structures = job.plan, recipes.get(method).structures_of
    matrices, rest = find_matrices(job.model, "blocks", include, exclude, bits=bits)
    draft = Plan(method, "blocks", draft.target, (), rest)
    able = [matrix for matrix in matrices if matrix.dense is None]
    curvature = Curvature(job.model, job.stored, chain, run, job.batches, job.progress)
    prediction = curvature.measure(able, structures, draft.target, other_width(draft, matrices))
    return allocated(job.model, prediction, draft, matrices, job.progress, multiple)


def _described(argument: tuple[str, Any]) -> str:
    """An argument of a model without the values of tensors."""
    name, value = argument
    return f"{name} {tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"{name} {value!r}"


@dataclasses.dataclass
class _Job:
    """What is to be done.

    Args:
        model: whose blocks have no weights but for the one at hand.
        stored: its tensors on disk.
        plan: of its blocks.
        batches: of calibration data; none where the method needs none.
        sequential: whether blocks read what compressed blocks make.
        progress: progress callback.
    """

    model: PreTrainedModel
    stored: Stored
    plan: Plan
    batches: Sequence[Batch]
    sequential: bool
    progress: Progress

    def entries(self, block: str) -> list[Entry]:
        """What the plan makes of the matrices of a block."""
        return [entry for entry in self.plan.factorized if entry.matrix.name.startswith(f"{block}.")]


def _compress_blocks(job: _Job, run: Run, chain: Chain | None) -> None:
    names = find_blocks(job.model)
    for place, block in enumerate(names):
        if not run.tensors(place).exists():
            _compress_block(job, run, chain, place, block)
        job.progress("compress block", place + 1, len(names))
        said = _said(run, place)
        if chain is not None:
            chain.lengths[place] = said["length"]
        _forget(job, block, said["dense"])


def _compress_block(job: _Job, run: Run, chain: Chain | None, place: int, block: str) -> None:
    """Read, measure, fit, write: what is left is the file of the block, and what the next one reads."""
    module = job.model.get_submodule(block)
    job.stored.fill(job.stored.inside(block))
    entries, dense = job.entries(block), {}
    known: Mapping[str, LayerStatistics] = {}
    if chain is not None:
        known = _measure(job, run, chain, place, [entry.matrix.name for entry in entries])
        planned = run.moments(place).exists()  # by what is known of the whole model
        missing = [] if planned else [entry.matrix.name for entry in entries if entry.matrix.name not in known]
        dense = calibrate.unreached_parts(missing, list(known))
    if run.moments(place).exists():
        both: Mapping[str, LayerStatistics] = read_object(run.moments(place))
        inputs = {name: statistics.inputs for name, statistics in known.items()}
        known = {name: dataclasses.replace(s, inputs=inputs.get(name, s.inputs)) for name, s in both.items()}
    errors: dict[str, float] = {}
    for entry in entries:
        name = entry.matrix.name
        if name in dense:
            continue
        assert entry.spec is not None
        factors, errors[name] = fit_matrix(job.model, entry.matrix, entry.spec, known, stored=True)
        factorize(job.model, entry.matrix, entry.spec, factors)
        quantize(module)
        job.progress("fit", len(errors), len(entries))
    if chain is not None and job.sequential:
        for number, batch in enumerate(job.batches):
            run.keep(place + 1, number, chain.run(place, batch, run.read(place, number)))
    tensors = {f"{block}.{name}": tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    with whole_file(run.said(place), "what became of a block") as partial:
        length, few = None if chain is None else chain.lengths[place], calibrate.too_few_tokens(known)
        said = {"errors": errors, "dense": dense, "length": length, "few": few}
        partial.write_text(json.dumps(said), encoding="utf-8")
    with whole_file(run.tensors(place), "a compressed block") as partial:
        save_file(tensors, partial, {"format": "pt"})
    shutil.rmtree(run.hidden(place), ignore_errors=True)
    run.moments(place).unlink(missing_ok=True)


def _measure(job: _Job, run: Run, chain: Chain, place: int, names: Sequence[str]) -> Mapping[str, LayerStatistics]:
    """Second moments of what the layers of a block read; what it makes of hidden states is kept for the next one."""
    recorder, done = Recorder(job.model, names), 0

    def forward(**batch: Any) -> None:
        hidden = chain.begin(batch) if place == 0 else run.read(place, done)
        if place == 0:
            run.keep(0, done, hidden)
        made = chain.run(place, batch, hidden)
        if not job.sequential:
            run.keep(place + 1, done, made)

    recorder.runs = forward  # pyright: ignore[reportAttributeAccessIssue]
    with recorder.attached():
        for batch in job.batches:
            recorder.run(batch)
            done += 1
            job.progress("measure", done, len(job.batches))
    if names:
        recorder.check(done)
    return recorder.statistics()


def _said(run: Run, place: int) -> dict[str, Any]:
    return json.loads(run.said(place).read_text(encoding="utf-8"))


def _forget(job: _Job, block: str, dense: Mapping[str, str]) -> None:
    """Take the tensors of a block out of memory; its layers are those of the compressed model without values."""
    job.model.get_submodule(block).to("meta")
    for entry in job.entries(block):
        if entry.matrix.name in dense:
            continue
        assert entry.spec is not None
        with torch.device("meta"):
            old = job.model.get_submodule(entry.matrix.name)
            new = factorized_like(old, entry.spec, entry.matrix.shape, bits=entry.matrix.bits)
        replace_module(job.model, old, new)


def _report(job: _Job, run: Run, method: str, started: float) -> Report:
    """What became of the plan."""
    said = [_said(run, place) for place in range(len(find_blocks(job.model)))]
    dense = {name: reason for block in said for name, reason in block["dense"].items()}
    entries = tuple(
        dataclasses.replace(entry, spec=None, reason=dense[entry.matrix.name], cause=planning.Cause.UNMEASURED)
        if entry.matrix.name in dense
        else entry
        for entry in job.plan.entries
    )
    plan = dataclasses.replace(job.plan, entries=entries)
    errors = {name: error for block in said for name, error in block["errors"].items()}
    notes = tuple(f"left dense: {name}: {reason}" for name, reason in dense.items())
    notes += tuple(dict.fromkeys(block["few"] for block in said if block["few"]))[:1]
    seconds = {"fit": time.perf_counter() - started}
    return Report(method, plan.scope, plan.original, plan.compressed, errors, seconds, plan, notes)


def _assemble(job: _Job, run: Run, path: Path, directory: Path) -> None:
    """A model directory of finished blocks, of all tensors outside of them, and of what lies beside the weights."""
    weights = directory / place_of_weights(path)
    weights.mkdir(parents=True, exist_ok=True)
    registration.attach(job.model)
    config: Any = job.model.config
    config.architectures = [type(job.model).__name__]
    names = find_blocks(job.model)
    parts = list(_parts(job.stored, _outside(job)))
    files = [
        weights / f"model-{number + 1:05d}-of-{len(names) + len(parts):05d}.safetensors"
        for number in range(len(names) + len(parts))
    ]
    for place, file in enumerate(files[: len(names)]):
        _place(run.tensors(place), file)
    for part, file in zip(parts, files[len(names) :], strict=True):
        job.stored.fill(part)
        held = job.model.state_dict()
        save_file({name: held[name].contiguous() for name in part}, file, {"format": "pt"})
        del held
        job.stored.empty(part)
    config.save_pretrained(weights)
    copy_companions(path, directory)
    made = job.model.generation_config if job.model.can_generate() else None
    if made is not None and not (weights / "generation_config.json").exists():
        made.save_pretrained(weights)
    index = {
        "metadata": {"total_size": sum(file.stat().st_size for file in files)},
        "weight_map": {name: file.name for file in files for name in sorted(read_sizes([file]))},
    }
    mode = (weights / "config.json").stat().st_mode
    for file in files:  # which safetensors makes private
        file.chmod(mode)
    (weights / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _outside(job: _Job) -> list[str]:
    """Tensors of no block."""
    blocks = tuple(f"{block}." for block in find_blocks(job.model))
    return [name for name in job.stored.names if not name.startswith(blocks)]


def _parts(stored: Stored, names: Iterable[str]) -> Iterator[list[str]]:
    """Names of tensors that are written into a file together."""
    part: list[str] = []
    held, size = stored.model.state_dict(), 0
    for name in names:
        here = math.prod(stored.sizes[name]) * held[name].itemsize
        if part and size + here > PART:
            yield part
            part, size = [], 0
        part.append(name)
        size += here
    if part:
        yield part


def _place(file: Path, target: Path) -> None:
    """The same file under another name as well, a copy where that cannot be."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
