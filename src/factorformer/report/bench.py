"""The result of `factorformer bench`, as JSON and as tables.

```
{
  "baseline":    name of the contestant that ratios compare with,
  "contestants": [{"name", "route": "torch" or "onnxruntime", "variants": [str],
                   "file_bytes", "peak_bytes", "import_bytes", "gpu_peak_bytes": int or null,
                   "load_milliseconds": number,
                   "smaller": {"file", "peak", "load": baseline / this one}}],
  "shapes":      [{"batch", "tokens", "rounds": int,
                   "results": [{"name", "speedup": SPREAD, "milliseconds": SPREAD,
                                "texts_per_second", "tokens_per_second", "first_pass_milliseconds": number}]}],
  "layers":      null, or with --layers the only one of these that is not empty:
                 [{"names": [str], "shape": [out, in], "structure", "dtype", "flops_ratio": number,
                   "break_even": int or null, "pays": [int],
                   "tokens": [{"tokens", "speedup": SPREAD, "dense_milliseconds": SPREAD, "milliseconds": SPREAD}]}],
  "settings":    {"threads", "device", "seed", "warm_up", "settle", "order", "inputs"},
  "machine":     {"processor", "cores", "instructions", "kernels", "load", "gpu", "system"},
  "versions":    {"factorformer", "torch", "transformers", "python", and of other libraries that took part}
}
```

A SPREAD is `{"low", "median", "high"}`: quartiles. `warm_up` passes over each shape come before the first that counts,
and `settle` uncounted ones before each that counts. Contestants and results have the baseline first.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from factorformer.bench.contestants import Contestant
from factorformer.bench.footprint import Footprint
from factorformer.bench.layers import LayerPaces
from factorformer.bench.race import SETTLE, WARM_UP, Heat, Spread
from factorformer.report.machine import machine
from factorformer.report.result import versions


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """What `factorformer bench` measured; see the module's description for its JSON form.

    Args:
        contestants: the baseline first.
        footprints: one for each.
        heats: one for each shape.
        threads: of torch and of ONNX Runtime.
        device: where torch's models ran.
        seed: of the words.
        layers: where layers were measured and not models.
    """

    contestants: Sequence[Contestant]
    footprints: Sequence[Footprint]
    heats: Sequence[Heat]
    threads: int
    device: str
    seed: int
    layers: Sequence[LayerPaces] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content."""
        models = self.layers is None
        return {
            "baseline": self.contestants[0].name if models else None,
            "contestants": [
                {
                    "name": contestant.name,
                    "route": contestant.route,
                    "variants": list(contestant.variants),
                    **dataclasses.asdict(footprint),
                    "smaller": _smaller(self.footprints[0], footprint),
                }
                for contestant, footprint in zip(self.contestants, self.footprints, strict=True)
            ]
            if models
            else [],
            "shapes": [_heat(self.contestants, heat) for heat in self.heats],
            "layers": None if self.layers is None else [_layer(layer) for layer in self.layers],
            "settings": {
                "threads": self.threads,
                "device": self.device,
                "seed": self.seed,
                "warm_up": WARM_UP,
                "settle": SETTLE,
                "order": "in turns; the first of a round is the last of the next",
                "inputs": "random words, no padding",
            },
            "machine": machine(),
            "versions": {**versions(), **_others(self.contestants)},
        }


def _smaller(baseline: Footprint, this: Footprint) -> dict[str, float | None]:
    pairs = {
        "file": (baseline.file_bytes, this.file_bytes),
        "peak": (baseline.peak_bytes, this.peak_bytes),
        "load": (baseline.load_milliseconds, this.load_milliseconds),
    }
    return {name: before / after if after > 0 else None for name, (before, after) in pairs.items()}


def _heat(contestants: Sequence[Contestant], heat: Heat) -> dict[str, Any]:
    batch, tokens = heat.shape.batch, heat.shape.tokens
    return {
        "batch": batch,
        "tokens": tokens,
        "rounds": heat.rounds,
        "results": [
            {
                "name": contestant.name,
                "speedup": dataclasses.asdict(timing.speedup),
                "milliseconds": dataclasses.asdict(timing.milliseconds),
                "texts_per_second": 1000 * batch / timing.milliseconds.median,
                "tokens_per_second": 1000 * batch * tokens / timing.milliseconds.median,
                "first_pass_milliseconds": timing.first,
            }
            for contestant, timing in zip(contestants, heat.timings, strict=True)
        ],
    }


