"""Write the tables of README and docs from the files of results, so that no figure is typed by hand.

    python benchmarks/render.py           # after new results
    python benchmarks/render.py --check   # exit code 1, and the names of the tables that are stale

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is between them is replaced. A line under each
table says what it was measured with, as far as its rows say so.

Marks of learning rates: † was not searched for this row, but taken from a related one; ↑ was the highest of the rates
that the search tried, so that a higher one may be better.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGES = (HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("*.md")))
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
SETUP = ("train_rows", "precision", "unique_layers")
Row = dict[str, Any]


def rows_of(name: str) -> list[Row]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines() if line]


def content_of(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def measured_with(machines: Iterable[Row], extra: str = "") -> list[str]:
    """The line under a table: what the rows say of the machine, of versions and commits."""
    found: dict[str, list[str]] = {}
    for one in machines:
        for key in ("device", "threads", "kernels", "torch", "transformers", "commit"):
            value = str(one.get(key) or "not recorded")
            if value not in found.setdefault(key, []):
                found[key].append(value)
    said = {key: " and ".join(values) for key, values in found.items()}
    line = (
        f"{said['device']}, threads: {said['threads']}, torch {said['torch']}, transformers {said['transformers']}, "
        f"kernels: {said['kernels']}, commit: {said['commit']}{extra}"
    )
    return ["", f"<sub>{line}</sub>"]


# Headline, latency, layers


def headline() -> list[str]:
    found = content_of("headline.json")
    models = {model["name"]: model for model in found["models"]}
    times = {shape["shape"]: {r["name"]: r for r in shape["results"]} for shape in found["shapes"]}
    setup = models["original"]["setup"]

    def row(label: str, size: int, score: float, name: str) -> list[str]:
        if name == "original, torch":
            speed = [f"{three(by[name]['milliseconds']['median'])} ms" for by in times.values()]
        else:
            spreads = [by[name]["speedup"] for by in times.values()]
            speed = [f"{each['median']:.1f}x ({each['low']:.1f} to {each['high']:.1f})" for each in spreads]
        return [label, f"{size / 1e6:.1f} MB", f"{100 * score:.1f} %", *speed]

    original = models.pop("original")
    rows = [
        row("original, float32, PyTorch", original["bytes"], original["accuracy"], "original, torch"),
        row(
            "**original, int8**, ONNX Runtime",
            original["export"]["bytes"],
            original["export"]["accuracy"],
            "original, int8 export",
        ),
    ]
    for name, model in models.items():
        method, _, scope = name.partition(":")
        label = f"`{method} --int8`, {setup['ratio']:g}x fewer bytes in the " + ("whole model" if scope else "blocks")
        rows.append(row(label, model["export"]["bytes"], model["export"]["accuracy"], f"{name}, int8 export"))
    header = ["", "whole file", f"{setup['task']} {found['metric']}"]
    header += [f"latency, {shape.replace('x', ' x ')}" for shape in times]
    error = 100 * (original["accuracy"] * (1 - original["accuracy"]) / found["test_rows"]) ** 0.5
    rounds = ", ".join(str(shape["rounds"]) for shape in found["shapes"])
    extra = (
        f"; {found['test_rows']:,} test rows (1 s.e. {error:.1f} points), one seed; {found['clock']} time, medians of "
        f"{rounds} interleaved rounds at a load of {found['machine']['load']:g}"
    )
    return markdown(header, rows) + measured_with([found["machine"]], extra)


def latency() -> list[str]:
    """Rows of before there were several models."""
    rows = [row for row in rows_of("latency.jsonl") if "model" not in row]
    if not rows:
        return []
    names = [result["name"] for result in rows[0]["results"]]
    cells = {(row["shape"], result["name"]): result for row in rows for result in row["results"]}

    def shown(shape: str, name: str) -> str:
        speed = cells[shape, name]["speedup"]
        return f"{speed['median']:.2f} ({speed['low']:.2f} to {speed['high']:.2f})"

    shapes = [row["shape"] for row in rows]
    rounds = ", ".join(str(row["results"][0]["rounds"]) for row in rows)
    loads = ", ".join(f"{row['load']:g}" for row in rows)
    dense = ", ".join(f"{cells[shape, 'dense, eager']['milliseconds']['median']:.3g}" for shape in shapes)
    table = markdown(["", *shapes], [[name, *(shown(shape, name) for shape in shapes)] for name in names])
    extra = f"; rounds: {rounds}; load: {loads}; the dense model takes {dense} ms"
    return table + measured_with([row["machine"] for row in rows], extra)


def fused_latency() -> list[str]:
    """Each model and its factors against the fastest dense one that is not ours, and against the floor of its FLOPs."""
    lines: list[str] = []
    rows = [row for row in rows_of("latency.jsonl") if "model" in row]
    for model, method, ratio in dict.fromkeys((row["model"], row["method"], row["asked_ratio"]) for row in rows):
        found = [row for row in rows if (row["model"], row["method"], row["asked_ratio"]) == (model, method, ratio)]
        columns = [(row, _against_fastest(row), _over_floor(row)) for row in found]
        names = dict.fromkeys(result["name"] for row in found for result in row["results"])
        table = [
            [
                name,
                *(
                    f"{ratios[name]:.2f} ({times[name]:.3g} ms)" if name in times else "-"
                    for _, (ratios, times), _ in columns
                ),
            ]
            for name in names
        ]
        for label in dict.fromkeys(label for *_, over in columns for label in over):
            table.append([label, *(over.get(label, "") for *_, over in columns)])
        lines += ["", f"{model}, `{method}` at {ratio:g}x:", ""]
        lines += markdown(["", *(row["shape"] for row in found)], table)
    return [*lines[1:], *measured_with([row["machine"] for row in rows])]


def _against_fastest(row: Row) -> tuple[dict[str, float], dict[str, float]]:
    """Speed of each over that of the fastest dense one of other makers, and milliseconds."""
    speeds = {result["name"]: result["speedup"]["median"] for result in row["results"]}
    made_here = ("fused", "our export")
    others = [
        s for name, s in speeds.items() if name.startswith("dense") and not any(word in name for word in made_here)
    ]
    times = {result["name"]: result["milliseconds"]["median"] for result in row["results"]}
    return {name: speed / max(others) for name, speed in speeds.items()}, times


def _over_floor(row: Row) -> dict[str, str]:
    """The floors, ours over its own, and what the time of ours goes to, as far as they were measured."""
    floors, spent = row.get("floors"), row.get("spent", {}).get("ours, fused")
    if not floors:
        return {}
    kind = "int8" if row["method"].endswith(":int8") else "fp32"
    took = next(r["milliseconds"]["median"] for r in row["results"] if r["name"] == "ours, fused")
    least = floors["ours"][kind]["milliseconds"]
    found = {f"floor, dense, {each}": f"{floors['dense'][each]['milliseconds']:.3g} ms" for each in ("bf16", "int8")}
    found |= {f"floor, factors, {kind}": f"{least:.3g} ms", "ours, fused, over that": f"{took / least:.2f}"}
    for result in row["results"]:
        each = result["name"].removeprefix("ours, fused ")
        if each in floors["ours"]:
            least = floors["ours"][each]["milliseconds"]
            found[f"floor, factors, {each}"] = f"{least:.3g} ms"
            found[f"ours, fused {each}, over that"] = f"{result['milliseconds']['median'] / least:.2f}"
    return found | {f"of which {name}": f"{value:.2g} ms" for name, value in (spent or {}).items()}


LAYERS = {
    "dense-sparse": "dense_sparse",
    "in int8": "dense_sparse int8",
    "`S` materialized": "dense_sparse materialized",
    "low rank": "low_rank",
    "in int8 ": "low_rank int8",
    "by torch": "low_rank torch",
    "Kronecker": "kronecker",
    "by torch ": "kronecker torch",
    "torchao int8": "torchao int8",
    "tensorly-torch": "tensorly-torch",
}


def products() -> list[str]:
    rows = rows_of("products.jsonl")
    columns = {label: way for label, way in LAYERS.items() if any(way in row["ways"] for row in rows)}
    table = [
        [f"{row['shape'][0]}x{row['shape'][1]}, {row['rows']}"]
        + [three(row["ways"][way]["ratio"]) if way in row["ways"] else "-" for way in columns.values()]
        for row in rows
    ]
    lines = markdown(["shape, rows", *(label.strip() for label in columns)], table)
    return lines + measured_with([{**row["machine"], "kernels": row["kernels"]} for row in rows])


def products_cuda() -> list[str]:
    """Times in a CUDA graph: what the GPU takes, without Python and launches."""
    cells: dict[str, dict[tuple[str, str], Row]] = {}
    for row in (rows := rows_of("products_cuda.jsonl")):
        place = f"{row['shape'][0]}x{row['shape'][1]}, {row['rows']}"
        cells.setdefault(place, {})[row["dtype"], row["mode"]] = row["milliseconds"]["device"]
    kinds = [(dtype, mode) for dtype in ("float32", "bfloat16") for mode in ("forward", "backward")]

    def shown(times: Row) -> str:
        return f"{times['dense'] / times['sparse']:.2f} ({times['dense'] / times['build']:.2f})"

    table = [[place, *(shown(found[kind]) for kind in kinds)] for place, found in cells.items()]
    return markdown(["shape, rows", *map(", ".join, kinds)], table) + measured_with(
        [{**row, "kernels": "Triton"} for row in rows]
    )


def three(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


# Translation, Kronecker products

SYSTEMS = {
    "dense": "dense",
    "shapeshifter": "Kronecker sums (`shapeshifter`)",
    "narrow": "narrower dense",
    "low_rank": "low rank",
}


def translation() -> list[str]:
    runs = content_of("translation.json")["runs"]
    dense = next(run["parameters"] for run in runs if run["system"] == "dense")
    rows = [
        [
            SYSTEMS[run["system"]],
            f"{run['parameters']:,}",
            f"{dense / run['parameters']:.2f}x",
            rate_of(run["settings"]["learning_rate"]),
            f"{run['scores']['bleu']:.2f}",
            f"{run['greedy_bleu']:.2f}",
            f"{run['scores']['chrf']:.2f}",
            f"{run['validation_loss']:.3f}",
        ]
        for run in sorted(runs, key=lambda run: -run["scores"]["bleu"])
    ]
    header = ["system", "parameters", "compression", "learning rate", "BLEU, 5 beams", "BLEU, greedy", "chrF"]
    return markdown([*header, "validation loss"], rows) + measured_with(run["machine"] for run in runs)


def translation_timing() -> list[str]:
    found = content_of("translation.json")["timing"]
    names = {"train": "training step", "beam 5": "beam search"}
    rows = []
    for kind, by in found["medians"].items():
        what, _, precision = kind.rpartition(" ")
        others = [f"{found['of_dense'][kind][system]:.2f}" for system in SYSTEMS if system != "dense"]
        rows.append([f"{names[what]}, {precision}", f"{by['dense']:.3f} s", *others])
    return markdown(["", *SYSTEMS.values()], rows) + measured_with([found["machine"]])


def kronecker() -> list[str]:
    found = content_of("kronecker.json")
    cells = {(tuple(cell["shape"]), cell["rows"], cell["mode"]): cell for cell in found["cells"]}

    def both(shape: tuple[int, ...], rows: int, of: Callable[[Row], float | None], form: Callable[[float], str]) -> str:
        values = (of(cells[shape, rows, mode]) for mode in ("forward", "backward"))
        return " / ".join("-" if value is None else form(value) for value in values)

    def ratio(name: str) -> Callable[[Row], float | None]:
        return lambda cell: cell["slower_than_kron"].get(name)

    def with_einsum(cell: Row) -> float | None:
        return min((cell["slower_than_kron"][n] for n in ("tt2", "tt3") if n in cell["slower_than_kron"]), default=None)

    columns: list[tuple[str, Callable[[Row], float | None], Callable[[float], str]]] = [
        ("dense", ratio("dense"), three),
        ("materialized", ratio("build"), three),
        ("tensorly as installed", ratio("tt"), three),
        ("tensorly with opt_einsum", with_einsum, three),
        ("low rank", ratio("lowrank"), three),
        ("of the ideal", lambda cell: cell["share_of_ideal"], lambda value: f"{value:.0%}"),
    ]
    rows = [
        [f"{shape[0]}x{shape[1]}", str(count), *(both(shape, count, of, form) for _, of, form in columns)]
        for shape, count in dict.fromkeys((shape, count) for shape, count, _ in cells)
    ]
    return markdown(["matrix", "rows", *(name for name, _, _ in columns)], rows) + measured_with([found["machine"]])


# Accuracy on tasks

TASKS = {"sst2": "sst2", "banking77": "banking77"}


def accuracies(**wanted: Any) -> list[Row]:
    return [row for row in rows_of("accuracy.jsonl") if row | wanted == row]


def rate_of(value: float) -> str:
    """A learning rate as one writes it.

    >>> rate_of(0.0002)
    '2e-4'
    """
    return f"{value:.0e}".replace("e-0", "e-")


def marked_rate(row: Row) -> str:
    """The learning rate of a row, and whether a search over it was made and bracketed it."""
    if "learning_rate" not in row:
        return ""
    key = {"task": row["task"], "method": row["method"].removesuffix("+distill")}
    if row["method"] != "dense":
        key["dense_epochs"] = row["dense_epochs"]
    key |= {name: row[name] for name in SETUP}
    searches = [search for search in rows_of("accuracy_rates.jsonl") if search | key == search]
    if not searches:
        return rate_of(row["learning_rate"]) + "†"
    highest = max(float(rate) for rate in searches[-1]["scores"])
    return rate_of(row["learning_rate"]) + ("↑" if row["learning_rate"] >= highest else "")


def percent(values: Iterable[float | None]) -> str:
    """Of all seeds, in their order."""
    return " / ".join(f"{100 * value:.1f}" for value in values if value is not None)


def before_and_after(task: str, ratios: Sequence[float], methods: Sequence[str], **setup: Any) -> list[str]:
    """Accuracy of seed 0 before and after fine-tuning, one line for each method."""
    found = accuracies(task=task, seed=0, **setup)
    header = [task, "learning rate", "1x"]
    for ratio in ratios:
        header += [f"{ratio:g}x before fine-tuning", f"{ratio:g}x"]
    table = []
    for method in methods:
        rows = {row["ratio"]: row for row in found if row["method"] == method}
        if not rows:
            continue
        first = next(iter(rows.values()))
        whole = rows.get(None)
        size = "" if whole is None or whole["measured_ratio"] == 1 else f" ({whole['measured_ratio']:.2f}x)"
        line = [NAMES.get(method, f"`{method}`") + size, marked_rate(first), percent([whole and whole["metric"]])]
        for ratio in ratios:
            row = rows.get(ratio, {})
            line += [percent([row.get("before_training")]), percent([row.get("metric")])]
        table.append(line)
    return markdown(header, table) + measured_with(row["machine"] for row in found)


NAMES = {
    "dense": "dense",
    "dense-longer": "dense, 3 epochs more",
    "torchao-int8": "torchao int8, weights only",
    "torchao-int3": "torchao int3",
    "auto:int8=1": "`auto`, int8",
    "auto:int8=1+distill": "the same, distilled from the dense model",
    "rankdyna:int8=1": "`rankdyna`, int8",
}
SPARSE = ("dense", "dsformer", "dense_sparse", "whitened", "fwsvd", "svd", "magnitude-nm")
LOW_RANK = ("dense", "dense-longer", "torchao-int8", "whitened", "fwsvd", "svd")
SIX = {"epochs": 3.0, "dense_epochs": 6.0, "precision": "bf16"}
FIRST = {"epochs": 3.0, "dense_epochs": 3.0, "precision": "fp32"}


def seeds() -> list[str]:
    table, machines = [], []
    for task in TASKS:
        line = [task]
        for method, key in [
            ("dense", "metric"),
            ("whitened", "before_training"),
            ("whitened", "metric"),
            ("dsformer", "before_training"),
            ("dsformer", "metric"),
        ]:
            rows = accuracies(task=task, method=method, ratio=None if method == "dense" else 5.0, **SIX)
            rows.sort(key=lambda row: row["seed"])
            line.append(percent(row[key] for row in rows))
            machines += [row["machine"] for row in rows]
        table.append(line)
    header = ["5x, seeds 0, 1 (and 2)", "dense", "`whitened` before fine-tuning", "`whitened`"]
    header += ["`dsformer` before fine-tuning", "`dsformer`"]
    return markdown(header, table) + measured_with(machines)


def rounded() -> list[str]:
    table, machines = [], []
    for task in TASKS:
        for method in ("dsformer", "dense_sparse", "whitened"):
            line = [f"{task} `{method}`"]
            for ratio in (2.8, 5.0):
                (row,) = accuracies(task=task, method=method, ratio=ratio, seed=0, **SIX)
                line += [f"{row['int8_ratio']:.1f}x", f"{percent([row['metric']])}, {percent([row['int8_metric']])}"]
                machines.append(row["machine"])
            table.append(line)
    header = ["", "2.8x, int8", "accuracy before, after rounding", "5x, int8", "accuracy before, after rounding"]
    return markdown(header, table) + measured_with(machines)


def ten() -> list[str]:
    wanted = [
        ("dense", 3.0, None),
        ("torchao-int3", 3.0, None),
        ("auto:int8=1", 3.0, 10.0),
        ("auto:int8=1+distill", 3.0, 10.0),
        ("rankdyna:int8=1", 6.0, 10.0),
    ]
    table, machines = [], []
    for method, epochs, ratio in wanted:
        one_round = method in ("dense", "rankdyna:int8=1")
        line = [NAMES[method], f"{epochs:g}" if one_round else f"3 + {epochs:g}"]
        for task in TASKS:
            found = accuracies(
                task=task, method=method, ratio=ratio, seed=0, epochs=epochs, dense_epochs=3.0, precision="bf16"
            )
            row = found[-1]
            exported = percent([row.get("onnx_int8_metric")])
            line += [marked_rate(row), percent([row.get("before_training")]), percent([row["metric"]]), exported]
            machines.append(row["machine"])
        table.append(line)
    columns = ["learning rate", "before fine-tuning", "after", "exported in int8"]
    header = ["", "epochs", *(f"{task} {column}" for task in TASKS for column in columns)]
    return markdown(header, table) + measured_with(machines)


def dynamic() -> list[str]:
    wanted = [
        ("dense", 3.0, 3.0),
        ("dense", 6.0, 6.0),
        ("rankdyna", 6.0, 3.0),
        ("dynamic_dense_sparse", 6.0, 3.0),
        ("svd", 3.0, 3.0),
        ("fwsvd", 3.0, 3.0),
        ("fwsvd", 6.0, 6.0),
        ("whitened", 3.0, 3.0),
        ("whitened", 6.0, 6.0),
        ("whitened_by_loss", 3.0, 3.0),
        ("auto", 3.0, 3.0),
    ]
    table, machines = [], []
    for method, epochs, dense in wanted:
        one_round = method in ("dense", "rankdyna", "dynamic_dense_sparse")
        line = [NAMES.get(method, f"`{method}`"), f"{epochs:g}" if one_round else f"{dense:g} + {epochs:g}"]
        for task in TASKS:
            of_task = accuracies(task=task, method=method, epochs=epochs, dense_epochs=dense, precision="bf16")
            line.append(marked_rate(of_task[0]) if of_task else "")
            for ratio in (None, 3.0, 5.0):
                rows = sorted((row for row in of_task if row["ratio"] == ratio), key=lambda row: row["seed"])
                line.append(percent(row["metric"] for row in rows))
                machines += [row["machine"] for row in rows]
        table.append(line)
    columns = ["learning rate", "1x", "3x", "5x"]
    header = ["", "epochs", *(f"{task} {column}" for task in TASKS for column in columns)]
    return markdown(header, table) + measured_with(machines)


def steps() -> list[str]:
    found = content_of("dynamic_rank.json")
    cells = sorted(found["cells"], key=lambda cell: (cell["precision"] != "fp32", cell["ratio"]))
    rows = [
        [f"{cell['ratio']:g}x, {cell['precision']}"]
        + [f"{value:.2f}" for value in cell["mean_by_tenth"]]
        + [f"**{cell['whole_run_relative_to_dense']:.2f}**"]
        for cell in cells
    ]
    return markdown(["", *map(str, range(1, 11)), "whole run"], rows) + measured_with([found["machine"]])


def planning() -> list[str]:
    """Accuracy before fine-tuning, beside that of plans by sensitivity, which an earlier version made."""
    found, earlier = content_of("planning.json"), content_of("planning_by_sensitivity.json")
    cells = {(row["task"], row["method"], row["ratio"]): row["accuracy"] for row in found["rows"]}
    before = {(row["task"], row["method"], row["ratio"]): row["accuracy"] for row in earlier["rows"]}
    dense = [f"{100 * found['dense'][task]:.1f}" for task in TASKS]
    table = [["dense", *(cell for value in dense for cell in (value, "", value, value))]]
    for ratio in sorted({ratio for _, _, ratio in cells}):
        line = [f"{ratio:g}x"]
        for task in TASKS:
            line += [
                f"{100 * of[task, method, ratio]:.1f}"
                for of, method in ((cells, "whitened"), (before, "auto"), (cells, "fisher"), (cells, "auto"))
            ]
        table.append(line)
    columns = ("`whitened`", "`auto` by sensitivity", "`fisher`", "`auto`")
    header = ["ratio", *(f"{task} {column}" for task in TASKS for column in columns)]
    return markdown(header, table) + measured_with([found["machine"], earlier["machine"]])


# Fits and embeddings

KEPT = {
    "embedding_cosine": "cosine",
    "passage_cosine": "of passages",
    "similarity_spearman": "similarities",
    "neighbour_recall": "recall@10",
}
"""What an encoder keeps of the original's embeddings."""

