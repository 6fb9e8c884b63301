"""The result of `factorformer bench`, as JSON and as tables.

```
{
  "baseline":    name of the candidate that ratios compare with,
  "candidates":  [{"name", "route": "torch", "onnxruntime" or "openvino", "variants": [str],
                   "file_bytes", "peak_bytes", "import_bytes", "gpu_peak_bytes": int or null,
                   "load_milliseconds": number,
                   "smaller": {"file", "peak", "load": baseline / this one}}],
  "shapes":      [{"batch", "tokens", "rounds": int,
                   "results": [{"name", "speedup": SPREAD, "milliseconds": SPREAD,
                                "texts_per_second", "tokens_per_second", "first_pass_milliseconds": number}]}],
  "generations": [{"prompt", "tokens", "rounds": int,
                   "results": [{"name", "prefill_speedup": SPREAD, "prefill_milliseconds": SPREAD,
                                "prefill_tokens_per_second", "decode_speedup": SPREAD,
                                "decode_milliseconds": SPREAD (of a token), "decode_tokens_per_second"}]}],
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
and `settle` uncounted ones before each that counts. Candidates and results have the baseline first.
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

from factorformer.bench.candidates import Candidate
from factorformer.bench.comparison import SETTLE, WARM_UP, Comparison, Spread
from factorformer.bench.footprint import Footprint
from factorformer.bench.generation import Generation
from factorformer.bench.layers import LayerComparison
from factorformer.kernels.cpu import REFERENCE
from factorformer.report.machine import machine
from factorformer.report.result import versions


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """Measurements of `factorformer bench`; see the module's description for its JSON form.

    Args:
        candidates: the baseline first.
        footprints: one for each.
        comparisons: one for each shape.
        threads: of torch and of the other runtimes.
        device: where torch's models ran.
        seed: of the words.
        layers: where layers were measured and not models.
        generations: one for each length, where models generated.
    """

    candidates: Sequence[Candidate]
    footprints: Sequence[Footprint]
    comparisons: Sequence[Comparison]
    threads: int
    device: str
    seed: int
    layers: Sequence[LayerComparison] | None = None
    generations: Sequence[Generation] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content."""
        models = self.layers is None
        return {
            "baseline": self.candidates[0].name if models else None,
            "candidates": [
                {
                    "name": candidate.name,
                    "route": candidate.route,
                    "variants": list(candidate.variants),
                    **dataclasses.asdict(footprint),
                    "smaller": _smaller(self.footprints[0], footprint),
                }
                for candidate, footprint in zip(self.candidates, self.footprints, strict=True)
            ]
            if models
            else [],
            "shapes": [_comparison(self.candidates, comparison) for comparison in self.comparisons],
            "generations": [_generation(self.candidates, generation) for generation in self.generations],
            "layers": None if self.layers is None else [_layer(layer) for layer in self.layers],
            "settings": {
                "threads": self.threads,
                "device": self.device,
                "seed": self.seed,
                "warm_up": WARM_UP if self.comparisons else 1,
                "settle": SETTLE if self.comparisons else 0,
                "order": "interleaved; the first of a round is the last of the next",
                "inputs": "random words, no padding",
            },
            "machine": machine(),
            "versions": {**versions(), **_others(self.candidates)},
        }


def _smaller(baseline: Footprint, this: Footprint) -> dict[str, float | None]:
    pairs = {
        "file": (baseline.file_bytes, this.file_bytes),
        "peak": (baseline.peak_bytes, this.peak_bytes),
        "load": (baseline.load_milliseconds, this.load_milliseconds),
    }
    return {name: before / after if after > 0 else None for name, (before, after) in pairs.items()}


def _comparison(candidates: Sequence[Candidate], comparison: Comparison) -> dict[str, Any]:
    batch, tokens = comparison.shape.batch, comparison.shape.tokens
    return {
        "batch": batch,
        "tokens": tokens,
        "rounds": comparison.rounds,
        "results": [
            {
                "name": candidate.name,
                "speedup": dataclasses.asdict(timing.speedup),
                "milliseconds": dataclasses.asdict(timing.milliseconds),
                "texts_per_second": 1000 * batch / timing.milliseconds.median,
                "tokens_per_second": 1000 * batch * tokens / timing.milliseconds.median,
                "first_pass_milliseconds": timing.first,
            }
            for candidate, timing in zip(candidates, comparison.timings, strict=True)
        ],
    }


def _generation(candidates: Sequence[Candidate], generation: Generation) -> dict[str, Any]:
    return {
        **dataclasses.asdict(generation.length),
        "rounds": generation.rounds,
        "results": [
            {
                "name": candidate.name,
                "prefill_speedup": dataclasses.asdict(timing.prefill_speedup),
                "prefill_milliseconds": dataclasses.asdict(timing.prefill),
                "prefill_tokens_per_second": 1000 * generation.length.prompt / timing.prefill.median,
                "decode_speedup": dataclasses.asdict(timing.decode_speedup),
                "decode_milliseconds": dataclasses.asdict(timing.decode),
                "decode_tokens_per_second": 1000 / timing.decode.median,
            }
            for candidate, timing in zip(candidates, generation.timings, strict=True)
        ],
    }


def _layer(layer: LayerComparison) -> dict[str, Any]:
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
                "tokens": timing.tokens,
                "speedup": dataclasses.asdict(timing.speedup),
                "dense_milliseconds": dataclasses.asdict(timing.dense),
                "milliseconds": dataclasses.asdict(timing.factors),
            }
            for timing in layer.timings
        ],
    }


