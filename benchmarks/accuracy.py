"""Accuracy after compression and fine-tuning: methods x tasks x ratios x seeds, on real data.

    python benchmarks/accuracy.py --data ../shared/data --minutes 60

Protocol, the same for every method: MiniLM is fine-tuned on the task (`dense`); the method compresses that model with
512 training rows as calibration data; the result is fine-tuned on the same rows. The learning rate of each
method is chosen on a slice of train, at the first ratio, by a search of equal cost: a dense model trained on the slice
alone is compressed, fine-tuned on the slice with each candidate, and scored on other rows of train. Nothing is chosen
by test rows: they give the two figures that are reported, before and after fine-tuning.

Methods with dynamic ranks start from the pre-trained model instead, and do all in one round: with --epochs 6 they train
as long as the others with --dense-epochs 3 --epochs 3. `rankdyna:dense=1` starts from the fine-tuned model as the
others do. Other settings of a method stand behind its name in the same way, as in `dsformer:freeze=0.6,interval=1`.
`auto:int8=1` stores factors in int8, which the ratio counts; fine-tuning rounds them.

Peers that only quantize: `torchao-int8` (8 bits, no further training), `torchao-int3` and `torchao-int4` (with
torchao's own training that rounds the weights), of which bytes are counted as if packed without a gap.

Each finished cell is one JSON line; a run skips what is there already, so it can be stopped and continued.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from common import TASKS, Task, append_line, default_data, machine, options, read_lines, start
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import factorformer
from factorformer import recipes
from factorformer.files import output_directory
from factorformer.hf import minilm
from factorformer.layers.nn import FactorizedMatrix
from factorformer.layers.surgery import find_blocks, find_matrices
from factorformer.tasks import data as task_data
from factorformer.tasks import evaluation
from factorformer.tasks import finetuning as training
from factorformer.training.dynamic_rank import DynamicRank, DynamicRankSettings
from factorformer.training.straight_through import StraightThrough, StraightThroughSettings

RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
SLICE, HELD_OUT, CALIBRATION = 1600, 800, 512
DISTILLED = "+distill"
PATTERN = 32
SETUP = ("train_rows", "precision", "unique_layers")
WITHOUT_RATIO = ("torchao-int8", "torchao-int4", "torchao-int3", "dense-longer")
GROUP = 128
"""Weights that share a scale in torchao's int3 and int4."""
SETTINGS = training.TrainingSettings()


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement; `ratio` is that of the bytes of the Transformer blocks (None: the method decides)."""

    task: str
    method: str
    ratio: float | None
    seed: int

    def key(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def grid(tasks: list[str], methods: list[str], ratios: list[float], seeds: list[int]) -> list[Cell]:
    """All cells, the most telling first: one seed of every method before the second seed of any."""
    cells = []
    for seed in seeds:
        cells += [Cell(task, "dense", None, seed) for task in tasks]
        for method in methods:
            if method in WITHOUT_RATIO:
                cells += [Cell(task, method, None, seed) for task in tasks]
        for ratio in ratios:
            for task in tasks:
                cells += [Cell(task, m, ratio, seed) for m in methods if m not in WITHOUT_RATIO]
    return cells


Reduced = tuple[PreTrainedModel, StraightThrough | DynamicRank | None]
"""A model, and what acts on it while it is trained."""


def options_of(method: str) -> tuple[str, dict[str, Any]]:
    """The name of a method, and the settings behind it."""
    name, _, options = method.partition(":")
    found = re.findall(r"(\w+)=([^,]+)", options)
    return name, {key: value if value[0].isalpha() else json.loads(value) for key, value in found}


class Bench:
    """Data, models and settings of a run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dense_epochs = args.dense_epochs or args.epochs
        self.model = args.model or str(minilm.directory())
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        self._data: dict[str, tuple[datasets.Dataset, datasets.Dataset, task_data.Labels]] = {}

    def data(self, task: Task) -> tuple[datasets.Dataset, datasets.Dataset, task_data.Labels]:
        """Encoded training rows, test rows, and the labels."""
        if task.name not in self._data:
            folder, columns = self.args.data / task.name, task_data.Columns(task.text, "label")
            train = task_data.sample(task_data.read(folder / "train.tsv"), self.args.train_rows or 10**9)
            test = task_data.read(folder / task.test)
            labels = task_data.Labels.of(train, "label")
            encode = [task_data.encode(self.tokenizer, rows, columns, labels) for rows in (train, test)]
            self._data[task.name] = (encode[0], encode[1], labels)
        return self._data[task.name]

    def fresh(self, task: Task, weights: Path | None = None) -> PreTrainedModel:
        """The pre-trained model with a new head, layers shared if asked for; or the same with trained weights."""
        torch.manual_seed(0)
        labels = self.data(task)[2]
        model = AutoModelForSequenceClassification.from_pretrained(self.model, num_labels=len(labels.names))
        if self.args.unique_layers:
            layers = model.base_model.encoder.layer
            for index in range(len(layers)):
                layers[index] = layers[
                    index * self.args.unique_layers // len(layers) * len(layers) // self.args.unique_layers
                ]
        if weights is not None:
            model.load_state_dict(torch.load(weights, weights_only=True))
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    def dense(self, task: Task, seed: int) -> PreTrainedModel:
        """The dense fine-tuned model; trained once for each task and seed, then read from the work folder."""
        path = self.args.work / f"{task.name}-{seed}-{self._name()}"
        if not path.exists():
            model, rate = self.fresh(task), self.rate(task, "dense", None)
            started = time.process_time()
            settings = self.settings(rate, seed, self.dense_epochs)
            seconds = training.train(model, self.tokenizer, self.data(task)[0], settings)
            print(f"  dense {task.name}: {seconds:.0f} s, {time.process_time() - started:.0f} CPU s", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path)
        return self.fresh(task, path)

    def _name(self) -> str:
        shared = f"-{self.args.unique_layers}-layers" if self.args.unique_layers else ""
        return f"{self.dense_epochs:g}-{self.args.train_rows or 'all'}-{self.args.precision}{shared}.pt"

    def settings(self, rate: float, seed: int, epochs: float | None = None) -> training.TrainingSettings:
        return dataclasses.replace(
            SETTINGS,
            epochs=self.args.epochs if epochs is None else epochs,
            learning_rate=rate,
            seed=seed,
            precision=self.args.precision,
        )

    def rate(self, task: Task, method: str, ratio: float | None) -> float:
        """The best learning rate of a method on a task, searched on a slice of train once."""
        if self.args.rate is not None and method != "dense":
            return self.args.rate
        name = method.removesuffix(DISTILLED)
        key: dict[str, Any] = {"task": task.name, "method": name}
        if name != "dense":  # whose own epochs in the search are always the same
            key["dense_epochs"] = self.dense_epochs
        key |= {name: getattr(self.args, name) for name in SETUP}
        for row in read_lines(self.args.rates):
            if row | key == row:
                return row["rate"]
        train, _, labels = self.data(task)
        shuffled = train.shuffle(seed=1234)
        learn = shuffled.select(range(min(SLICE, len(train) * 2 // 3)))
        check = shuffled.select(range(len(learn), min(len(learn) + HELD_OUT, len(train))))
        batches = self._batches(task_data.sample(learn, CALIBRATION))
        from_start, epochs = self.dynamic(name), 2.0
        if from_start:
            epochs = self.args.epochs
            start: Reduced = (self.fresh(task), None)
        elif name == "dense":
            start = self.fresh(task), None
        else:
            start = self.reduce(self._slice_model(task, learn), name, ratio, batches, f"{task.name}-slice")
        scores = {}
        for rate in RATES:
            model, acting = copy.deepcopy(start)
            if from_start:
                model, acting = self.reduce(model, name, ratio, batches, "")
            self.train(model, acting, learn, self.settings(rate, 0, epochs))
            scores[rate] = evaluation.evaluate(model, self.tokenizer, check, labels)[task.metric]
        best = max(scores, key=scores.__getitem__)
        append_line(self.args.rates, {**key, "ratio": ratio, "rate": best, "scores": scores})
        print(f"  learning rate of {name} on {task.name}: {scores}", flush=True)
        return best

    def train(
        self,
        model: PreTrainedModel,
        acting: StraightThrough | DynamicRank | None,
        rows: datasets.Dataset,
        settings: training.TrainingSettings,
        teacher: PreTrainedModel | None = None,
    ) -> None:
        straight = acting if isinstance(acting, StraightThrough) else None
        ranks = acting if isinstance(acting, DynamicRank) else None
        training.train(model, self.tokenizer, rows, settings, teacher=teacher, straight=straight, ranks=ranks)

    def dynamic(self, method: str) -> bool:
        """Whether a method starts from the model as it was before any fine-tuning."""
        name, options = options_of(method)
        recipe = recipes.RECIPES.get(name)
        return recipe is not None and recipe.allocation == "dynamic" and not options.get("dense")

    def _slice_model(self, task: Task, learn: datasets.Dataset) -> PreTrainedModel:
        path = self.args.work / f"{task.name}-slice-{self._name()}"
        if not path.exists():
            model = self.fresh(task)
            settings = self.settings(self.rate(task, "dense", None), 0, self.dense_epochs)
            training.train(model, self.tokenizer, learn, settings)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path)
        return self.fresh(task, path)

    def _batches(self, rows: datasets.Dataset) -> list[dict[str, torch.Tensor]]:
        return list(task_data.batches(self.tokenizer, rows))

    def reduce(
        self,
        model: PreTrainedModel,
        method: str,
        ratio: float | None,
        batches: list[dict[str, torch.Tensor]],
        name: str,
    ) -> Reduced:
        """Compress a model by one of our methods, in its training form if it has one, or by a peer.

        Methods that differ in their training alone start from the same fit, which is kept in the work folder.
        """
        method, options = options_of(method)
        if method not in recipes.RECIPES:
            return PEERS[method](model, ratio), None
        assert ratio is not None
        recipe, int8 = recipes.get(method), bool(options.pop("int8", False))
        if recipe.allocation == "dynamic":
            fresh = not options.pop("dense", None)
            plan = factorformer.plan(model, method, ratio, int8=int8)
            return model, DynamicRank(model, plan, batches, DynamicRankSettings(**options), new_head=fresh)
        dense = model
        path = (
            self.args.work
            / "fits"
            / f"{name}-{recipe.kind}-{recipe.metric}-{recipe.allocation}-{int8}-{ratio:g}-{self._name()}"
        )
        if path.exists():
            model, statistics = torch.load(path, weights_only=False)
        else:
            model = copy.deepcopy(dense)
            needed = batches if recipe.needs != "nothing" else None
            plan = factorformer.plan(model, method, ratio, int8=int8, calibration=needed)
            report = factorformer.compress(model, plan, needed, keep_statistics=True, hold_floats=int8)
            statistics = report.statistics
            if recipe.structure is factorformer.DenseSparse:  # others are fitted faster than they are read
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save((model, statistics), path)
        if recipe.training != "straight-through":
            return model, None
        return model, StraightThrough(model, statistics, dense, StraightThroughSettings(**options))

    def run(self, cell: Cell) -> dict[str, Any]:
        """Measure one cell."""
        task = TASKS[cell.task]
        train, test, labels = self.data(task)
        method = cell.method.removesuffix(DISTILLED)
        model = self.fresh(task) if self.dynamic(method) else self.dense(task, cell.seed)
        original = block_bytes(model)
        row: dict[str, Any] = cell.key()
        started, cpu = time.perf_counter(), time.process_time()
        if method == "dense":
            row["learning_rate"] = self.rate(task, "dense", None)
        else:
            teacher = self.dense(task, cell.seed) if cell.method.endswith(DISTILLED) else None
            batches = self._batches(task_data.sample(train, CALIBRATION, cell.seed))
            model, acting = self.reduce(model, method, cell.ratio, batches, f"{task.name}-{cell.seed}")
            if not isinstance(acting, DynamicRank):
                row["before_training"] = evaluation.evaluate(model, self.tokenizer, test, labels)[task.metric]
            if method != "torchao-int8":
                row["learning_rate"] = self.rate(task, method, cell.ratio)
                row["rate_searched"] = self.args.rate is None
                started, cpu = time.perf_counter(), time.process_time()
                settings = self.settings(row["learning_rate"], cell.seed)
                self.train(model, acting, train, settings, teacher)
                factorformer.quantize(model)
                if isinstance(acting, DynamicRank):
                    row["ranks"] = acting.history.final
                    if self.args.histories:
                        self.args.histories.mkdir(parents=True, exist_ok=True)
                        content = json.dumps(acting.history.to_dict())
                        name = f"{task.name}-{method.replace(':', '-')}-{cell.ratio:g}-{cell.seed}.json"
                        (self.args.histories / name).write_text(content)
        row["seconds"] = round(time.perf_counter() - started, 1)
        row["cpu_seconds"] = round(time.process_time() - cpu, 1)
        row["block_bytes"] = block_bytes(model)
        row["measured_ratio"] = round(original / row["block_bytes"], 4)
        row["metrics"] = evaluation.evaluate(model, self.tokenizer, test, labels)
        row["metric"] = row["metrics"][task.metric]
        if any(isinstance(module, FactorizedMatrix) and not module.quantized for module in model.modules()):
            row["int8_block_bytes"] = round_to_int8(model)
            row["int8_ratio"] = round(original / row["int8_block_bytes"], 4)
            row["int8_metric"] = evaluation.evaluate(model, self.tokenizer, test, labels)[task.metric]
        ours = any(isinstance(module, FactorizedMatrix) for module in model.modules())
        if self.args.keep and (ours or method == "dense"):
            place = self.args.keep / f"{task.name}-{cell.method.replace(':', '-')}-{cell.ratio or 1:g}-{cell.seed}"
            with output_directory(place, overwrite=True) as folder:
                model.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
            row["onnx_int8_metric"] = self.in_onnx_runtime(place, test, labels)[task.metric]
        return {**row, "test_rows": len(test), "machine": machine()}

    def in_onnx_runtime(self, place: Path, test: datasets.Dataset, labels: task_data.Labels) -> dict[str, float]:
        """Metrics of the exported int8 file of a model directory, made beside it."""
        import onnxruntime

        from factorformer.export.onnx import export

        made = export(place, place.with_name(f"{place.name}-onnx-int8"), int8=True, overwrite=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(made.path / "model.onnx"), options)
        logits, order = [], []
        for rows, batch in task_data.indexed_batches(self.tokenizer, test, 32):
            feed = {name: batch[name].numpy() for name in made.inputs}
            logits.append(session.run(None, feed)[0])
            order += rows
        return evaluation.score(np.concatenate(logits)[np.argsort(order)], np.asarray(test["labels"]), labels)


def block_bytes(model: nn.Module) -> int:
    """Bytes of all tensors inside the Transformer blocks, as they are stored, scales and indices included."""
    total = 0
    for name in find_blocks(model) or []:
        state = model.get_submodule(name).state_dict()
        for child, module in model.get_submodule(name).named_modules():
            if hasattr(module, "bits"):  # packed without a gap, and two bytes a scale
                weights = state.pop(f"{child}.weight").numel()
                total += weights * module.bits // 8 + 2 * weights // GROUP
        for key, tensor in state.items():
            mask = state.get(key.removesuffix("_orig") + "_mask")
            if key.endswith("_mask"):
                total += -(-tensor.numel() // 8)  # a bitmap
            else:
                total += stored_bytes(tensor) if mask is None else int(mask.sum()) * tensor.element_size()
    return total


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; of a torchao tensor, those of its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def round_to_int8(model: nn.Module) -> int:
    """Round the values of all factors to 8 bits, a scale for each row, in place; bytes of the blocks if so stored."""
    total, seen = block_bytes(model), set()
    for module in model.modules():
        if not isinstance(module, FactorizedMatrix):
            continue
        for tensor in module.factors.values():
            if tensor.is_floating_point() and id(tensor) not in seen:
                seen.add(id(tensor))
                values = tensor.detach().flatten(1)
                scale = values.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
                values.copy_((values / scale).round() * scale)
                total -= values.numel() * (values.element_size() - 1) - scale.numel() * scale.element_size()
    return total


def fasterai(model: PreTrainedModel, ratio: float | None) -> PreTrainedModel:
    """Plain SVD at one fraction of singular values, by fasterai's own code (`pip install --no-deps fasterai`)."""
    from fasterai.misc.fc_decomposer import FC_Decomposer

    assert ratio is not None
    matrices, rest = find_matrices(model, "blocks")
    dense = sum(m.cost(None).bytes for m in matrices)
    budget = (dense + rest.bytes) / ratio - rest.bytes

    def spent(removed: float) -> int:
        return sum(4 * int((1 - removed) * min(m.shape)) * sum(m.shape) for m in matrices)

    removed = next(step / 1000 for step in range(1000) if spent(step / 1000) <= budget)
    return FC_Decomposer().decompose(model, percent_removed=removed, layers=[m.name for m in matrices])


def torchao_int8(model: PreTrainedModel, ratio: float | None) -> PreTrainedModel:
    """Weight-only int8 of the block matrices, without further training."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    names = {m.name for m in find_matrices(model, "blocks")[0]}
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in names)
    return model


def torchao_trained(bits: int) -> Callable[[PreTrainedModel, float | None], PreTrainedModel]:
    """Weights of few bits, symmetric, a scale for each group, and the fine-tuning that goes with them."""

    def reduce(model: PreTrainedModel, ratio: float | None) -> PreTrainedModel:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        names = {m.name for m in find_matrices(model, "blocks")[0]}
        weights = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), group_size=GROUP, is_symmetric=True)
        quantize_(model, QATConfig(weight_config=weights, step="prepare"), filter_fn=lambda module, name: name in names)
        for name in names:
            model.get_submodule(name).bits = bits
        return model

    return reduce


def magnitude_nm(model: PreTrainedModel, ratio: float | None) -> PreTrainedModel:
    """The largest N of every 32 consecutive weights of a row, without a dictionary; which ones stay is fixed."""
    from torch.nn.utils import prune

    assert ratio is not None
    matrices, rest = find_matrices(model, "blocks")
    values = sum(math.prod(m.shape) for m in matrices)
    budget = (4 * values + rest.bytes) / ratio - rest.bytes
    kept = round((budget / values - 1 / 8) / 4 * PATTERN)
    for matrix in matrices:
        module = model.get_submodule(matrix.name)
        groups = module.weight.detach().abs().unflatten(1, (-1, PATTERN))
        chosen = groups.topk(kept, dim=2).indices
        prune.custom_from_mask(module, "weight", torch.zeros_like(groups).scatter_(2, chosen, 1).flatten(1))
    return model


def dense_longer(model: PreTrainedModel, ratio: float | None) -> PreTrainedModel:
    """The dense model as it is: with the second round of fine-tuning it has trained as long as the compressed ones."""
    return model


PEERS: dict[str, Callable[[PreTrainedModel, float | None], PreTrainedModel]] = {
    "dense-longer": dense_longer,
    "fasterai-svd": fasterai,
    "magnitude-nm": magnitude_nm,
    "torchao-int3": torchao_trained(3),
    "torchao-int4": torchao_trained(4),
    "torchao-int8": torchao_int8,
}


def table(rows: list[dict[str, Any]]) -> str:
    """Results as Markdown, mean over seeds."""
    lines = ["| task | method | block bytes ratio | before training | after | runs |", "|---|---|---|---|---|---|"]
    keys = sorted({(r["task"], r["ratio"] or 0, r["method"]) for r in rows})
    for task, ratio, method in keys:
        same = [r for r in rows if (r["task"], r["ratio"] or 0, r["method"]) == (task, ratio, method)]
        mean = sum(r["metric"] for r in same) / len(same)
        before = [r["before_training"] for r in same if "before_training" in r]
        shown = f"{100 * sum(before) / len(before):.1f}" if before else ""
        lines.append(
            f"| {task} | {method} | {same[0]['measured_ratio']:.2f}x | {shown} | {100 * mean:.1f} | {len(same)} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Metric against the bytes of the Transformer blocks, one panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = sorted({r["task"] for r in rows})
    figure, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for method in sorted({r["method"] for r in rows}):
            points = sorted(
                (r["block_bytes"] / 1e6, 100 * r["metric"]) for r in rows if (r["task"], r["method"]) == (task, method)
            )
            if points:
                axis.plot(
                    *zip(*points, strict=True), marker="o", label=method, linestyle="-" if len(points) > 1 else ""
                )
        axis.set(
            title=task, xlabel="bytes of the Transformer blocks (MB)", ylabel=f"{TASKS[task].metric} (%)", xscale="log"
        )
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = options(__doc__, "accuracy.jsonl")
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with one folder for each task")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "banking77"], choices=TASKS)
    default_methods = ["whitened", "fwsvd", "svd", "kronecker_whitened", "kronecker"]
    default_methods += ["dense-longer", "torchao-int8", "fasterai-svd", f"whitened{DISTILLED}"]
    parser.add_argument("--methods", nargs="+", default=default_methods)
    parser.add_argument("--ratios", nargs="+", type=float, default=[2.8, 5.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--rate", type=float, help="learning rate of all methods, in place of the search")
    parser.add_argument("--rates", type=Path, help="file of the rates that were found; beside the results by default")
    parser.add_argument("--train-rows", type=int, default=None, help="use only so many training rows, for every method")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="of products in training")
    parser.add_argument("--unique-layers", type=int, default=0, help="share layers as ALBERT does, so many are left")
    parser.add_argument("--dense-epochs", type=float, help="of the dense model before compression, if not as many")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no new cell after this time")
    parser.add_argument("--model", default=None, help="a model directory; the embedded MiniLM if not given")
    parser.add_argument("--histories", type=Path, help="folder for the histories of dynamic ranks")
    parser.add_argument("--keep", type=Path, help="folder for the models, and for what their int8 export scores")
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"), help="dense models are kept here")
    args = start(parser)
    args.rates = args.rates or args.output.with_name(args.output.stem + "_rates.jsonl")
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    started = time.monotonic()
    bench = Bench(args)
    known = {"model": args.model or "minilm", "epochs": args.epochs, "dense_epochs": bench.dense_epochs}
    known |= {name: getattr(args, name) for name in SETUP}
    for cell in grid(args.tasks, args.methods, args.ratios, args.seeds):
        if time.monotonic() - started > 60 * args.minutes:
            print("time is up; run again to continue")
            break
        if any(row | cell.key() | known == row for row in read_lines(args.output)):
            continue
        row = {**known, **bench.run(cell)}
        append_line(args.output, row)
        ratio, metric, seconds = row["measured_ratio"], row["metric"], row["seconds"]
        print(f"{cell.task:<10} {cell.method:<16} {ratio:.2f}x {metric:.4f} ({seconds:.0f} s)", flush=True)
    rows = [row for row in read_lines(args.output) if row | known == row]
    if rows:
        print(table(rows))
        plot(rows, args.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