USES = {
    "mrpc_auc": "mrpc, area",
    "mrpc_spearman": "mrpc, rank correlation",
    "banking77_nearest_neighbour_accuracy": "banking77, nearest",
    "banking77_logistic_regression_accuracy": "banking77, regression",
    "sst2_nearest_neighbour_accuracy": "sst2, nearest",
    "sst2_logistic_regression_accuracy": "sst2, regression",
}
"""What embeddings are used for."""

SMALL_RISE = 0.3
"""Rises of the loss up to which predictions should be right."""


def fits() -> list[str]:
    """Of each model and method: what it keeps, the rise of the loss and what was predicted, and the seconds it took."""
    rows = [row for row in rows_of("fits.jsonl") if "method" in row and not row["int8"] and row.get("in_order", True)]
    table = []
    for row in sorted(rows, key=lambda row: (row["model"], row["ratio"])):
        kept = f"{row['perplexity']:.1f}" if "perplexity" in row else f"{row['mean cosine']:.3f}"
        predicted = "" if row["predicted"] is None else f"{row['predicted']:.3f}"
        seconds = f"{sum(row['seconds'].values()):.0f}"
        table.append(
            [row["model"], f"{row['ratio']:g}x", f"`{row['method']}`", kept, f"{row['rise']:.3f}", predicted, seconds]
        )
    header = ["model", "ratio of the blocks", "method", "cosine or perplexity", "rise", "predicted", "seconds"]
    return markdown(header, table) + measured_with([row["machine"] for row in rows])


