"""What every benchmark shares: the machine it ran on, the tasks, and how results are kept."""

# ruff: noqa: E402

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

# Before transformers, which looks for a package of this name and would take the script beside this one for it.
sys.modules["kernels"] = None  # type: ignore[assignment]

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer

import factorformer
from factorformer.hf import minilm
from factorformer.report.machine import processor
from factorformer.tasks import data

HERE = Path(__file__).parent
RESULTS = HERE / "results"


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


def machine() -> dict[str, Any]:
    """Processor or GPU, threads, and the versions that decide a figure."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "factorformer": factorformer.__version__,
        "commit": commit.stdout.strip(),
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The finished cells of a results file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Add one finished cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
