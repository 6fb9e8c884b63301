"""Plans by loss: do predictions order plans as accuracy does, and does spending bytes where they gain most pay?

    python benchmarks/planning.py --data ../shared/data

MiniLM is fine-tuned on each task (or read from `--work`), and compressed by twenty plans: uniform ones, by loss, auto,
and random allocations. Each is predicted before any fit for good, then carried out and scored on test rows without any
training. A plan that has a budget in milliseconds is timed against the dense model. `--labels` takes gradients of the
loss of given labels, in place of labels drawn from the model's predictions.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from common import TASKS, Task, default_data, machine, options, start, write
from scipy.stats import spearmanr
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import factorformer
from factorformer import planning, recipes
from factorformer.fitting import Metric
from factorformer.fitting import statistics as calibration
from factorformer.fitting.matrices import fit_matrix
from factorformer.fitting.moments import LayerStatistics
from factorformer.hf import minilm
from factorformer.layers.dense import dense_weight
from factorformer.layers.surgery import find_matrices
from factorformer.planning import Entry, Plan
from factorformer.planning.evidence.prediction import Prediction
from factorformer.report import latency
from factorformer.structures import STRUCTURES, LowRank
from factorformer.tasks import data as task_data
from factorformer.tasks import evaluation
from factorformer.tasks import finetuning as training

IMAGE = Path(__file__).parent.parent / "docs" / "images" / "planning.svg"
EVERYWHERE = ("whitened", "fisher", "auto")
SOMEWHERE = ("svd", "kronecker_whitened", "random-0", "random-1")


class Bench:
    """A fine-tuned model, its data, and what is measured of it once."""

    def __init__(self, task: Task, args: argparse.Namespace) -> None:
        self.task, self.args = task, args
        folder, columns = args.data / task.name, task_data.Columns(task.text, "label")
        self.tokenizer = AutoTokenizer.from_pretrained(minilm.directory())
        train = task_data.sample(task_data.read(folder / "train.tsv"), args.train_rows)
        test = task_data.sample(task_data.read(folder / task.test), args.test_rows)
        self.labels = task_data.Labels.of(train, "label")
        self.train, self.test = (task_data.encode(self.tokenizer, rows, columns, self.labels) for rows in (train, test))
        self.model = self.dense()
        rows = task_data.sample(self.train, args.calibration_rows)
        rows = rows if args.labels else rows.remove_columns("labels")
        self.calibration = list(task_data.batches(self.tokenizer, rows))
        found, self.rest = find_matrices(self.model)
        self.matrices = [matrix for matrix in found if matrix.dense is None]
        names = [matrix.name for matrix in self.matrices]
        self.statistics = calibration.collect(self.model, names, self.calibration, "fisher")
        self.known: dict[float, Prediction] = {}

    def prediction(self, ratio: float) -> Prediction:
        """Curves of all structures around a ratio, as `factorformer.plan` measures them; kept for all plans of it."""
        if ratio not in self.known:
            self.known[ratio] = Prediction.of(
                self.model, self.matrices, lambda _: list(STRUCTURES.values()), self.statistics, ratio
            )
        return self.known[ratio]

    def dense(self) -> PreTrainedModel:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            minilm.directory(), num_labels=len(self.labels.names)
        )
        path = self.args.work / f"{self.task.name}{self.args.suffix}"
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
        else:
            settings = training.TrainingSettings(epochs=6, learning_rate=2e-4)
            training.train(model, self.tokenizer, self.train, settings)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path)
        return model.eval()

    def accuracy(self, model: PreTrainedModel) -> float:
        return evaluation.evaluate(model, self.tokenizer, self.test, self.labels)["accuracy"]

    def plan(self, method: str, ratio: float) -> Plan:
        name, _, seed = method.partition("-")
        if name not in ("random", "fisher", "auto"):
            return factorformer.plan(self.model, name, ratio)
        known = self.prediction(ratio)
        if name == "random":
            draw = random.Random(int(seed))
            drawn = {name: math.exp(draw.uniform(-3, 3)) for name in known.curves}
            known = Prediction({n: dataclasses.replace(c, energy=drawn[n]) for n, c in known.curves.items()})
        options = {m.name: known.options(m, lambda matrix, spec: matrix.cost(spec).bytes) for m in self.matrices}
        if name != "auto":
            options = {
                n: [o for o in some if o.spec is None or isinstance(o.spec, LowRank)] for n, some in options.items()
            }
        entries = planning.by_loss(self.matrices, options, ratio, self.rest.bytes)
        return Plan("auto" if name == "auto" else "fisher", "blocks", ratio, entries, self.rest)

    def predicted(self, plan: Plan) -> float:
        if recipes.get(plan.method or "fisher").metric == "fisher":
            return self.prediction(plan.target).rise(plan.entries)
        # Another fit has no curve in this metric: it is made, and judged there.
        return math.fsum(self.judged(plan, entry) for entry in plan.factorized)

    def judged(self, plan: Plan, entry: Entry) -> float:
        """The predicted rise of the loss after a fit to something else."""
        assert entry.spec is not None
        name, statistics = entry.matrix.name, self.statistics[entry.matrix.name]
        other = (
            {} if recipes.get(plan.method or "fisher").metric == "plain" else {name: LayerStatistics(statistics.inputs)}
        )
        factors, _ = fit_matrix(self.model, entry.matrix, entry.spec, other)
        with torch.no_grad():
            dense = entry.spec.to_dense(entry.matrix.shape, factors)
        metric = Metric.of(statistics)
        error = dense_weight(self.model.get_submodule(name)) - dense
        return self.prediction(plan.target).others[name] * metric.scale * float(metric.apply(error).square().sum())

    def carried_out(self, plan: Plan) -> PreTrainedModel:
        """What `factorformer.compress` makes, without measuring the same statistics again for every plan."""
        model, fisher = copy.deepcopy(self.model), recipes.get(plan.method or "fisher").metric == "fisher"
        plan = dataclasses.replace(plan, statistics=self.statistics if fisher else {})
        factorformer.compress(model, plan, self.calibration)
        return model

    def run(self, method: str, ratio: float) -> dict[str, Any]:
        plan = self.plan(method, ratio)
        predicted = self.predicted(plan)
        kinds = [entry.spec.kind if entry.spec else "dense" for entry in plan.entries]
        row = {
            "task": self.task.name,
            "method": method,
            "ratio": ratio,
            "measured_ratio": round(plan.ratio, 4),
            "predicted": round(predicted, 5),
            "accuracy": round(self.accuracy(self.carried_out(plan)), 5),
            "structures": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        }
        print(json.dumps(row), flush=True)
        return row

    def seconds(self) -> dict[str, Any]:
        """How long `factorformer.plan` takes with everything that it measures, and the plan."""
        started = time.perf_counter(), time.process_time()
        self.automatic = factorformer.plan(self.model, "auto", 3, calibration=self.calibration)
        row = {
            "task": self.task.name,
            "wall": round(time.perf_counter() - started[0], 1),
            "cpu": round(time.process_time() - started[1], 1),
            "load": os.getloadavg()[0],
            "predicted": self.automatic.predicted,
        }
        print(json.dumps(row), flush=True)
        return row

    def timed(self, ratio: float) -> dict[str, Any]:
        """A plan for fewer milliseconds, and the latencies that it leads to."""
        plan = factorformer.plan(self.model, "auto", ratio, budget="milliseconds", calibration=self.calibration)
        assert plan.milliseconds is not None
        model = self.carried_out(plan)
        inputs = {"input_ids": torch.randint(1000, 2000, (8, 64)), "attention_mask": torch.ones(8, 64).long()}
        # The fastest of many, as in the plan: others who use the machine only make it slower.
        before, after = map(min, zip(*(latency([self.model, model], inputs, 1) for _ in range(25)), strict=True))
        kinds = [entry.spec.kind if entry.spec else "dense" for entry in plan.entries]
        row = {
            "task": self.task.name,
            "asked_ratio_of_products": ratio,
            "products_ms": [round(value, 2) for value in plan.milliseconds],
            "expected_saving_ms": round(plan.milliseconds[0] - plan.milliseconds[1], 2),
            "model_ms": [round(before, 2), round(after, 2)],
            "measured_saving_ms": round(before - after, 2),
            "bytes_ratio": round(plan.ratio, 3),
            "predicted": round(plan.predicted or 0, 5),
            "accuracy": round(self.accuracy(model), 5),
            "structures": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        }
        print(json.dumps(row), flush=True)
        return row


def correlations(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Spearman's rank correlation of predicted error and measured error, over all plans and within a ratio."""

    def of(some: list[dict[str, Any]]) -> float:
        return round(float(spearmanr([r["predicted"] for r in some], [-r["accuracy"] for r in some])[0]), 3)

    within = {f"{ratio:g}x": [r for r in rows if r["ratio"] == ratio] for ratio in sorted({r["ratio"] for r in rows})}
    return {
        "plans": len(rows),
        "all": of(rows),
        **{name: {"plans": len(some), "spearman": of(some)} for name, some in within.items() if len(some) > 3},
    }