def decoders() -> list[str]:
    """Perplexities of language models on both texts, before and after training, and what that took."""
    found = [row for row in rows_of("decoders.jsonl") if "text" in row]
    cells = {(row["model"], row["keep"], row["method"]) for row in found}
    table = []
    for model, keep, method in sorted(cells, key=lambda cell: (cell[0], -(cell[1] or 1), cell[2])):
        same = [row for row in found if (row["model"], row["keep"], row["method"]) == (model, keep, method)]
        fitted = next(row for row in same if not row["healed"])
        healed = max((row for row in same if row["healed"]), key=lambda row: row["healed"], default=None)
        size = f"{100 * fitted['reached']:.0f} %" if "reached" in fitted else "100 %"
        kept = [
            f"{row['text'][text]['perplexity']:.1f}" if row else ""
            for text in ("wikitext2", "multi30k")
            for row in (fitted, healed)
        ]
        seconds = sum(fitted["seconds"].get(part, 0) for part in ("plan", "compress"))
        trained = f"{healed['healed']:,}, {healed['seconds']['heal'] / 60:.0f} minutes" if healed else ""
        memory = "" if method == "original" else f"{fitted['peak_bytes'] / 1e9:.1f}"
        table.append([model, size, f"`{method}`", *kept, f"{seconds:.0f}" if seconds else "", memory, trained])
    header = ["model", "bytes of blocks", "method", "WikiText-2", "trained", "multi30k", "trained", "seconds", "GB"]
    header += ["tokens of training"]
    return markdown(header, table) + measured_with([row["machine"] for row in found])


