"""Size of the files, time to load, and peak memory of a model: the latter two in a separate process.

    python -m factorformer.bench.footprint '{"name": "minilm", "shape": "8x64", "threads": 2, ...}'

prints one JSON object as its last line.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from factorformer.bench.candidates import PRECISIONS, Candidate, draw, load, parse
from factorformer.bench.comparison import Shape
from factorformer.bench.generation import Length, bind
from factorformer.errors import ModelError, one_line

LOADS = 3
"""Number of timed loads."""

FAILED = 3
"""Exit code of a process that has written the reason to standard error."""

STATUS = Path("/proc/self/status")


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Size, load time and peak memory of a model.

    Args:
        file_bytes: of its weight files. A variant that changes the weights has no file: then those that `torch.save`
            makes of its state.
        load_milliseconds: from files, which the system holds in memory already, to a model that can run: the median of
            three loads, after one that does not count. A compiler compiles later, in the first pass over a shape.
        peak_bytes: resident memory at its highest while the model was loaded and ran, less what the process held after
            its imports. Pages of files that are mapped into memory count.
        import_bytes: what that is.
        gpu_peak_bytes: of the GPU's memory; None on a CPU.
    """

    file_bytes: int
    load_milliseconds: float
    peak_bytes: int
    import_bytes: int
    gpu_peak_bytes: int | None = None


def footprint(
    candidate: Candidate,
    shape: Shape,
    threads: int,
    device: str = "cpu",
    seed: int = 0,
    vocabulary: int | None = None,
    generates: Length | None = None,
) -> Footprint:
    """Load a model in a new process, and run it there.

    Args:
        candidate: from `candidates.parse`.
        shape: of the input.
        threads: of torch or of ONNX Runtime.
        device: for the models that torch runs.
        seed: of the words.
        vocabulary: ids of words are below it, for models that do not tell how many they know.
        generates: a prompt and so many tokens behind it, in place of a pass over the shape.

    Raises:
        ModelError: the process failed.
    """
    job: dict[str, Any] = {
        "name": candidate.name,
        "shape": str(shape),
        "threads": threads,
        "device": device,
        "seed": seed,
        "vocabulary": vocabulary,
        "generates": None if generates is None else str(generates),
    }
    command = [sys.executable, "-W", "ignore", "-m", __name__, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        # A process that the system ended, for want of memory above all, gives no reason.
        ended = f"its process ended with exit code {done.returncode}"
        why = (done.stderr.strip().splitlines() or [ended])[-1] if done.returncode == FAILED else ended
        raise ModelError(f"cannot measure the memory of '{candidate.name}': {why}")
    return Footprint(**json.loads(done.stdout.strip().splitlines()[-1]))


def measure(
    candidate: Candidate,
    shape: Shape,
    threads: int,
    device: torch.device,
    seed: int,
    vocabulary: int | None,
    generates: Length | None = None,
) -> Footprint:
    """The same in this process, which should not have done anything else before."""
    torch.set_num_threads(threads)
    _import_what_runs(candidate)
    imported = _reset_peak()
    runner = load(candidate, threads, device)
    run: Callable[[], object] = runner.prepare(draw([runner], shape.batch, shape.tokens, seed, vocabulary))
    if generates is not None:
        prompt = draw([runner], 1, generates.prompt, seed, vocabulary).to(device)
        run = bind(candidate, runner.module, prompt, generates, device)
    with torch.inference_mode():
        for _ in range(2):
            run()
    peak = _peak()
    files = sum(file.stat().st_size for file in candidate.files)
    if runner.module is not None and set(candidate.variants) & set(PRECISIONS):
        files = _saved(runner.module)
    gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    del runner, run
    return Footprint(files, _load_time(candidate, threads, device), peak - imported, imported, gpu)


def _load_time(candidate: Candidate, threads: int, device: torch.device) -> float:
    times: list[float] = []
    for _ in range(LOADS):
        started = time.perf_counter()
        load(candidate, threads, device)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def _import_what_runs(candidate: Candidate) -> None:
    if candidate.route != "torch":
        importlib.import_module(candidate.route)
        return
    import transformers

    from factorformer.hf.source import read_config

    for name in read_config(candidate.path).architectures or []:
        getattr(transformers, name, None)  # its module is imported when it is asked for


def _reset_peak() -> int:
    """Reset the peak of resident memory, where the system can; the memory in use now, in bytes."""
    if STATUS.exists():
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return _peak()
        return _status("VmRSS")
    return _peak()


def _peak() -> int:
    """The highest resident memory of this process, in bytes."""
    if STATUS.exists():  # `getrusage` would count what the parent held before it started this one
        return _status("VmHWM")
    if os.name == "nt":
        import psutil

        return psutil.Process().memory_info().peak_wset  # pyright: ignore
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _saved(module: torch.nn.Module) -> int:
    with tempfile.TemporaryFile() as file:
        torch.save(module.state_dict(), file)
        return file.tell()


def main(arguments: list[str]) -> int:
    """Measure what `footprint` asks for, and print it as JSON."""
    warnings.simplefilter("ignore")
    job: dict[str, Any] = json.loads(arguments[0])
    try:
        found = measure(
            parse(job["name"]),
            Shape.parse(job["shape"]),
            job["threads"],
            torch.device(job["device"]),
            job["seed"],
            job["vocabulary"],
            Length.parse(job["generates"]) if job["generates"] else None,
        )
    except Exception as error:  # whatever it is, the parent names the model
        print(one_line(error), file=sys.stderr)
        return FAILED
    print(json.dumps(dataclasses.asdict(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