def draw(plan: Plan, path: Path) -> None:
    """Where the bytes went, for each layer and kind of matrix."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "planning"
    import matplotlib.pyplot as plt

    kinds = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    titles = ["query", "key", "value", "attention output", "feed-forward in", "feed-forward out"]
    colors = {"dense": "0.6", "low_rank": "C0", "kronecker_sum": "C1", "dense_sparse": "C2"}
    figure, axes = plt.subplots(1, len(kinds), figsize=(11, 2.6), sharey=True)
    for axis, kind, title in zip(axes, kinds, titles, strict=True):
        entries = [
            e
            for e in plan.entries
            if e.matrix.name.endswith(kind) and ("attention" in kind or "attention.output" not in e.matrix.name)
        ]
        parts = [100 * e.compressed.bytes / e.original.bytes for e in entries]
        axis.bar(range(len(parts)), parts, color=[colors[e.spec.kind if e.spec else "dense"] for e in entries])
        axis.axhline(100 / plan.target, color="black", linewidth=0.8, linestyle="--")
        axis.set(title=title, xlabel="layer", xticks=range(len(parts)))
        axis.title.set_size(9)
    axes[0].set_ylabel("% of dense bytes")
    used = dict.fromkeys(e.spec.kind if e.spec else "dense" for e in plan.entries)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colors[kind]) for kind in used]
    figure.legend(handles, [kind.replace("_", "-") for kind in used], loc="outside lower center", ncols=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = options(__doc__, "planning.json")
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with one folder for each task")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "banking77"], choices=TASKS)
    parser.add_argument("--ratios", nargs="*", type=float, default=[2, 3, 5, 10], help="of uniform, by_loss and auto")
    parser.add_argument("--compared", nargs="*", type=float, default=[3, 5], help="ratios of all other plans too")
    parser.add_argument("--times", nargs="*", type=float, default=[1.5, 2], help="ratios of milliseconds")
    parser.add_argument("--train-rows", type=int, default=4000)
    parser.add_argument("--test-rows", type=int, default=800)
    parser.add_argument("--calibration-rows", type=int, default=256)
    parser.add_argument("--labels", action="store_true", help="calibrate on the loss of labels")
    parser.add_argument("--methods", nargs="+", default=EVERYWHERE, help="at all ratios")
    parser.add_argument("--work", type=Path, default=Path("runs/planning"), help="fine-tuned models are kept here")
    parser.add_argument("--suffix", default="-dense.pt", help="of their file names, after the task's name")
    parser.add_argument("--image", type=Path, default=IMAGE)
    args = start(parser)
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    content: dict[str, Any] = {
        "machine": machine(),
        "rows": [],
        "timed": [],
        "plan_seconds": [],
        "dense": {},
        "spearman": {},
    }
    content["calibration_rows"], content["test_rows"], content["labels"] = (
        args.calibration_rows,
        args.test_rows,
        args.labels,
    )

    def keep() -> None:
        rows = content["rows"]
        for name in dict.fromkeys(row["task"] for row in rows):
            same = [row for row in rows if row["task"] == name]
            if len(same) > 3:
                content["spearman"][name] = correlations(same)
        write(args.output, content)

    for task in (TASKS[name] for name in args.tasks):
        bench = Bench(task, args)
        content["dense"][task.name] = round(bench.accuracy(bench.model), 5)
        for ratio in [*args.compared, *(r for r in args.ratios if r not in args.compared)]:
            for method in (*args.methods, *(SOMEWHERE if ratio in args.compared else ())):
                content["rows"].append(bench.run(method, ratio))
                keep()
        for ratio in args.times:
            content["timed"].append(bench.timed(ratio))
            keep()
        if "auto" in args.methods:
            content["plan_seconds"].append(bench.seconds())
            keep()
            if task.name == args.tasks[0]:
                draw(bench.automatic, args.image)
    print(json.dumps(content["spearman"], indent=1))


if __name__ == "__main__":
    main()
