"""Fits and plans in units of the loss, nothing trained: what is lost, what was predicted, and how long it took.

    python benchmarks/fits.py minilm --methods fisher auto --ratios 2 2.8 4
    python benchmarks/fits.py MPNET --methods fisher auto --ratios 2.8 5
    python benchmarks/fits.py SMOLLM2 --methods fisher --ratios 1.25 1.67
    python benchmarks/fits.py minilm --plans

A model is a directory, or `minilm` for the embedded one. Sentence encoders are calibrated on training questions of
banking77 and judged by the mean cosine between embeddings of test questions before and after; language models on
windows of 512 tokens of WikiText-2, and judged by the loss on windows of its test text.

`--plans` carries out plans of three structures, uniform and by loss, and compares the rises of the loss that were
predicted with those that are measured; each is a row, and a run skips those that are there already; with `--predict`
it gives them predictions of today, and the rise that was measured. `--cost` times the
calibration pass against a forward and backward pass over the same text. `--coupling` fits the dictionaries of a uniform
plan twice: with the metric of the longer side as it is, which couples rows, and with its diagonal alone. `--unordered`
fits every matrix to what it reads in the dense model.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import append_line, default_data, machine, options, read_lines, start
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import factorformer
from factorformer import planning, recipes
from factorformer.fitting import Metric, fit
from factorformer.fitting import statistics as calibration
from factorformer.hf import minilm
from factorformer.layers.dense import dense_weight
from factorformer.layers.matrix import Matrix, total
from factorformer.layers.modes import fast_products
from factorformer.layers.surgery import find_matrices
from factorformer.planning import Plan
from factorformer.planning.allocate import uniform
from factorformer.planning.evidence.prediction import Prediction
from factorformer.structures import STRUCTURES, DenseSparse, Structure
from factorformer.tasks import data as task_data

WINDOW = 512
"""Tokens that a language model is given."""

Batch = dict[str, Tensor]


class Encoder:
    """A sentence encoder, and the mean cosine to the embeddings of its dense self."""

    unit = "mean cosine"

    def __init__(self, path: str, data: Path, texts: int, judged: int) -> None:
        self.model = AutoModel.from_pretrained(path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.calibration = self._batches(data / "banking77" / "train.tsv", texts)
        self.judged = self._batches(data / "banking77" / "test.tsv", judged)
        self.dense = [self._embeddings(self.model, batch) for batch in self.judged]

    def _batches(self, file: Path, count: int) -> list[Batch]:
        """Texts drawn at random, in batches of similar length."""
        texts = task_data.read(file)["text"][:]
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:count]
        drawn = sorted((texts[i] for i in order), key=len)
        return [
            dict(self.tokenizer(drawn[i : i + 32], padding=True, truncation=True, max_length=128, return_tensors="pt"))
            for i in range(0, len(drawn), 32)
        ]

    @torch.no_grad()
    def _embeddings(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        mask = batch["attention_mask"].unsqueeze(-1)
        return F.normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))

    def rise(self, model: PreTrainedModel) -> float:
        """1 - mean cosine."""
        pairs = zip(self.dense, (self._embeddings(model, batch) for batch in self.judged), strict=True)
        return 1 - float(torch.cat([(before * after).sum(1) for before, after in pairs]).mean())

    def value(self, rise: float) -> float:
        return 1 - rise


class Decoder:
    """A language model, and its perplexity."""

    unit = "perplexity"

    def __init__(self, path: str, data: Path, texts: int, judged: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        train, test = (self._windows(data / "wikitext2" / f"{name}.txt") for name in ("train", "test"))
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:texts]
        self.calibration = [{"input_ids": pair} for pair in train[order].split(2)]
        self.judged = test[:judged].split(4)
        self.dense = self._loss(self.model)

    def _windows(self, file: Path) -> Tensor:
        tokens = self.tokenizer(file.read_text()[:3_000_000])["input_ids"]
        return torch.tensor(tokens[: len(tokens) // WINDOW * WINDOW]).view(-1, WINDOW)

    @torch.no_grad()
    def _loss(self, model: PreTrainedModel) -> float:
        """Mean over tokens, in nats."""
        losses = []
        for batch in self.judged:
            with fast_products(model):
                logits = model(batch).logits[:, :-1]
            losses.append(F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
        return float(torch.cat(losses).mean())

    def rise(self, model: PreTrainedModel) -> float:
        """Of the loss, in nats for each token."""
        return self._loss(model) - self.dense

    def value(self, rise: float) -> float:
        return math.exp(self.dense + rise)


def subject(args: Any) -> Encoder | Decoder:
    path = str(minilm.directory()) if args.model == "minilm" else args.model
    causal = any("CausalLM" in name for name in AutoConfig.from_pretrained(path).architectures or ())
    if causal:
        return Decoder(path, args.data, args.texts or 64, args.judged or 40)
    return Encoder(path, args.data, args.texts or 512, args.judged or 500)


def kinds(plan: Plan) -> dict[str, int]:
    """How many matrices are of which structure."""
    floats = "dense in floats" if any(entry.matrix.bits for entry in plan.entries) else "dense"
    return dict(Counter(floats if entry.spec is None else entry.spec.kind for entry in plan.entries))


def compressed(of: Encoder | Decoder, method: str, ratio: float, args: Any) -> dict[str, Any]:
    """One method at one ratio, with all that a user waits for."""
    if args.unordered:
        recipes.RECIPES[method] = dataclasses.replace(recipes.get(method), sequential=False)
    model, started = copy.deepcopy(of.model), time.perf_counter()
    plan = factorformer.plan(
        model, method, ratio, scope=args.scope, calibration=of.calibration, int8=args.int8, keep_statistics=True
    )
    planned = time.perf_counter()
    factorformer.compress(model, plan, of.calibration)
    done = time.perf_counter()
    rise = of.rise(model)
    return {
        "method": method,
        "ratio": ratio,
        "int8": args.int8,
        "in_order": not args.unordered,
        "measured_ratio": round(plan.ratio, 4),
        of.unit: round(of.value(rise), 4),
        "rise": round(rise, 4),
        "predicted": None if plan.predicted is None else round(plan.predicted, 4),
        "seconds": {"plan": round(planned - started, 1), "compress": round(done - planned, 1)},
        "structures": kinds(plan),
    }


def plans(
    of: Encoder | Decoder, ratios: list[float], include: list[str] | None, wanted: Sequence[str]
) -> Iterator[tuple[str, str, Plan]]:
    """Plans of each structure alone, uniform and by loss, with what predicts them; statistics are measured once."""
    found, rest = find_matrices(of.model, include=include)
    matrices = [matrix for matrix in found if matrix.dense is None]
    rest = rest + total(matrix.cost(None) for matrix in found if matrix.dense is not None)
    names = [matrix.name for matrix in matrices]
    statistics = calibration.collect(of.model, names, of.calibration, "fisher")
    for ratio in ratios:
        known = Prediction.of(of.model, matrices, lambda _: [STRUCTURES[kind] for kind in wanted], statistics, ratio)
        for kind in wanted:

            def sizes(matrix: Matrix, kind: str = kind, known: Prediction = known) -> tuple[Structure, ...]:
                return known.curves[matrix.name].sizes[kind]

            choices = {
                m.name: [
                    option
                    for option in known.options(m, lambda matrix, spec: matrix.cost(spec).bytes)
                    if option.spec is None or option.kind == kind
                ]
                for m in matrices
            }
            for allocation, entries in (
                ("uniform", uniform(matrices, sizes, ratio, rest)),
                ("by_loss", planning.by_loss(matrices, choices, ratio, rest.bytes)),
            ):
                rise = known.rise(entries)
                plan = Plan("auto", "blocks", ratio, entries, rest, predicted=rise, statistics=statistics)
                yield kind, allocation, plan


def cost(of: Encoder | Decoder, rounds: int = 5) -> dict[str, Any]:
    """Seconds of the calibration pass, and of a forward and backward pass to the weights over the same text."""
    found, _ = find_matrices(of.model)
    names = [matrix.name for matrix in found if matrix.dense is None]
    some = of.calibration[: 4 if isinstance(of, Decoder) else 16]

    def calibrate() -> None:
        calibration.collect(of.model, names, some, "fisher")

    def step() -> None:
        for batch in some:
            with fast_products(of.model):
                out = of.model(**batch)
            scores = out.logits if isinstance(of, Decoder) else out.last_hidden_state
            scores.float().square().mean().backward()
            of.model.zero_grad()

    seconds: dict[str, list[float]] = {"calibration": [], "forward and backward": []}
    for _ in range(rounds):
        for name, run in (("calibration", calibrate), ("forward and backward", step)):
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    ratios = sorted(a / b for a, b in zip(*seconds.values(), strict=True))
    medians = {name: round(sorted(some)[rounds // 2], 2) for name, some in seconds.items()}
    return {"seconds": medians, "ratio": round(ratios[rounds // 2], 2), "batches": len(some)}


def coupling(of: Encoder | Decoder, ratio: float) -> dict[str, Any]:
    """Predicted rise of the loss by all dictionaries of a uniform plan, with coupled rows and without; and seconds."""
    plan = factorformer.plan(of.model, "dense_sparse", ratio)
    names = [entry.matrix.name for entry in plan.factorized]
    statistics = calibration.collect(of.model, names, of.calibration, "fisher")
    rises, seconds = {"coupled": 0.0, "diagonal": 0.0}, {"coupled": 0.0, "diagonal": 0.0}
    for entry in plan.factorized:
        spec, shape = entry.spec, entry.matrix.shape
        assert isinstance(spec, DenseSparse)
        weight = dense_weight(of.model.get_submodule(entry.matrix.name))
        metric = Metric.of(statistics[entry.matrix.name])
        assert metric.rows is not None
        assert metric.columns is not None
        if spec.side == "rows":
            apart = dataclasses.replace(metric, rows=metric.rows.norm(dim=0))
        else:
            apart = dataclasses.replace(metric, columns=metric.columns.norm(dim=1).diag())
        whole = metric.scale * float(metric.apply(weight).double().square().sum())
        for name, fitted in (("coupled", metric), ("diagonal", apart)):
            began = time.perf_counter()
            factors, _ = fit(weight, spec, fitted)
            seconds[name] += time.perf_counter() - began
            rises[name] += whole * metric.relative_error(weight, spec.to_dense(shape, factors)) ** 2
    return {
        "ratio": ratio,
        "matrices": len(plan.factorized),
        "rises": {name: round(rise, 4) for name, rise in rises.items()},
        "seconds": {name: round(some, 1) for name, some in seconds.items()},
    }


def main() -> None:
    parser = options(__doc__, "fits.jsonl")
    parser.add_argument("model", help="a model directory, or minilm")
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with banking77 and wikitext2")
    parser.add_argument("--methods", nargs="+", default=["fisher", "auto"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[2, 2.8, 4])
    parser.add_argument("--scope", default="blocks", choices=["blocks", "all"])
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--texts", type=int, help="texts, or windows of tokens, for calibration")
    parser.add_argument("--judged", type=int, help="texts, or windows of tokens, that the result is judged on")
    parser.add_argument("--include", nargs="*", help="of --plans: names of the matrices, others stay dense")
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES), choices=STRUCTURES, help="of --plans")
    parser.add_argument("--plans", action="store_true", help="compare predictions with measurements over many plans")
    parser.add_argument("--predict", action="store_true", help="with --plans: predict those again that are there")
    parser.add_argument("--cost", action="store_true", help="time the calibration pass")
    parser.add_argument("--coupling", action="store_true", help="compare coupled rows of dictionaries with others")
    parser.add_argument("--unordered", action="store_true", help="fit to what the dense model reads")
    args = start(parser)
    logging.set_verbosity_error()
    torch.manual_seed(0)
    of = subject(args)
    common = {"model": Path(args.model).name, "calibration": sum(len(b["input_ids"]) for b in of.calibration)}
    if args.plans:
        common |= {"include": args.include, "judged": args.judged}
    print(json.dumps({"dense": of.value(0.0), "unit": of.unit}), flush=True)

    def keep(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        append_line(args.output, {**common, "dense": round(of.value(0.0), 4), **row, "machine": machine()})

    if args.cost:
        keep({"cost": cost(of)})
    elif args.coupling:
        for ratio in args.ratios:
            keep({"coupling": coupling(of, ratio)})
    elif args.plans:
        known = [row for row in read_lines(args.output) if "plan" in row and row | common == row]
        done = {(row["plan"]["structure"], row["plan"]["allocation"], row["plan"]["ratio"]): row for row in known}
        for kind, allocation, plan in plans(of, args.ratios, args.include, args.structures):
            before = done.get((kind, allocation, plan.target))
            if before is not None:
                if args.predict and before["plan"]["structures"] == kinds(plan):
                    measured = before["plan"] | {"predicted": round(plan.predicted or 0, 4)}
                    keep({"plan": measured, "measured_at": before["machine"]["commit"]})
                continue
            model, began = copy.deepcopy(of.model), time.perf_counter()
            factorformer.compress(model, plan, of.calibration)
            rise = of.rise(model)
            found = {"structure": kind, "allocation": allocation, "ratio": plan.target, "rise": round(rise, 4)}
            found |= {
                "predicted": round(plan.predicted or 0, 4),
                "seconds": round(time.perf_counter() - began, 1),
                "structures": kinds(plan),
            }
            keep({"plan": found})
    else:
        for ratio in args.ratios:
            for method in args.methods:
                keep(compressed(of, method, ratio, args))


if __name__ == "__main__":
    main()
