"""The table at the top of the README: one fine-tuned encoder, its int8 export, and compressed models beside it.

    python benchmarks/headline.py --data ../shared/data

MiniLM is fine-tuned on the task (`original`). Each method compresses that model to a tenth of the bytes in its blocks,
factors in int8, with 512 training rows as calibration data, and fine-tunes the result on the same rows with the
original as its teacher. All of them, the original included, are exported by `factorformer.export.onnx.export` in int8.

Size is that of the whole weight file. Accuracy is measured by the runtime that is timed: ONNX Runtime for exports,
eager torch for the original. Times are of forward passes over random words without padding, interleaved in random
order; a speed-up is the median over rounds of original / model. With one thread they are processor time, so that other
work on the machine does not count. Learning rates are the best of the searches for sst2 in
`results/accuracy_rates.jsonl` (dense, and `whitened` at 2.8x).

Finished models are kept in `--work` and made once; with `--train-only` nothing is timed and nothing written.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.metadata
import json
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import onnxruntime
import torch
from common import TASKS, default_data, machine, options, start, write
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import factorformer
from factorformer.bench.candidates import draw, load, parse
from factorformer.bench.comparison import LEAST, MOST, WARM_UP, Shape, summarize
from factorformer.export.onnx import export
from factorformer.hf import minilm
from factorformer.report import inventory
from factorformer.tasks import data as task_data
from factorformer.tasks import evaluation, finetuning

ORIGINAL = "original"
CALIBRATION = 512


class Headline:
    """Data, settings and finished models of a run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, task = args, TASKS[args.task]
        self.metric = task.metric
        folder, columns = args.data / task.name, task_data.Columns(task.text, "label")
        self.tokenizer = AutoTokenizer.from_pretrained(minilm.directory())
        train = task_data.sample(task_data.read(folder / "train.tsv"), args.train_rows, args.seed)
        test = task_data.read(folder / task.test)
        if args.test_rows:
            test = task_data.sample(test, args.test_rows, args.seed)
        self.labels = task_data.Labels.of(train, "label")
        self.train, self.test = (task_data.encode(self.tokenizer, rows, columns, self.labels) for rows in (train, test))
        names = ("task", "train_rows", "original_epochs", "original_rate", "epochs", "rate", "ratio", "precision")
        self.setup = {name: getattr(args, name) for name in (*names, "seed")}

    def settings(self, epochs: float, rate: float) -> finetuning.TrainingSettings:
        return finetuning.TrainingSettings(
            epochs=epochs, learning_rate=rate, seed=self.args.seed, precision=self.args.precision
        )

    def original(self) -> PreTrainedModel:
        torch.manual_seed(self.args.seed)
        classes = len(self.labels.names)
        model = AutoModelForSequenceClassification.from_pretrained(minilm.directory(), num_labels=classes)
        settings = self.settings(self.args.original_epochs, self.args.original_rate)
        finetuning.train(model, self.tokenizer, self.train, settings)
        return model

    def compressed(self, method: str) -> PreTrainedModel:
        """Compressed, and fine-tuned with the original as its teacher."""
        name, _, scope = method.partition(":")
        teacher = AutoModelForSequenceClassification.from_pretrained(self.args.work / ORIGINAL)
        model = copy.deepcopy(teacher)
        rows = task_data.sample(self.train, CALIBRATION, self.args.seed)
        batches = list(task_data.batches(self.tokenizer, rows))
        where: Any = {"scope": scope} if scope else {}
        plan = factorformer.plan(model, name, self.args.ratio, int8=True, calibration=batches, **where)
        factorformer.compress(model, plan, batches, hold_floats=True)
        settings = self.settings(self.args.epochs, self.args.rate)
        finetuning.train(model, self.tokenizer, self.train, settings, teacher=teacher)
        factorformer.quantize(model)
        return model

    def made(self, name: str) -> dict[str, Any]:
        """What is known of a model; it and its export are made where they are not there yet."""
        place = self.args.work / name.replace(":", "-")
        exported, record = exported_to(place), place.with_name(f"{place.name}.json")
        if record.exists():
            found = json.loads(record.read_text())
            if found["setup"] != self.setup:
                raise SystemExit(f"{record} is of other settings: give another --work, or delete it")
            return found
        started, busy = time.perf_counter(), time.process_time()
        model = self.original() if name == ORIGINAL else self.compressed(name)
        model.save_pretrained(place)
        self.tokenizer.save_pretrained(place)
        seconds = {"wall": time.perf_counter() - started, "processor": time.process_time() - busy}
        _, _, scope = name.partition(":")
        found = {
            "name": name,
            "setup": self.setup,
            "ratio": round(inventory(model, "all" if scope == "all" else "blocks").ratio, 3),
            "scope": scope or "blocks",
            "bytes": sum(file.stat().st_size for file in place.glob("*.safetensors")),
            "accuracy": evaluation.evaluate(model, self.tokenizer, self.test, self.labels)[self.metric],
            "seconds": {key: round(value, 1) for key, value in seconds.items()},
        }
        result = export(place, exported, int8=True, overwrite=True)
        found["export"] = {"bytes": result.file_bytes, "accuracy": self.in_onnx_runtime(exported, result.inputs)}
        found["machine"] = machine()
        write(record, found)
        print(json.dumps({key: found[key] for key in ("name", "bytes", "accuracy", "seconds", "export")}), flush=True)
        return found

    def in_onnx_runtime(self, exported: Path, inputs: tuple[str, ...]) -> float:
        threads = onnxruntime.SessionOptions()
        threads.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(exported / "model.onnx"), threads)
        logits, order = [], []
        for rows, batch in task_data.indexed_batches(self.tokenizer, self.test, 32):
            logits.append(session.run(None, {name: batch[name].numpy() for name in inputs})[0])
            order += rows
        references = np.asarray(self.test["labels"])
        return evaluation.score(np.concatenate(logits)[np.argsort(order)], references, self.labels)[self.metric]

    def timed(self, names: list[str]) -> list[dict[str, Any]]:
        """Speed-ups over the original in eager torch, and milliseconds, with quartiles; one entry for each shape."""
        work, threads = self.args.work, torch.get_num_threads()
        places = [work / ORIGINAL, *(exported_to(work / name.replace(":", "-")) for name in names)]
        runners = [load(parse(str(place)), threads, torch.device("cpu")) for place in places]
        labels = [f"{ORIGINAL}, torch", *(f"{name}, int8 export" for name in names)]
        shapes = []
        for shape in self.args.shapes:
            ids = draw(runners, shape.batch, shape.tokens, self.args.seed)
            times = interleaved([runner.prepare(ids) for runner in runners], self.args.seconds, self.args.seed)
            results = [
                {"name": label, **{key: rounded(getattr(timing, key)) for key in ("speedup", "milliseconds")}}
                for label, timing in zip(labels, summarize(times), strict=True)
            ]
            shapes.append({"shape": str(shape), "rounds": len(times), "results": results})
        return shapes