def decoder_costs() -> list[str]:
    """Seconds and memory of models of random weights."""
    found = [row for row in rows_of("decoders.jsonl") if "text" not in row]
    table = [
        [
            row["model"],
            f"{row['matrices']}",
            f"`{row['method']}`",
            f"{row['seconds']['plan']:.0f}",
            f"{row['seconds']['compress']:.0f}",
            f"{row['peak_bytes'] / 1e9:.1f}",
        ]
        for row in sorted(found, key=lambda row: (row["model"], row["method"]))
    ]
    header = ["sizes of", "matrices", "method", "seconds of the plan", "of fits", "GB"]
    return markdown(header, table) + measured_with([row["machine"] for row in found])


def one_row() -> list[str]:
    """One row times each structure: milliseconds, and how many times those in which memory moves its bytes, with what a
    call from Python takes and without."""
    found = rows_of("one_row.jsonl")
    cells = {(tuple(row["shape"]), row["structure"], row["bits"]): row for row in found}
    table = []
    for shape, kind in dict.fromkeys(key[:2] for key in cells):
        line = [f"{shape[0]:,} x {shape[1]:,}", f"`{kind}`"]
        for bits in (None, 8):
            row = cells[shape, kind, bits]
            line.append(f"{row['milliseconds']:.3f} ({row['times_floor'][1]:.1f}, {row['times_floor_inside'][1]:.1f})")
        table.append(line)
    header = ["matrix", "structure", "float32", "int8"]
    rates = sorted(row["copy_gigabytes_per_second"] for row in found)
    calls = sorted(row["call_milliseconds"] for row in found)
    extra = (
        f"; copies moved {rates[0]:.0f} to {rates[-1]:.0f} GB/s; calls of next to nothing take {calls[0]:.3f} to "
        f"{calls[-1]:.3f} ms"
    )
    return markdown(header, table) + measured_with([row["machine"] for row in found], extra)