def _layer(layer: LayerPaces) -> dict[str, Any]:
    return {
        "names": list(layer.names),
        "shape": list(layer.shape),
        "structure": layer.spec.to_dict(),
        "dtype": layer.dtype,
        "flops_ratio": layer.ideal,
        "break_even": layer.break_even,
        "pays": layer.pays,
        "tokens": [
            {
                "tokens": pace.tokens,
                "speedup": dataclasses.asdict(pace.speedup),
                "dense_milliseconds": dataclasses.asdict(pace.dense),
                "milliseconds": dataclasses.asdict(pace.factors),
            }
            for pace in layer.paces
        ],
    }


def _others(contestants: Sequence[Contestant]) -> dict[str, str]:
    used = {"onnxruntime": any(c.route == "onnxruntime" for c in contestants)}
    used["torchao"] = any("torchao-int8" in c.variants for c in contestants)
    return {name: importlib.metadata.version(name) for name, took_part in used.items() if took_part}


def show_bench(result: BenchResult, console: Console) -> None:
    """Print everything that a result holds."""
    if result.layers is not None:
        console.print(_layers_table(result.layers))
    else:
        for heat in result.heats:
            console.print(_heat_table(result, heat))
        console.print(_footprints_table(result))
    console.print(_conditions(result), soft_wrap=True)


def _heat_table(result: BenchResult, heat: Heat) -> Table:
    title = f"{heat.shape}: {heat.shape.batch} x {heat.shape.tokens} tokens, {heat.rounds} rounds"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for column in ("speed-up", "quartiles", "ms", "quartiles", "texts/s", "tokens/s"):
        table.add_column(column, justify="right")
    for contestant, timing in zip(result.contestants, heat.timings, strict=True):
        texts = 1000 * heat.shape.batch / timing.milliseconds.median
        table.add_row(
            escape(contestant.name),
            f"{timing.speedup.median:.2f}x",
            _range(timing.speedup),
            f"{timing.milliseconds.median:,.2f}",
            _range(timing.milliseconds),
            f"{texts:,.1f}",
            f"{texts * heat.shape.tokens:,.0f}",
        )
    return table


def _footprints_table(result: BenchResult) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Size", title_justify="left")
    table.add_column("", overflow="fold")
    for column in ("file", "bytes", "peak memory", "MiB", "load", "ms"):
        table.add_column(column, justify="right")
    gpu = any(footprint.gpu_peak_bytes is not None for footprint in result.footprints)
    if gpu:
        table.add_column("GPU MiB", justify="right")
    for contestant, footprint in zip(result.contestants, result.footprints, strict=True):
        ratios = _smaller(result.footprints[0], footprint)
        file, peak, load = ("" if ratios[key] is None else f"{ratios[key]:.2f}x" for key in ("file", "peak", "load"))
        table.add_row(
            escape(contestant.name),
            file,
            f"{footprint.file_bytes:,}",
            peak,
            f"{footprint.peak_bytes / 2**20:,.0f}",
            load,
            f"{footprint.load_milliseconds:,.0f}",
            *([f"{(footprint.gpu_peak_bytes or 0) / 2**20:,.0f}"] if gpu else []),
        )
    return table


def _layers_table(layers: Sequence[LayerPaces]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Factors against the dense product: speed-up (ms)", title_justify="left")
    table.add_column("layers", overflow="fold")
    for column in ("shape", "stored as"):
        table.add_column(column, justify="right")
    for tokens in dict.fromkeys(pace.tokens for layer in layers for pace in layer.paces):
        table.add_column(f"{tokens} token{'s' if tokens > 1 else ''}", justify="right")
    table.add_column("by FLOPs", justify="right")
    table.add_column("pays")
    for layer in layers:
        name, *more = layer.names
        table.add_row(
            escape(name + (f" and {len(more)} more" if more else "")),
            "x".join(map(str, layer.shape)),
            f"{layer.spec}{', int8' * (layer.dtype == 'int8')}",
            *(f"{pace.speedup.median:.2f}x ({pace.factors.median:.3f})" for pace in layer.paces),
            f"{layer.ideal:.2f}x",
            layer.verdict,
        )
    return table


def _conditions(result: BenchResult) -> str:
    found = machine()
    where = f"{found['gpu']} and " if result.device != "cpu" else ""
    threads = f"{result.threads} thread{'s' if result.threads > 1 else ''}"
    machine_line = f"{where}{found['processor']} ({found['kernels']} kernels), {threads}"
    if result.layers is not None:
        return f"{machine_line}; the two take turns, medians of ratios within a round"
    baseline = escape(result.contestants[0].name)
    return (
        f"{machine_line}; ratios to {baseline}, above 1 is better; all models take turns, in {WARM_UP} rounds to warm "
        f"up and then with {SETTLE} uncounted pass before each that counts; speed-ups are medians of ratios within a "
        "round; random words without padding; memory beyond imports, in a process of its own, at the largest shape"
    )


def _range(spread: Spread) -> str:
    return f"{spread.low:,.2f} - {spread.high:,.2f}"