def _others(candidates: Sequence[Candidate]) -> dict[str, str]:
    used = {route: any(c.route == route for c in candidates) for route in ("onnxruntime", "openvino")}
    used["torchao"] = any("torchao-int8" in c.variants for c in candidates)
    return {name: importlib.metadata.version(name) for name, took_part in used.items() if took_part}


def show_bench(result: BenchResult, console: Console) -> None:
    """Print a result as tables."""
    if result.layers is not None:
        console.print(_layers_table(result.layers))
    else:
        for comparison in result.comparisons:
            console.print(_comparison_table(result, comparison))
        for generation in result.generations:
            console.print(_generation_table(result, generation))
        console.print(_footprints_table(result))
    console.print(_conditions(result), soft_wrap=True)


def _comparison_table(result: BenchResult, comparison: Comparison) -> Table:
    shape = comparison.shape
    title = f"{shape}: {shape.batch} x {shape.tokens} tokens, {comparison.rounds} rounds"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for column in ("speed-up", "quartiles", "ms", "quartiles", "texts/s", "tokens/s"):
        table.add_column(column, justify="right")
    for candidate, timing in zip(result.candidates, comparison.timings, strict=True):
        texts = 1000 * shape.batch / timing.milliseconds.median
        table.add_row(
            escape(candidate.name),
            f"{timing.speedup.median:.2f}x",
            _range(timing.speedup),
            f"{timing.milliseconds.median:,.2f}",
            _range(timing.milliseconds),
            f"{texts:,.1f}",
            f"{texts * shape.tokens:,.0f}",
        )
    return table


def _generation_table(result: BenchResult, generation: Generation) -> Table:
    length = generation.length
    title = f"{length.tokens} tokens behind a prompt of {length.prompt}, {generation.rounds} rounds"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for part in ("prompt", "decode"):
        for column in (f"{part}: speed-up", "quartiles", "ms" if part == "prompt" else "ms/token", "tokens/s"):
            table.add_column(column, justify="right")
    for candidate, timing in zip(result.candidates, generation.timings, strict=True):
        cells = []
        for tokens, spread, speedup in (
            (length.prompt, timing.prefill, timing.prefill_speedup),
            (1, timing.decode, timing.decode_speedup),
        ):
            cells += [f"{speedup.median:.2f}x", _range(speedup), f"{spread.median:,.2f}"]
            cells.append(f"{1000 * tokens / spread.median:,.1f}")
        table.add_row(escape(candidate.name), *cells)
    return table


def _footprints_table(result: BenchResult) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Size", title_justify="left")
    table.add_column("", overflow="fold")
    for column in ("file", "bytes", "peak memory", "MiB", "load", "ms"):
        table.add_column(column, justify="right")
    gpu = any(footprint.gpu_peak_bytes is not None for footprint in result.footprints)
    if gpu:
        table.add_column("GPU MiB", justify="right")
    for candidate, footprint in zip(result.candidates, result.footprints, strict=True):
        ratios = _smaller(result.footprints[0], footprint)
        file, peak, load = ("" if ratios[key] is None else f"{ratios[key]:.2f}x" for key in ("file", "peak", "load"))
        table.add_row(
            escape(candidate.name),
            file,
            f"{footprint.file_bytes:,}",
            peak,
            f"{footprint.peak_bytes / 2**20:,.0f}",
            load,
            f"{footprint.load_milliseconds:,.0f}",
            *([f"{(footprint.gpu_peak_bytes or 0) / 2**20:,.0f}"] if gpu else []),
        )
    return table


def _layers_table(layers: Sequence[LayerComparison]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Factors against the dense product: speed-up (ms)", title_justify="left")
    table.add_column("layers", overflow="fold")
    for column in ("shape", "stored as"):
        table.add_column(column, justify="right")
    for tokens in dict.fromkeys(timing.tokens for layer in layers for timing in layer.timings):
        table.add_column(f"{tokens} token{'s' if tokens > 1 else ''}", justify="right")
    table.add_column("by FLOPs", justify="right")
    table.add_column("pays")
    for layer in layers:
        name, *more = layer.names
        table.add_row(
            escape(name + (f" and {len(more)} more" if more else "")),
            "x".join(map(str, layer.shape)),
            f"{layer.spec}{f', {layer.dtype}' * layer.dtype.startswith('int')}",
            *(f"{timing.speedup.median:.2f}x ({timing.factors.median:.3f})" for timing in layer.timings),
            f"{layer.ideal:.2f}x",
            layer.verdict,
        )
    return table


def _conditions(result: BenchResult) -> str:
    found = machine()
    where = f"{found['gpu']} and " if result.device != "cpu" else ""
    compiled = found["kernels"] != REFERENCE
    kernels = f"kernels: {found['kernels']}" + ("" if compiled else " (not compiled, which is slow)")
    threads = f"{result.threads} thread{'s' if result.threads > 1 else ''}"
    machine_line = f"{where}{found['processor']}, {threads}, {kernels}"
    if result.layers is not None:
        return f"{machine_line}; interleaved passes, medians of ratios within a round"
    baseline = escape(result.candidates[0].name)
    warm, most = (
        f"{WARM_UP} rounds of warm-up and with {SETTLE} uncounted pass before each that counts",
        "at the largest shape",
    )
    if not result.comparisons:
        warm, most = "one that does not count", "while it generates"
    return (
        f"{machine_line}; ratios to {baseline}, above 1 is better; passes of all models are interleaved, after {warm}; "
        "speed-ups are medians of ratios within a round; random words without padding; memory beyond imports, in a "
        f"process of its own, {most}"
    )


def _range(spread: Spread) -> str:
    return f"{spread.low:,.2f} - {spread.high:,.2f}"