def ordered() -> list[str]:
    """Of each model and ratio: the rise where matrices are fitted to the dense inputs, and where in order."""
    rows = [row for row in rows_of("fits.jsonl") if row.get("method") == "fisher" and not row["int8"]]
    found = {(row["model"], row["ratio"], row.get("in_order", True)): row for row in rows}
    pairs = [(found[model, ratio, True], row) for (model, ratio, order), row in sorted(found.items()) if not order]
    table = []
    for with_order, without in pairs:
        rises = [f"{row['rise']:.3f}" for row in (without, with_order)]
        table.append(
            [without["model"], f"{without['ratio']:g}x", *rises, f"{with_order['rise'] / without['rise']:.2f}"]
        )
    header = ["model", "ratio", "rise, inputs of the dense model", "rise, in order", "of it"]
    return markdown(header, table) + measured_with([row["machine"] for pair in pairs for row in pair])


def fits_int8() -> list[str]:
    """MiniLM in int8 at small and large ratios: what it keeps, and how many matrices became what."""
    rows = [row for row in rows_of("fits.jsonl") if row.get("int8")]
    table = []
    for row in sorted(rows, key=lambda row: row["ratio"]):
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(row["structures"].items()))
        kept = [f"{row['mean cosine']:.4f}", f"{row['predicted']:.4f}", f"{row['rise']:.4f}"]
        table.append([f"{row['ratio']:g}x", f"`{row['method']}`", f"{row['measured_ratio']:.2f}x", *kept, kinds])
    header = ["ratio", "method", "reached", "cosine", "predicted rise", "rise", "matrices"]
    return markdown(header, table) + measured_with([row["machine"] for row in rows])


