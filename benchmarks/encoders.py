"""Sentence encoders in a tenth of their size and less, measured by what they are used for.

    python benchmarks/encoders.py minilm --minutes 30 --work FOLDER
    python benchmarks/encoders.py MPNET --ratios 10 20 --minutes 120 --work FOLDER
    python benchmarks/encoders.py minilm --ratios 10 20 --minutes 10 --without banking77 sst2 --work FOLDER

A model is a directory, or `minilm` for the embedded one. Every contestant is made of it and of plain text (see
`sentences.py`), and is a directory of so many bytes of weights:

- `original`: the model itself;
- `factorformer`: `compress --int4 --scope all --ratio R --train ... --distill ... --minutes M`, the whole file counted;
- `int8`: all matrices dense in int8, nothing trained;
- `layers`: the first and the last layers of the model and those at equal distances between, as many as fit the bytes of
  ours, dense in int8, healed on the same text for the same minutes; none where the table of embeddings alone takes
  more;
- `model2vec`: static embeddings distilled from the model, of as many dimensions as fit the bytes in int8.

Embeddings are compared with those of the original on 20,000 sentences and 500 passages that nothing was trained on, on
pairs of mrpc (area under the curve, and rank correlation), and on banking77 and sst2 (nearest neighbour, and logistic
regression with cross-validation). Of all these data sets the training parts are learned from, without labels, unless
`--without` names them.

Each contestant is a row; a run skips those that are there already, goes on with one that was interrupted, all of whose
time counts, and draws all of the model in the end. What the original makes of these texts is kept in the folder of
work, for the next run with the same texts, files, processor and libraries.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentences
import torch
from common import RESULTS, TASKS, append_line, commit, default_data, machine, options, read_lines, start
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging

import factorformer
from factorformer.export.sentence import find_layout, read_longest
from factorformer.files import whole_file
from factorformer.hf import minilm
from factorformer.hf.source import copy_companions
from factorformer.tasks import data, embeddings, evaluation
from factorformer.tasks.checkpoints import begun_at
from factorformer.tasks.embeddings import Use

PAIRS = ("mrpc", ("sentence1", "sentence2"))
CLASSES = ("banking77", "sst2")
CONTESTANTS = ["original", "factorformer", "int8", "model2vec", "layers"]
IMAGE = RESULTS.parent.parent / "docs" / "images" / "encoders.svg"
FACTORFORMER = Path(sys.executable).with_name("factorformer")

HEADER = 2**15
"""Bytes of a file of weights that are none of values, at most."""

Embed = Callable[[Sequence[str]], Tensor]


class Judge:
    """Texts, and what the original makes of them."""

    def __init__(self, folder: Path, corpus: list[str], source: Path, work: Path) -> None:
        table = data.read(folder / PAIRS[0] / "test.tsv")
        self.pairs, self.same = [list(table[column]) for column in PAIRS[1]], list(table["label"])
        tables = {name: data.read(folder / name / "test.tsv") for name in CLASSES}
        self.classes = {name: (list(table["text"]), list(table["label"])) for name, table in tables.items()}
        self.texts = {"corpus": corpus, "first": self.pairs[0], "second": self.pairs[1]}
        self.texts |= {name: found for name, (found, _) in self.classes.items()}
        self.texts["passages"] = sentences.passages(folder)
        here = machine()
        known = [self.texts, *(here[key] for key in ("device", "instructions", "torch", "transformers"))]
        digest = hashlib.sha256(json.dumps(known).encode())
        for file in sorted(found for found in source.rglob("*") if found.is_file()):
            digest.update(file.read_bytes())
        kept = work / f"original-{digest.hexdigest()[:16]}.safetensors"
        if not kept.exists():
            with whole_file(kept, "the embeddings of the original") as partial:
                save_file(self._embeddings(encoder(source)), partial)
        self.wanted = load_file(kept)

    def _embeddings(self, embed: Embed) -> dict[str, Tensor]:
        return {name: embed(found) for name, found in self.texts.items()}

    def measure(self, embed: Embed | None) -> dict[str, dict[str, float]]:
        """Each measure of a contestant, that of the original, and their difference, with the ends of intervals.

        Args:
            embed: the contestant; None for the original, whose embeddings are known.
        """
        found, wanted = self.wanted if embed is None else self._embeddings(embed), self.wanted
        uses = dict(embeddings.kept(wanted["corpus"], found["corpus"]))
        passages = embeddings.kept(wanted["passages"], found["passages"])
        if "embedding_cosine" in passages:
            uses["passage_cosine"] = passages["embedding_cosine"]
        pairs = ((e["first"], e["second"]) for e in (wanted, found))
        for name, use in embeddings.pairs(*pairs, self.same).items():
            uses[name.replace("pair", "mrpc")] = use
        for name, (_, labels) in self.classes.items():
            uses |= {f"{name}_{key}": use for key, use in embeddings.classes(wanted[name], found[name], labels).items()}
        return {name: _numbers(use) for name, use in uses.items()}


def _numbers(use: Use) -> dict[str, float]:
    found = {}
    for prefix, estimate in (("", use.compressed), ("original_", use.original), ("difference_", use.difference)):
        if estimate is not None:
            found |= {f"{prefix}{end}": round(getattr(estimate, end), 4) for end in ("value", "low", "high")}
    return found


def encoder(path: Path) -> Embed:
    """A model directory, pooled as it says."""
    layout = find_layout(str(path))
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(layout.transformer).eval()
    longest = read_longest(layout.transformer) or 128

    def embed(texts: Sequence[str]) -> Tensor:
        rows = data.datasets.Dataset.from_dict({"text": list(texts)})
        rows = data.encode(tokenizer, rows, data.Columns(("text",)), max_length=longest)
        return evaluation.embed(model, tokenizer, rows, 64, layout.pool)

    return embed


def weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*.safetensors"))


def compressed(source: Path, output: Path, ratio: float, *more: object) -> dict[str, Any]:
    """What `factorformer compress` says, in a process of its own, and the `seconds` that processes before it took.

    What was interrupted goes on, and what is done already is not done again; all of its time counts.
    """
    command = [
        str(part) for part in (FACTORFORMER, "compress", source, output, "--ratio", ratio, "--scope", "all", *more)
    ]
    record = output.with_name(f"{output.name}-run.json")
    run: dict[str, Any] = {"command": command, "seconds": 0.0}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(record.read_text(encoding="utf-8"))
        run = known if known.get("command") == command else run
    if not output.exists() or run.get("commit") != commit():
        run.pop("result", None)  # made by other code, or gone
    before = run["seconds"]
    if "result" not in run:
        run["commit"] = commit()
        resumes = begun_at(output.with_name(f".{output.name}.training") / "checkpoints") is not None and before > 0
        before, began = before if resumes else 0.0, time.perf_counter()
        again = ["--overwrite", *(["--resume"] if resumes else [])]
        with subprocess.Popen([*command, *again, "--json"], stdout=subprocess.PIPE, text=True) as process:
            said = None
            while said is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    said, _ = process.communicate(timeout=10)
                run["seconds"] = before + time.perf_counter() - began
                _keep(record, run)
        if process.returncode:
            raise SystemExit(f"compress ended with {process.returncode}")
        run["result"] = json.loads(said)
        _keep(record, run)
        return {**run["result"], "before": before}
    return {**run["result"], "before": run["seconds"]}


def _keep(record: Path, run: dict[str, Any]) -> None:
    with whole_file(record, "what a run took so far") as partial:
        partial.write_text(json.dumps(run), encoding="utf-8")


def fewer_layers(source: Path, output: Path, limit: int) -> int:
    """Write a model of as many layers as fit into so many bytes in int8, and return their number; 0 for none.

    At least one layer less than it has: with all of them it is `int8`.
    """
    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    layers = config.num_hidden_layers
    each = in_int8(model.encoder.layer[0])
    rest = in_int8(model) - layers * each
    count = min((limit - HEADER - rest) // each, layers - 1)
    if count < 1:
        return 0
    chosen = [round(place * (layers - 1) / max(count - 1, 1)) for place in range(count)]
    model = AutoModel.from_pretrained(source)
    model.encoder.layer = torch.nn.ModuleList([model.encoder.layer[place] for place in chosen])
    model.config.num_hidden_layers = count
    model.save_pretrained(output)
    copy_companions(source, output)
    return count


def in_int8(module: torch.nn.Module) -> int:
    """Bytes of all parameters: of matrices a byte for each value and a scale for each row, of others float32."""
    return sum(p.numel() + 4 * len(p) if p.dim() > 1 else 4 * p.numel() for p in module.parameters())


def static(source: Path, limit: int) -> tuple[Embed, Any]:
    """Static embeddings in so many bytes, and the table of them, `(tokens, dimension)`."""
    from model2vec.distill import distill

    size, model = AutoConfig.from_pretrained(source).hidden_size, None
    tokens = len(AutoTokenizer.from_pretrained(source))
    while model is None or len(model.embedding) < tokens:  # it leaves out tokens that are not used
        tokens = tokens if model is None else len(model.embedding)
        model = distill(str(source), pca_dims=min(limit // tokens, size), quantize_to="int8")
    return lambda texts: torch.from_numpy(model.encode(list(texts))), model.embedding


def contestants(
    name_of_model: str, source: Path, folder: Path, text: Path, args: Any
) -> Iterator[tuple[dict[str, Any], Embed | None]]:
    """Rows without their measures, and what embeds; None for the original."""
    original = weight_bytes(source)
    healing = ("--train", text, "--distill", source, "--minutes", args.minutes, "--seed", args.seed)
    for ratio in args.ratios:
        for name in args.contestants:
            key = {
                "contestant": name,
                "ratio": ratio,
                "minutes": args.minutes,
                "seed": args.seed,
                "model": name_of_model,
            }
            if args.without and name in ("factorformer", "layers"):
                key |= {"without": args.without}
            if name == "factorformer":
                key |= {"values": args.values} | ({"options": args.options} if args.options else {})
            if name in ("original", "int8"):
                key |= {"ratio": 1.0 if name == "original" else 4.0, "minutes": 0}
            if name == "model2vec":
                key |= {"minutes": 0}
            said = (*key, "options", "values", "without")
            known = ({k: row[k] for k in said if k in row} for row in read_lines(args.output))
            if key in known:
                continue
            output, began = folder / f"{name}-{ratio:g}", time.perf_counter()
            limit, more = _limit(args.output, name_of_model, ratio) or int(original / ratio), {}
            if name == "original":
                yield {**key, "bytes": original, "total_seconds": 0}, None
                continue
            if name == "model2vec":
                embed, table = static(source, limit)
                more |= {"dimension": table.shape[1], "bytes": table.nbytes}
            elif name == "layers":
                dense = folder / f"layers-{ratio:g}-dense"
                more["layers"] = fewer_layers(source, dense, limit)
                if not more["layers"]:
                    print(f"{ratio:g}x: the table of embeddings alone takes more than {limit:,} bytes in int8")
                    continue
                more["result"] = compressed(dense, output, 3.95, "--int8", *healing)
            elif name == "int8":
                more["result"] = compressed(source, output, 3.95, "--int8", "--calibration", text)
            else:
                more["result"] = compressed(source, output, ratio, f"--{args.values}", *healing, *args.options)
            took = time.perf_counter() - began
            if name != "model2vec":
                result = more.pop("result")
                embed, more["bytes"] = encoder(output), weight_bytes(output)
                more["seconds"], took = result["seconds"], took + result["before"]
            yield {**key, **more, "total_seconds": round(took)}, embed


def _limit(results: Path, model: str, ratio: float) -> int | None:
    """The bytes of `factorformer` at a ratio, within which the others stay: with its header it takes a little more."""
    ours = (row for row in read_lines(results) if row["contestant"] == "factorformer" and row.get("values") == "int4")
    return max((row["bytes"] for row in ours if row["model"] == model and row["ratio"] == ratio), default=None)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Recall of neighbours, and what the worst of the other measures loses, against bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "encoders"  # the same file from the same figures
    plt.rcParams["svg.fonttype"] = "none"
    grey = "#808890"
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    rows = [row for row in rows if "options" not in row]
    names = [f"{row['contestant']} {row.get('values', '')}".strip() for row in rows]
    for name in dict.fromkeys(names):
        longest: dict[float, dict[str, Any]] = {}  # training of each ratio
        for row in (row for row, called in zip(rows, names, strict=True) if called == name):
            if row["ratio"] not in longest or row["minutes"] > longest[row["ratio"]]["minutes"]:
                longest[row["ratio"]] = row
        points = sorted(longest.values(), key=lambda row: row["bytes"])
        sizes = [point["bytes"] / 1e6 for point in points]
        for axis, measure in zip(axes, (_recall, _worst), strict=True):
            axis.plot(sizes, [measure(point["uses"]) for point in points], "o-", label=name, markersize=4)
    for axis, title in zip(axes, ("recall of ten neighbours", "worst difference to the original, points"), strict=True):
        axis.set_xscale("log")
        axis.set_title(title, color=grey, fontsize=10, loc="left")
        axis.set_xlabel("MB of the whole file", color=grey, fontsize=9)
        axis.tick_params(colors=grey, labelsize=9, which="both")
        for side in axis.spines.values():
            side.set_color(grey)
    axes[0].legend(frameon=False, labelcolor=grey, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})


def _recall(uses: dict[str, dict[str, float]]) -> float:
    return uses["neighbour_recall"]["value"]


def _worst(uses: dict[str, dict[str, float]]) -> float:
    return min(100 * use["difference_value"] for use in uses.values() if "difference_value" in use)


def main() -> None:
    parser = options(__doc__, "encoders.jsonl")
    parser.add_argument("--image", type=Path, help="where to draw; by default docs/images/encoders.svg for minilm")
    parser.add_argument("model", help="a directory, or `minilm`")
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with one folder for each task")
    parser.add_argument("--work", type=Path, help="folder for texts and models")
    parser.add_argument("--without", nargs="*", default=[], choices=list(TASKS), help="tasks to learn no text of")
    parser.add_argument("--ratios", nargs="+", type=float, default=[4.0, 10.0, 20.0, 32.0])
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument(
        "--values", choices=["int4", "int8"], default="int4", help="in which `factorformer` stores them"
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument(
        "--options", nargs="*", default=[], help="more options of `factorformer compress`, without `--`"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = start(parser)
    if args.work is None:
        parser.error("--work is needed: a folder for texts and models")
    args.options = [f"--{option}" if not option[0].isdigit() else option for option in args.options]
    logging.set_verbosity_error()
    data.datasets.disable_progress_bars()
    source = minilm.directory() if args.model == "minilm" else Path(args.model)
    called = args.model if args.model == "minilm" else source.name
    folder = args.work / called
    folder.mkdir(parents=True, exist_ok=True)
    learned, judged = sentences.split(args.data, args.without)
    text = folder / f"{'-'.join(['learned', *args.without])}.txt"
    text.write_text("\n".join(learned) + "\n", encoding="utf-8")
    judge = Judge(args.data, judged, source, folder)
    for row, embed in contestants(called, source, folder, text, args):
        uses = judge.measure(embed)
        if row["contestant"] == "model2vec":  # whose dimensions are others, or turned
            uses = {name: use for name, use in uses.items() if not name.endswith("_cosine")}
        row |= {"uses": uses, "machine": machine(), "version": factorformer.__version__}
        append_line(args.output, row)
        print(json.dumps({k: v for k, v in row.items() if k != "machine"}), flush=True)
    image = args.image or (IMAGE if called == "minilm" else None)
    rows = [row for row in read_lines(args.output) if row["model"] == called and "without" not in row]
    if image is not None and rows:
        draw([row for row in rows if row["contestant"] != "original"], image)


if __name__ == "__main__":
    main()
