"""What a training step costs: dense, factors with a fixed support, and straight-through training before and after the
freeze.

    python benchmarks/straight_through.py --data ../shared/data

MiniLM on batches of 32 questions of banking77, forward, backward and fused AdamW, word embeddings frozen; the blocks
are compressed by the plan's default sizes. Steps of all forms take turns; the table shows medians and their ratio to
the dense step. A straight-through step contains its share of the projections, which every `interval` steps make.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from common import default_data, machine, options, question_batches, start, write
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

import factorformer
from factorformer.hf import minilm
from factorformer.training.straight_through import StraightThrough, StraightThroughSettings

TOTAL = 10**6


def stepper(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], precision: str) -> Callable[[int], None]:
    """One training step, on the batch of that number."""
    model.train()
    model.get_input_embeddings().requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step(number: int) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**batches[number % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = options(__doc__, "straight_through.json")
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with one folder for each task")
    parser.add_argument("--ratios", nargs="+", type=float, default=[2.8, 5.0])
    parser.add_argument("--rounds", type=int, default=24)
    args = start(parser)
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    batches, labels = question_batches(args.data, 1024)
    cells = []
    for ratio in args.ratios:
        dense = AutoModelForSequenceClassification.from_pretrained(minilm.directory(), num_labels=labels)
        fixed = copy.deepcopy(dense)
        plan = factorformer.plan(fixed, "dense_sparse", ratio)
        report = factorformer.compress(fixed, plan, batches[:8], keep_statistics=True)
        moving, frozen = copy.deepcopy(fixed), copy.deepcopy(fixed)
        settings = StraightThroughSettings()
        straight = StraightThrough(moving, report.statistics, dense, settings)
        StraightThrough(frozen, report.statistics, dense, settings).after_step(TOTAL, TOTAL)
        for precision in ("fp32", "bf16"):
            forms = {"dense": copy.deepcopy(dense), "fixed support": fixed, "moving": moving, "frozen": frozen}
            steps = {name: stepper(model, batches, precision) for name, model in forms.items()}
            times: dict[str, list[float]] = {name: [] for name in steps}
            projections: list[float] = []
            for number in range(args.rounds + 2):
                for name, step in steps.items():
                    started = time.perf_counter()
                    step(number)
                    times[name].append(time.perf_counter() - started)
                started = time.perf_counter()
                straight.after_step(settings.interval, TOTAL)
                projections.append((time.perf_counter() - started) / settings.interval)
            seconds = {name: statistics.median(values[2:]) for name, values in times.items()}  # without warm-up
            seconds["moving"] += statistics.median(projections[2:])
            relative = {name: value / seconds["dense"] for name, value in seconds.items()}
            cells.append(
                {
                    "ratio": ratio,
                    "precision": precision,
                    "seconds": seconds,
                    "relative_to_dense": relative,
                    "projection_share": statistics.median(projections[2:]) / seconds["moving"],
                }
            )
            shown = "  ".join(f"{name} {value:.2f}" for name, value in relative.items())
            print(f"{ratio}x {precision}: dense {seconds['dense']:.3f} s; relative {shown}", flush=True)
    content = {"interval": StraightThroughSettings().interval, "cells": cells, "machine": machine()}
    write(args.output, content)


if __name__ == "__main__":
    main()