def clock() -> float:
    """Seconds: with one thread those of the processor, in which other work on the machine does not count."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def interleaved(runs: list[Callable[[], object]], seconds: float, seed: int) -> list[list[float]]:
    """Milliseconds of every run in every round; orders are random, so that none always follows the same other one."""
    orders, times, end = random.Random(seed), [], time.monotonic() + seconds
    with torch.inference_mode():
        for run in [run for run in runs for _ in range(WARM_UP)]:
            run()
        while len(times) < LEAST or (len(times) < MOST and time.monotonic() < end):
            row = [0.0] * len(runs)
            for place in orders.sample(range(len(runs)), len(runs)):
                runs[place]()  # brings its weights back into the caches
                started = clock()
                runs[place]()
                row[place] = 1000 * (clock() - started)
            times.append(row)
    return times


def exported_to(place: Path) -> Path:
    return place.with_name(f"{place.name}-onnx-int8")


def rounded(spread: Any) -> dict[str, float]:
    return {key: round(value, 4) for key, value in dataclasses.asdict(spread).items()}


def main() -> None:
    parser = options(__doc__, "headline.json")
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with one folder for each task")
    parser.add_argument("--task", default="sst2", choices=TASKS)
    methods = ["whitened", "auto", "whitened:all"]
    parser.add_argument("--methods", nargs="+", default=methods, help="METHOD, or METHOD:all for the whole model")
    parser.add_argument("--ratio", type=float, default=10.0, help="of bytes in the blocks, or in the whole model")
    parser.add_argument("--train-rows", type=int, default=3000)
    parser.add_argument("--test-rows", type=int, help="by default all")
    parser.add_argument("--original-epochs", type=float, default=3.0)
    parser.add_argument("--epochs", type=float, default=3.0, help="of compressed models, after those of the original")
    parser.add_argument("--original-rate", type=float, default=1e-4)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"], help="of products in training")
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=[Shape(1, 32), Shape(8, 64), Shape(32, 128)])
    parser.add_argument("--seconds", type=float, default=60, help="for each shape")
    parser.add_argument("--threads", type=int, help="by default as many as torch takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-only", action="store_true", help="make the models, and time nothing")
    parser.add_argument("--work", type=Path, default=Path("runs/headline"), help="models are kept here")
    args = start(parser)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if args.threads:
        torch.set_num_threads(args.threads)
    headline = Headline(args)
    models = [headline.made(name) for name in (ORIGINAL, *args.methods)]
    if args.train_only:
        return
    before = machine()["load"]
    shapes = headline.timed([ORIGINAL, *args.methods])
    content = {
        "metric": headline.metric,
        "test_rows": len(headline.test),
        "calibration_rows": CALIBRATION,
        "models": models,
        "shapes": shapes,
        "warm_up": WARM_UP,
        "clock": "processor" if torch.get_num_threads() == 1 else "wall",
        "load_before": before,
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime")},
    }
    write(args.output, content)
    for shape in shapes:
        for result in shape["results"]:
            low, middle, high = result["speedup"].values()
            median = result["milliseconds"]["median"]
            print(f"{shape['shape']:<8} {result['name']:<28} {middle:6.2f}x ({low:.2f} to {high:.2f}) {median:9.2f} ms")


if __name__ == "__main__":
    main()
