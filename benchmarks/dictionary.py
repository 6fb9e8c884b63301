"""How well and how fast dense-sparse fits do: sizes of as many bytes, scikit-learn, and a whole model.

    python benchmarks/dictionary.py                     # all parts
    python benchmarks/dictionary.py --parts splits

`splits`: relative errors of MiniLM's matrices at equal bytes, for more atoms with fewer nonzeros and the reverse, under
the plain metric and the second moment of inputs from banking77; truncated SVD of as many bytes beside them.
`peers`: MiniLM's first feed-forward matrix of layer 2, fitted by us and by scikit-learn with as many atoms and
nonzeros, each from a cold start, one after the other.
`model`: all matrices of a BERT-base-shaped model at 2.8x, one after the other, with the moment of their inputs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from typing import Any

import datasets
import torch
from common import default_data, machine, options, start, write
from fitting import moment, weights
from sklearn.decomposition import DictionaryLearning, MiniBatchDictionaryLearning
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from factorformer.fitting import Metric, fit
from factorformer.fitting import statistics as calibration
from factorformer.fitting.dictionary import fit_dense_sparse
from factorformer.fitting.moments import LayerStatistics
from factorformer.hf import minilm
from factorformer.layers.dense import dense_weight
from factorformer.structures import DenseSparse, LowRank
from factorformer.tasks import data

LAYERS = {
    "feed-forward up": "encoder.layer.2.intermediate.dense",
    "feed-forward down": "encoder.layer.2.output.dense",
    "query": "encoder.layer.2.attention.self.query",
    "value": "encoder.layer.4.attention.self.value",
}
RATIOS = (2.0, 2.8, 4.0)
DENSITIES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
ROUNDS = 8


def best_of_size(spec: DenseSparse, shape: tuple[int, int], ratio: float) -> DenseSparse | None:
    """As many nonzeros as the bytes allow."""
    budget = 4 * shape[0] * shape[1] / ratio
    sizes = (dataclasses.replace(spec, nonzeros=number) for number in range(1, spec.atoms))
    return max((s for s in sizes if s.bytes(shape, torch.float32) <= budget), key=lambda s: s.nonzeros, default=None)


def specs(shape: tuple[int, int], side: Any, ratio: float) -> list[DenseSparse]:
    """One spec near each density."""
    found = [
        spec
        for atoms in range(16, 9 * min(shape) // 8, 8)
        if (spec := best_of_size(DenseSparse(atoms, 1, side), shape, ratio)) is not None
    ]
    nearest = [min(found, key=lambda s: abs(math.log(s.nonzeros / s.atoms / density))) for density in DENSITIES]
    return sorted(set(nearest), key=lambda s: s.atoms)


def splits() -> list[dict[str, Any]]:
    directory = minilm.directory()
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory)
    rows = data.read(default_data() / "banking77" / "train.tsv").shuffle(seed=0).select(range(500, 2000))
    texts = data.encode(tokenizer, rows, data.Columns(("text",)))
    statistics = calibration.collect(model, list(LAYERS.values()), data.batches(tokenizer, texts), "input_moment")
    cells = []
    for label, name in LAYERS.items():
        weight = dense_weight(model.get_submodule(name))
        shape = (weight.shape[0], weight.shape[1])
        metrics = {"plain": Metric(), "moment": Metric.of(statistics[name])}
        sides = ("rows", "columns") if shape[0] == shape[1] else (DenseSparse.of(shape, 2, 1).side,)
        for ratio in RATIOS:
            low = LowRank(int(shape[0] * shape[1] / ratio / sum(shape)))
            row = {"matrix": label, "ratio": ratio}
            cells.append(row | {"rank": low.rank} | {key: fit(weight, low, metrics[key])[1] for key in metrics})
            for spec in (spec for side in sides for spec in specs(shape, side, ratio)):
                errors = {key: fit_dense_sparse(weight, spec, metrics[key], rounds=ROUNDS)[1] for key in metrics}
                size = {"side": spec.side, "atoms": spec.atoms, "nonzeros": spec.nonzeros}
                cells.append(row | size | errors)
            for cell in (cell for cell in cells if cell["matrix"] == label and cell["ratio"] == ratio):
                print("  ".join(f"{v:.4f}" if isinstance(v, float) else f"{v!s:<8}" for v in cell.values()), flush=True)
    return cells


def peers(atoms: int = 288, nonzeros: int = 56) -> list[dict[str, Any]]:
    weight = dense_weight(AutoModel.from_pretrained(minilm.directory()).get_submodule(LAYERS["feed-forward up"]))
    target = weight.double().numpy()
    cells = []

    def record(name: str, started: float, error: float) -> None:
        cells.append({"route": name, "processor_seconds": time.process_time() - started, "error": error})
        print(f"{name:<52} {cells[-1]['processor_seconds']:>9.2f} s of processor  error {error:.4f}", flush=True)

    fit(weight, DenseSparse(atoms, nonzeros))  # warms up
    for rounds in (0, 2, 8, 24):
        started = time.process_time()
        error = fit_dense_sparse(weight, DenseSparse(atoms, nonzeros), Metric(), rounds=rounds)[1]
        record(f"factorformer, {rounds} rounds", started, error)
    settings: dict[str, Any] = {
        "n_components": atoms,
        "alpha": 0.05,
        "fit_algorithm": "cd",
        "transform_algorithm": "omp",
        "transform_n_nonzero_coefs": nonzeros,
        "random_state": 0,
    }
    learners = {
        "MiniBatchDictionaryLearning, 10 epochs": MiniBatchDictionaryLearning(**settings, max_iter=10),
        "MiniBatchDictionaryLearning, 10 epochs, alpha 0.1": MiniBatchDictionaryLearning(
            **settings | {"alpha": 0.1}, max_iter=10
        ),
        "MiniBatchDictionaryLearning, 60 epochs": MiniBatchDictionaryLearning(**settings, max_iter=60),
        "DictionaryLearning, 10 rounds": DictionaryLearning(**settings, max_iter=10),
        "DictionaryLearning, 50 rounds": DictionaryLearning(**settings, max_iter=50),
    }
    for name, learner in learners.items():
        started = time.process_time()
        codes = torch.from_numpy(learner.fit_transform(target))
        left = weight - codes @ torch.from_numpy(learner.components_)
        record(name, started, float(left.norm() / weight.norm()))
    return cells


def model() -> dict[str, Any]:
    block = [weight for weight, _ in weights()]
    moments = {width: moment(width) for width in {weight.shape[1] for weight in block}}
    seconds: dict[str, float] = {}
    processor = 0.0
    for index, weight in enumerate(block):
        shape = (weight.shape[0], weight.shape[1])
        # Sizes near the best densities of the splits.
        atoms = 8 * round({True: 0.27, False: 0.65}[shape[0] == shape[1]] * min(shape) / 8)
        side = "columns" if shape[0] <= shape[1] else "rows"
        spec = best_of_size(DenseSparse(atoms, 1, side), shape, 2.8)
        assert spec is not None
        started, busy = time.perf_counter(), time.process_time()
        _, error = fit(weight, spec, Metric.of(LayerStatistics(moments[shape[1]])))
        label = f"{index}: {shape[0]}x{shape[1]}"
        seconds[label] = time.perf_counter() - started
        processor += time.process_time() - busy
        print(f"{label:<16} {spec}  error {error:.4f}  {seconds[label]:.2f} s", flush=True)
    total = 12 * sum(seconds.values())
    # Processor time tells what an idle machine would need, where others work on this one.
    print(f"12 blocks: {total:.0f} s, of processor time {12 * processor:.0f} s")
    return {
        "seconds_of_one_block": seconds,
        "seconds_of_12_blocks": total,
        "processor_seconds_of_12_blocks": 12 * processor,
    }


PARTS = {"splits": splits, "peers": peers, "model": model}


def main() -> None:
    parser = options(__doc__, "dictionary.json")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    args = start(parser)
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    for part in args.parts:
        found[part] = {"result": PARTS[part](), "machine": machine()}
        write(args.output, found)


if __name__ == "__main__":
    main()
