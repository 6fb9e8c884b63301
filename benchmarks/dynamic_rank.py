"""What a training step costs while ranks move: the whole run beside dense steps, and where the ranks went.

    python benchmarks/dynamic_rank.py --data ../shared/data

MiniLM on batches of 32 questions of banking77, forward, backward and fused AdamW, word embeddings frozen. After each
step with dynamic ranks comes one of the dense model on the same batch; a step with dynamic ranks contains the look at
gradients and the removals. The table shows medians of the ratio of the two by tenths of the run.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from common import default_data, machine, options, question_batches, start, write
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

import factorformer
from factorformer.hf import minilm
from factorformer.training.dynamic_rank import DynamicRank


class Run:
    """A model with its optimizer, one step at a time."""

    def __init__(self, model: PreTrainedModel, precision: str, ranks: DynamicRank | None) -> None:
        self.model, self.ranks, self.precision = model.train(), ranks, precision
        model.get_input_embeddings().requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)

    def step(self, batch: dict[str, torch.Tensor], done: int, total: int) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.model(**batch).loss
        loss.backward()
        if self.ranks is not None:
            self.ranks.before_step(done, total)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ranks is not None:
            self.ranks.after_step(done + 1, total, self.optimizer)
        return time.perf_counter() - started


def measure(
    method: str, ratio: float, precision: str, batches: list[dict[str, torch.Tensor]], labels: int, total: int
) -> dict[str, Any]:
    """One training beside a dense one."""
    dense, model = (
        AutoModelForSequenceClassification.from_pretrained(minilm.directory(), num_labels=labels) for _ in range(2)
    )
    plan = factorformer.plan(model, method, ratio)
    started = time.perf_counter()
    ranks = DynamicRank(model, plan, batches[:16])
    start = time.perf_counter() - started
    runs = [Run(model, precision, ranks), Run(dense, precision, None)]
    seconds: list[list[float]] = [[], []]
    for done in range(-2, total):
        batch = batches[done % len(batches)]
        for run, record in zip(runs, seconds, strict=True):
            if done < 0 and run.ranks is not None:  # warm-up
                ranks_of, run.ranks = run.ranks, None
                run.step(batch, 0, total)
                run.ranks = ranks_of
            elif done < 0:
                run.step(batch, 0, total)
            else:
                record.append(run.step(batch, done, total))
    relative = [ours / theirs for ours, theirs in zip(*seconds, strict=True)]
    tenth = total // 10
    parts = [relative[first : first + tenth] for first in range(0, tenth * 10, tenth)]
    return {
        "method": method,
        "ratio": ratio,
        "precision": precision,
        "steps": total,
        "start_seconds": start,
        "dense_seconds": statistics.median(seconds[1]),
        "whole_run_relative_to_dense": sum(seconds[0]) / sum(seconds[1]),
        "median_by_tenth": [statistics.median(part) for part in parts],
        "mean_by_tenth": [
            sum(seconds[0][i : i + tenth]) / sum(seconds[1][i : i + tenth]) for i in range(0, tenth * 10, tenth)
        ],
    }


def main() -> None:
    parser = options(__doc__, "dynamic_rank.json")
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with one folder for each task")
    parser.add_argument("--methods", nargs="+", default=["rankdyna", "dynamic_kronecker", "dynamic_dense_sparse"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[3.0, 5.0])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=240)
    args = start(parser)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    batches, labels = question_batches(args.data, 2048)
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()
    batches = [batches[place] for place in order]
    cells = []
    for method in args.methods:
        for precision in args.precisions:
            for ratio in args.ratios:
                cell = measure(method, ratio, precision, batches, labels, args.steps)
                cells.append(cell)
                shown = " ".join(f"{value:.2f}" for value in cell["mean_by_tenth"])
                whole = cell["whole_run_relative_to_dense"]
                print(f"{method} {ratio}x {precision}: whole run {whole:.2f}; by tenths {shown}", flush=True)
    write(args.output, {"cells": cells, "machine": machine()})


if __name__ == "__main__":
    main()