def predicted_plans() -> list[str]:
    """Of each model: rank correlation of predicted and measured rises, and by how much small ones are off."""
    last = {  # plans that were predicted again count once
        (row["model"], row["plan"]["structure"], row["plan"]["allocation"], row["plan"]["ratio"]): row
        for row in rows_of("fits.jsonl")
        if "plan" in row
    }
    rows, table = list(last.values()), []
    for model in dict.fromkeys(row["model"] for row in rows):
        plans = [row["plan"] for row in rows if row["model"] == model]
        correlation: Any = spearmanr([plan["predicted"] for plan in plans], [plan["rise"] for plan in plans])[0]
        ratios = ", ".join(f"{ratio:g}x" for ratio in sorted({plan["ratio"] for plan in plans}))
        small = [plan for plan in plans if plan["rise"] <= SMALL_RISE]
        line = [model, ratios, f"{len(plans)}", f"{correlation:.3f}", f"{len(small)}"]
        for allocation in ("uniform", "by_loss"):
            factors = [plan["predicted"] / plan["rise"] for plan in small if plan["allocation"] == allocation]
            line.append(f"{min(factors):.2f} to {max(factors):.2f}")
        table.append(line)
    header = ["model", "ratios", "plans", "rank correlation", "with a rise up to 0.3", "predicted / measured, uniform"]
    return markdown([*header, "by loss"], table) + measured_with([row["machine"] for row in rows])


