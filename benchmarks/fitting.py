"""How long it takes to factorize all block matrices of a BERT-base-shaped model, against `torch.linalg.svd` on each.

    python benchmarks/fitting.py

The weights are those of the embedded MiniLM, tiled up to BERT-base's shapes with noise of their own scale, so that the
spectrum falls as trained weights' does. Every matrix is fitted at the rank that a 2.8x plan gives it, by the plain and
by the whitened fit (input second moment of correlated Gaussian rows). Full SVD and fit alternate, A B A B; the table
shows medians over repetitions, their ratio, and how far the error of the fit is from the optimum.
"""

from __future__ import annotations

import statistics
import time

import torch
from common import machine, options, start, write
from transformers import AutoModel, BertConfig, BertModel

import factorformer
from factorformer.fitting import Metric, fit
from factorformer.fitting.moments import LayerStatistics, SecondMoment
from factorformer.hf import minilm
from factorformer.layers.dense import dense_weight


def weights() -> list[tuple[torch.Tensor, factorformer.LowRank]]:
    """One (weight, spec) for each matrix of one BERT-base block; all twelve blocks have the same shapes."""
    torch.manual_seed(0)
    source = AutoModel.from_pretrained(minilm.directory())
    base = BertModel(BertConfig(num_hidden_layers=1))
    result = []
    for entry in factorformer.plan(base, "svd", ratio=2.8).factorized:
        name, (out, inner) = entry.matrix.name, entry.matrix.shape
        small = dense_weight(source.get_submodule(name.replace("layer.0", "layer.2")))
        tiled = small.repeat(-(-out // small.shape[0]), -(-inner // small.shape[1]))[:out, :inner]
        result.append((tiled + small.std() * torch.randn(out, inner) / 2, entry.spec))
    return result


def moment(width: int) -> SecondMoment:
    """A second moment with a falling spectrum and a strong mean direction, as activations have."""
    rows = (
        torch.randn(4 * width, width) * torch.logspace(0, -1.5, width) @ torch.linalg.qr(torch.randn(width, width))[0]
        + 0.2
    )
    return SecondMoment((rows.T @ rows).double(), len(rows))


def main() -> None:
    parser = options(__doc__, "fitting.json")
    parser.add_argument("--repetitions", type=int, default=5)
    args = start(parser)
    block = weights()
    times: dict[str, list[float]] = {"svd": [], "plain": [], "whitened": []}
    excess = {"plain": 0.0, "whitened": 0.0}
    for repetition in range(args.repetitions):
        moments = {width: moment(width) for width in {w.shape[1] for w, _ in block}}
        seconds = dict.fromkeys(times, 0.0)
        for weight, spec in block:
            started = time.perf_counter()
            torch.linalg.svd(weight, full_matrices=False)
            seconds["svd"] += time.perf_counter() - started
            for name in excess:
                started = time.perf_counter()
                chosen = Metric.of(LayerStatistics(moments[weight.shape[1]])) if name == "whitened" else None
                factors, _ = fit(weight, spec, chosen)
                seconds[name] += time.perf_counter() - started
                if repetition == 0:
                    chosen = chosen or Metric()
                    exact = torch.linalg.svdvals(chosen.apply(weight).double())
                    optimum = float((exact[spec.rank :].square().sum() / exact.square().sum()).sqrt())
                    difference = chosen.apply(weight - factors["weight"] @ factors["right"])
                    reached = float(difference.double().norm() / chosen.apply(weight).double().norm())
                    excess[name] = max(excess[name], reached / optimum - 1)
        for name, value in seconds.items():
            times[name].append(value)
    median = {name: statistics.median(values) for name, values in times.items()}
    row = {
        "blocks": 12,
        "seconds_of_one_block": median,
        "share_of_svd_time": {name: median[name] / median["svd"] for name in excess},
        "largest_excess_over_optimum": excess,
        "machine": machine(),
    }
    write(args.output, row)
    print(f"{'route':<10} {'s/block':>9} {'x 12':>8} {'of SVD':>8} {'excess error':>13}")
    for name in times:
        over = f"{excess[name]:.4%}" if name in excess else ""
        print(
            f"{name:<10} {median[name]:>9.3f} {12 * median[name]:>8.2f} {median[name] / median['svd']:>8.2f} {over:>13}"
        )


if __name__ == "__main__":
    main()
