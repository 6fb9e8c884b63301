"""Shared by all benchmarks: their tasks, and how results are kept.

Results are written only where the commit says which code made them: a script refuses to start on a tree whose sources
differ from it, unless `--allow-dirty` is given; the commit then ends in `-dirty`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer

import factorformer
from factorformer import kernels
from factorformer.hf import minilm
from factorformer.report.machine import processor
from factorformer.tasks import data

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DIRTY = "-dirty"


@dataclasses.dataclass(frozen=True)
class Task:
    """A labelled task in the data folder, and the file and metric that results are reported on."""

    name: str
    text: tuple[str, ...]
    test: str
    metric: str


TASKS = {
    task.name: task
    for task in (
        Task("sst2", ("text",), "test.tsv", "accuracy"),
        Task("banking77", ("text",), "test.tsv", "accuracy"),
        Task("mrpc", ("sentence1", "sentence2"), "test.tsv", "f1"),
        Task("cola", ("sentence",), "dev.tsv", "matthews"),
        Task("rte", ("sentence1", "sentence2"), "dev.tsv", "accuracy"),
    )
}


def default_data() -> Path:
    """The folder that FACTORFORMER_DATA names, or the one that stands beside the repository."""
    return Path(os.environ.get("FACTORFORMER_DATA", HERE.parent.parent / "shared" / "data"))


def question_batches(folder: Path, rows: int) -> tuple[list[dict[str, Tensor]], int]:
    """Training questions of banking77 in batches of 32 for MiniLM, and the number of their classes."""
    tokenizer = AutoTokenizer.from_pretrained(minilm.directory())
    table = data.read(folder / "banking77" / "train.tsv").shuffle(seed=0).select(range(rows))
    labels = data.Labels.of(table, "label")
    encoded = data.encode(tokenizer, table, data.Columns(("text",), "label"), labels)
    return [dict(batch) for batch in data.batches(tokenizer, encoded)], len(labels.names)


def options(description: str | None, output: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark can be told.

    Args:
        description: the docstring of the script.
        output: the name of its file of results.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / output, help="file of results")
    parser.add_argument("--allow-dirty", action="store_true", help="write results of sources that are not committed")
    return parser


def start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line, and refuse sources that no commit describes before any time is spent."""
    args = parser.parse_args()
    current = commit()  # read now, whatever is edited while the benchmark runs
    if not args.allow_dirty:
        if not current:
            raise SystemExit("no commit to record beside the results: run from a clone, or give --allow-dirty")
        if current.endswith(DIRTY):
            raise SystemExit(f"not committed: {', '.join(changes())}; commit first, or give --allow-dirty")
    return args


def changes() -> list[str]:
    """Paths of the sources and the benchmarks that differ from the commit; results and docs do not count."""
    paths = ["src", "benchmarks", "pyproject.toml", ":!benchmarks/results"]
    found = _git("status", "--porcelain", "--untracked-files=all", "--", *paths)
    return [line[3:] for line in found.splitlines()]


@functools.cache
def commit() -> str:
    """The commit this process started from, with `-dirty` behind it if sources differ; empty outside of a clone."""
    found = _git("rev-parse", "--short=10", "HEAD").strip()
    return found + DIRTY if found and changes() else found


def _git(*arguments: str) -> str:
    """Standard output of git at the root of the clone; empty if it fails or is not installed."""
    try:
        done = subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16")
"""Of processors, by which products are made."""


def flags() -> list[str]:
    """Which of these the processor has; none where the system does not say."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    known = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return [flag for flag in FLAGS if flag in known]


def machine() -> dict[str, Any]:
    """Hardware and versions recorded with every result; `load` is the mean of the last minute."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "flags": flags(),
        "kernels": kernels.variant(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "factorformer": factorformer.__version__,
        "commit": commit(),
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The finished cells of a results file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Add one finished cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def write(path: Path, content: Any) -> None:
    """Replace a file of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