def fine_tuned() -> list[str]:
    """Accuracy before and after fine-tuning by seeds, of plans by loss and of dynamic ranks."""
    earlier = accuracies(dense_epochs=3.0, precision="bf16", train_rows=4000)
    today = rows_of("accuracy_fits.jsonl")
    lines: list[tuple[str, str, list[Row]]] = [("1x", "dense", [row for row in today if row["method"] == "dense"])]
    for ratio, suffix, size in ((5.0, "", "5x"), (10.0, ":int8=1", "10x, int8")):
        for method in ("auto", "fisher", "rankdyna", "rankdyna_fisher"):
            for version, rows in ((" of an earlier version", earlier), ("", today)):
                found = [row for row in rows if (row["method"], row["ratio"]) == (method + suffix, ratio)]
                lines.append((size, f"`{method}`{version}", found))
    table, machines = [], []
    for size, label, rows in lines:
        if not rows:
            continue
        epochs = min(row["epochs"] for row in rows)  # the dense model is scored again for other epochs
        line = [size, label, "6" if epochs == 6 else "3" if label == "dense" else "3 + 3"]
        for task in TASKS:
            cells = [row for row in rows if (row["task"], row["epochs"]) == (task, epochs)]
            cells.sort(key=lambda row: row["seed"])
            line += [percent(row.get("before_training") for row in cells), percent(row["metric"] for row in cells)]
            line.append(f"{100 * sum(row['metric'] for row in cells) / len(cells):.1f}" if len(cells) > 1 else "")
            machines += [row["machine"] for row in cells]
        table.append(line)
    header = ["blocks", "method", "epochs"]
    for task in TASKS:
        header += [f"{task} before fine-tuning", f"{task} after", "mean"]
    return markdown(header, table) + measured_with(machines)


def encoders() -> list[str]:
    """Sentence encoders by bytes: what they keep of the original, and how much worse they are in points."""
    rows = sorted(rows_of("encoders.jsonl"), key=lambda row: (row["model"], -row["bytes"], row["minutes"]))
    table = []
    for row in rows:
        uses, whole = row["uses"], row["contestant"] == "original"
        line = [
            row["model"],
            "whole" if whole else f"{row['ratio']:g}x",
            ", ".join(made_by(row)),
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['total_seconds'] / 60:.0f} ({row['minutes']:g})",
        ]
        line += [f"{uses[name]['value']:.3f}" if name in uses else "" for name in KEPT]
        for name in USES:
            if name not in uses:
                line.append("")
                continue
            ends = [100 * uses[name][f"{'' if whole else 'difference_'}{end}"] for end in ("value", "low", "high")]
            line.append(("{:.1f} [{:.1f}, {:.1f}]" if whole else "{:+.1f} [{:+.1f}, {:+.1f}]").format(*ends))
        table.append(line)
    header = ["model", "file", "made by", "MB", "minutes (of training)", *KEPT.values(), *USES.values()]
    return markdown(header, table) + measured_with(row["machine"] for row in rows)


def made_by(row: dict[str, Any]) -> Iterator[str]:
    """What made an encoder, and how it differs from the command of the page."""
    yield row["contestant"]
    if row["contestant"] == "factorformer":
        yield row.get("values", "int8")
    if "layers" in row:
        yield f"{row['layers']} in int8"
    if "dimension" in row:
        yield f"{row['dimension']} dimensions in int8"
    if "options" in row:
        yield " ".join(row["options"])
    if "without" in row:
        yield f"learned without {' and '.join(row['without'])}"


def lookups() -> list[str]:
    """Look-ups in tables of factors, times plain ones, and how long their fits take."""
    found = content_of("lookups.json")
    kinds = list(dict.fromkeys((tuple(c["shape"]), c["drawn"], c["structure"]) for c in found["cells"]))
    fits = {(tuple(fit["shape"]), fit["structure"]): fit for fit in found["fits"]}
    table = []
    for shape, drawn, kind in kinds:
        cells = [c for c in found["cells"] if (tuple(c["shape"]), c["drawn"], c["structure"]) == (shape, drawn, kind)]
        fit = fits.get((shape, kind))
        times = [f"{c['ratio']:.1f}x ({c['low']:.1f} to {c['high']:.1f}), {c['product']:.1f}x" for c in cells]
        plain = 1000 * cells[0]["plain_milliseconds"]
        line = [f"{shape[0]:,} x {shape[1]}", drawn, f"{plain:.0f} us", kind.replace("_", " "), *times]
        table.append(line + ([f"{fit['seconds']:.1f} s", f"{fit['error']:.3f}"] if fit else ["", ""]))
    widths = list(dict.fromkeys(cell["values"] for cell in found["cells"]))
    header = ["table", "tokens", "plain", "structure", *widths, "fit", "error"]
    return markdown(header, table) + measured_with([found["machine"]])


def splits() -> list[str]:
    """Of each matrix and ratio, the best dense-sparse sizes by the plain metric, beside low rank of as many bytes."""
    found = content_of("dictionary.json")["splits"]
    table = []
    for matrix, ratio in dict.fromkeys((cell["matrix"], cell["ratio"]) for cell in found["result"]):
        cells = [cell for cell in found["result"] if (cell["matrix"], cell["ratio"]) == (matrix, ratio)]
        low, *others = cells
        line = [matrix, f"{ratio:.1f}x"]
        for metric in ("plain", "moment"):
            best = min(others, key=lambda cell, metric=metric: cell[metric])
            line += [f"{low[metric]:.3f}", f"{best[metric]:.3f} ({best['atoms']} atoms, {best['nonzeros']} nonzeros)"]
        table.append(line)
    header = ["matrix", "ratio", "low rank, weights", "dense-sparse, weights"]
    header += ["low rank, outputs", "dense-sparse, outputs"]
    return markdown(header, table) + measured_with([found["machine"]])


def embeddings() -> list[str]:
    found = content_of("embeddings.json")
    cells = {(c["ratio"], c["method"], c["calibration_texts"]): c for c in found["cells"]}
    ratios = sorted({ratio for ratio, _, _ in cells})
    methods = list(dict.fromkeys((method, texts) for _, method, texts in cells))

    def shown(ratio: float, method: str, texts: int) -> str:
        cell = cells.get((ratio, method, texts))
        return f"{cell['embedding_cosine']:.3f} ({cell['similarity_spearman']:.3f})" if cell else ""

    rows = [
        [f"`{method}`", f"{texts:,}" if texts else "none", *(shown(ratio, method, texts) for ratio in ratios)]
        for method, texts in methods
    ]
    machines = [found["machine"], *([found["machine_kronecker"]] if "machine_kronecker" in found else [])]
    return markdown(["method", "calibration texts", *(f"{ratio:g}x" for ratio in ratios)], rows) + measured_with(
        machines
    )


def dictionary_peers() -> list[str]:
    found = content_of("dictionary.json")["peers"]
    rows = [[r["route"], f"{r['processor_seconds']:.2f}", f"{r['error']:.3f}"] for r in found["result"]]
    return markdown(["", "CPU seconds", "relative error"], rows) + measured_with([found["machine"]])


def straight_through() -> list[str]:
    found = content_of("straight_through.json")
    forms = {"fixed support": "fixed support", "moving": "straight-through, support moving", "frozen": "frozen"}
    rows = [
        [f"{cell['ratio']:g}x, {cell['precision']}", f"{cell['seconds']['dense']:.3f} s"]
        + [f"{cell['relative_to_dense'][form]:.2f}" for form in forms]
        for cell in found["cells"]
    ]
    return markdown(["", "dense step", *forms.values()], rows) + measured_with([found["machine"]])


def fitting() -> list[str]:
    found = content_of("fitting.json")
    rows = []
    for name, seconds in found["seconds_of_one_block"].items():
        excess = found["largest_excess_over_optimum"].get(name)
        share = found["share_of_svd_time"].get(name, 1.0)
        label = "`torch.linalg.svd`" if name == "svd" else f"{name} fit"
        rows.append([label, f"{seconds:.3f}", f"{share:.2f}", "" if excess is None else f"{excess:.0e}"])
    header = ["", "seconds a block", "of SVD", "relative excess over the optimal error"]
    return markdown(header, rows) + measured_with([found["machine"]])


TABLES: dict[str, Callable[[], list[str]]] = {
    "headline": headline,
    "latency": latency,
    "fused-latency": fused_latency,
    "products": products,
    "products-cuda": products_cuda,
    "translation": translation,
    "translation-timing": translation_timing,
    "kronecker": kronecker,
    "ten": ten,
    "dynamic": dynamic,
    "steps": steps,
    "planning": planning,
    "fits": fits,
    "decoders": decoders,
    "decoder-costs": decoder_costs,
    "one-row": one_row,
    "fits-order": ordered,
    "fits-int8": fits_int8,
    "predicted-plans": predicted_plans,
    "fine-tuned": fine_tuned,
    "encoders": encoders,
    "lookups": lookups,
    "splits": splits,
    "sparse-sst2": lambda: before_and_after("sst2", (2.8, 5.0), SPARSE, **SIX),
    "sparse-banking77": lambda: before_and_after("banking77", (2.8, 5.0), SPARSE, **SIX),
    "seeds": seeds,
    "rounded": rounded,
    "low-rank-sst2": lambda: before_and_after("sst2", (2.8, 5.0), LOW_RANK, **FIRST),
    "low-rank-banking77": lambda: before_and_after("banking77", (2.8, 5.0), LOW_RANK, **FIRST),
    "embeddings": embeddings,
    "dictionary-peers": dictionary_peers,
    "straight-through": straight_through,
    "fitting": fitting,
}


def render(page: str) -> tuple[str, list[str]]:
    """A page with its tables as the results have them, and the names of those that were stale."""
    stale: list[str] = []

    def table(match: re.Match[str]) -> str:
        start, name, old, end = match.groups()
        if name not in TABLES:
            raise SystemExit(f"there is no table '{name}': one of {', '.join(TABLES)}")
        new = "\n".join(TABLES[name]()) + "\n"
        if new != old:
            stale.append(name)
        return start + new + end

    return MARKED.sub(table, page), stale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a table is stale")
    args = parser.parse_args()
    found = False
    for path in PAGES:
        page = path.read_text()
        new, stale = render(page)
        if stale:
            found = True
            print(f"{path.relative_to(HERE.parent)}: {', '.join(stale)}{' stale' if args.check else ' written'}")
            if not args.check:
                path.write_text(new)
    sys.exit(1 if found and args.check else 0)


if __name__ == "__main__":
    main()
