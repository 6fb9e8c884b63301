"""Translation from scratch: the same Transformer dense, as Kronecker sums, low-rank and narrower, on Multi30k.

    python benchmarks/translation.py --systems dense shapeshifter low_rank narrow --seeds 0
    python benchmarks/translation.py --timing
    python benchmarks/translation.py --plot

German to English, cased and untokenized text, one joint byte-level BPE vocabulary trained on both sides of train. Every
system sees the same batches in the same order, as many steps, the same schedule, dropout and label smoothing; only the
peak of the learning rate differs (`--rates`). `dense` is the reference; `shapeshifter` replaces its matrices by sums of
Kronecker products with a tenth of the parameters; `low_rank` by products of two thin matrices with as many; `narrow` is
a dense Transformer of smaller width with as many. All parameters count, fixed tables of positions included.

Nothing is chosen by the test set: it gives BLEU and chrF of the model of the last step. A run that is killed goes on
from its last checkpoint when the same command is given again; a finished one is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import sacrebleu
import torch
from common import RESULTS, default_data, machine, options, start, write
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

import factorformer
from factorformer.tasks import from_scratch, translation
from factorformer.tasks.tokenization import train_tokenizer

RATES = {"dense": 1e-3, "shapeshifter": 2e-3, "low_rank": 2e-3, "narrow": 4e-3}
"""Peak of the learning rate of each system: the best of 200-step trials, a factor of two apart,
by a script that was not kept."""

LABELS = {
    "dense": "dense",
    "shapeshifter": "Kronecker sums",
    "low_rank": "low rank",
    "narrow": "narrow dense",
}


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of the dense reference, and of the narrow one."""

    width: int
    ffn: int
    layers: int
    heads: int = 8
    vocabulary: int = 8000
    positions: int = 64
    dropout: float = 0.1

    def model(self) -> MarianMTModel:
        """A freshly initialized encoder-decoder with one embedding matrix for both sides and the output."""
        return MarianMTModel(
            MarianConfig(
                vocab_size=self.vocabulary,
                d_model=self.width,
                encoder_layers=self.layers,
                decoder_layers=self.layers,
                encoder_ffn_dim=self.ffn,
                decoder_ffn_dim=self.ffn,
                encoder_attention_heads=self.heads,
                decoder_attention_heads=self.heads,
                max_position_embeddings=self.positions,
                dropout=self.dropout,
                activation_function="relu",
                scale_embedding=True,
                pad_token_id=0,
                eos_token_id=1,
                forced_eos_token_id=None,
                decoder_start_token_id=0,
                # For texts this short faster than fused kernels, backward above all.
                attn_implementation="eager",  # pyright: ignore[reportCallIssue]
            )
        )

    def parameters(self) -> int:
        """All parameters of the dense model, counted without allocating any."""
        with torch.device("meta"):
            return self.model().num_parameters()


def narrow(size: Size, parameters: int) -> Size:
    """The dense Transformer, as deep, that has as many parameters or slightly fewer, in the reference's proportions.

    Widths are multiples of 8, with 1, 2, 4 or 8 heads, as many as leave each 16 columns or more. Of each width the
    largest feed-forward layer that fits is taken, a multiple of 8 from 1 to 4 times the width. Among those that miss
    the parameters by 1 % at most (or by least) the one wins whose ratio of feed-forward width to width is the
    reference's, as nearly as there is one.
    """
    found = []
    for width in range(8, size.width, 8):
        heads = max(h for h in (1, 2, 4, 8) if h <= size.heads and width % h == 0 and (h == 1 or width // h >= 16))
        base, step = (dataclasses.replace(size, width=width, heads=heads, ffn=f).parameters() for f in (8, 16))
        ffn = min(8 + (parameters - base) // (step - base) * 8, 4 * width)
        if ffn >= width:
            candidate = dataclasses.replace(size, width=width, heads=heads, ffn=ffn)
            found.append((1 - candidate.parameters() / parameters, candidate))
    smallest = min(missing for missing, _ in found)
    close = [candidate for missing, candidate in found if missing <= max(smallest, 0.01)]
    return min(close, key=lambda c: abs(c.ffn / c.width - size.ffn / size.width))


def build(system: str, size: Size, ratio: float, seed: int) -> PreTrainedModel:
    """A fresh model of one system."""
    torch.manual_seed(seed)
    if system == "dense":
        return size.model()
    if system == "narrow":
        return narrow(size, build("shapeshifter", size, ratio, seed).num_parameters()).model()
    model = size.model()
    if system == "shapeshifter":
        factorformer.initialize(model, factorformer.plan(model, "shapeshifter", ratio=ratio))
    else:
        wanted = build("shapeshifter", size, ratio, seed).num_parameters()
        torch.manual_seed(seed)
        factorformer.initialize(model, factorformer.plan(model, "svd", model.num_parameters() / wanted, scope="all"))
    return model


class Bench:
    """Data, tokenizer and settings of the runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.size = Size(args.width, args.ffn, args.layers, args.heads, args.vocabulary, args.positions, args.dropout)
        self.pairs = {
            part: translation.read_parallel(args.data / f"{part}.de", args.data / f"{part}.en")[: args.pairs]
            for part in ("train", "val", "test2016")
        }
        self.tokenizer = self._tokenizer()
        self.rows = {
            part: translation.encode(self.pairs[part], self.tokenizer, args.positions) for part in ("train", "val")
        }

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        path = self.args.work / f"tokenizer-{self.size.vocabulary}-{self.args.pairs or 'all'}"
        if not path.exists():
            texts = [text for pair in self.pairs["train"] for text in pair]
            train_tokenizer(texts, self.size.vocabulary).save_pretrained(path)
        return AutoTokenizer.from_pretrained(path)

    def settings(self, system: str, seed: int) -> from_scratch.ScratchSettings:
        args = self.args
        return from_scratch.ScratchSettings(
            epochs=args.epochs,
            steps=args.steps or None,
            learning_rate=args.rates[system],
            batch_size=args.batch,
            label_smoothing=args.label_smoothing,
            warmup=args.warmup,
            weight_decay=args.weight_decay,
            points=args.points,
            precision=args.precision,
            seed=seed,
            use_cpu=args.device == "cpu",
        )

    def model(self, system: str, seed: int) -> PreTrainedModel:
        return build(system, self.size, self.args.ratio, seed)

    def run(self, system: str, seed: int) -> dict[str, Any]:
        """Train one system and score it; what is finished already is read."""
        settings = self.settings(system, seed)
        name = f"{system}-{seed}-{settings.learning_rate:g}"
        result = self.args.work / f"{name}.json"
        key = {
            "system": system,
            "size": dataclasses.asdict(self.size),
            "ratio": self.args.ratio,
            "settings": dataclasses.asdict(settings),
            "pairs": len(self.pairs["train"]),
        }
        if result.exists():
            row = json.loads(result.read_text())
            if row | key == row:
                print(f"{name}: finished before, BLEU {row['scores']['bleu']:.2f}", flush=True)
                return row
            raise SystemExit(f"{result} is of other settings: give another --work, or delete it")
        model = self.model(system, seed)
        print(f"{name}: {model.num_parameters():,} parameters", flush=True)
        report = Reporter(name)
        rows = self.rows["train"], self.rows["val"]
        curve = from_scratch.train(model, self.tokenizer, *rows, "translation", settings, self.args.work / name, report)
        sources, references = map(list, zip(*self.pairs["test2016"], strict=True))
        started = time.perf_counter()
        written = self.translate(model, sources, 5, report)
        seconds = time.perf_counter() - started
        scores = translation.bleu(written, references)
        greedy = self.translate(model, sources, 1, report)
        saved = self.args.work / f"{name}-model"
        model.save_pretrained(saved)
        self.tokenizer.save_pretrained(saved)
        row = {
            **key,
            "seed": seed,
            "parameters": model.num_parameters(),
            "bytes": sum(file.stat().st_size for file in saved.glob("*.safetensors")),
            "narrow": dataclasses.asdict(size_of(model)) if system == "narrow" else None,
            "scores": scores,
            "greedy_bleu": translation.bleu(greedy, references)["bleu"],
            "validation_loss": curve[-1]["validation_loss"],
            "train_seconds": curve[-1]["seconds"],
            "translate_seconds": round(seconds, 1),
            "curve": curve,
            "samples": [
                {"source": s, "reference": r, "greedy": g, "beam": b}
                for s, r, g, b in list(zip(sources, references, greedy, written, strict=True))[:5]
            ],
            "machine": {**machine(), "sacrebleu": sacrebleu.__version__},
        }
        write(result, row)
        for sample in row["samples"]:
            print("\n".join(f"  {kind:<9} {text}" for kind, text in sample.items()), flush=True)
        print(
            f"{name}: BLEU {scores['bleu']:.2f}, chrF {scores['chrf']:.2f}, validation {row['validation_loss']:.3f}, "
            f"{row['parameters']:,} parameters, trained in {row['train_seconds']:.0f} s",
            flush=True,
        )
        return row

    def translate(self, model: PreTrainedModel, texts: list[str], beams: int, report: Reporter) -> list[str]:
        with self.autocast(model):
            return translation.translate(
                model,
                self.tokenizer,
                texts,
                beams,
                self.size.positions,
                self.args.decode_batch,
                report,
                f"beam {beams}",
            )

    def autocast(self, model: PreTrainedModel, precision: str | None = None) -> torch.autocast:
        enabled = (precision or self.args.precision) == "bf16"
        return torch.autocast(model.device.type, torch.bfloat16, enabled=enabled)


def size_of(model: PreTrainedModel) -> Size:
    """The size that a dense model was built with."""
    config: Any = model.config
    return Size(
        config.d_model,
        config.encoder_ffn_dim,
        config.encoder_layers,
        config.encoder_attention_heads,
        config.vocab_size,
        config.max_position_embeddings,
        config.dropout,
    )


class Reporter:
    """Prints progress every few seconds: steps done, seconds a step, time left."""

    def __init__(self, name: str, every: float = 15.0) -> None:
        self.name, self.every = name, every
        self.phase, self.first, self.last = "", (0.0, 0), 0.0

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        now = time.perf_counter()
        if phase != self.phase:
            self.phase, self.first, self.last = phase, (now, done), now
        elif now - self.last >= self.every or done == total:
            pace = (now - self.first[0]) / max(done - self.first[1], 1)
            left = f", {pace * (total - done) / 60:.1f} min left" if total else ""
            print(f"  {self.name} {phase} {done}/{total}: {pace:.3f} s each{left}", flush=True)
            self.last = now


def timing(bench: Bench, systems: list[str], rounds: int) -> dict[str, Any]:
    """Seconds of a training step and of translating, in fp32 and bf16, all systems interleaved in every round.

    A training step is forward, backward, clipping and the optimizer on one batch of typical length; translating is beam
    search with 5 beams over texts from the test set, for exactly as many tokens as the references have at most, so that
    untrained models do the work of trained ones.
    """
    device = "cuda" if torch.cuda.is_available() and bench.args.device != "cpu" else "cpu"
    models = {system: bench.model(system, 0).to(device) for system in systems}  # pyright: ignore[reportArgumentType]
    lengths, train_rows = bench.rows["train"]["length"], bench.rows["train"].remove_columns("length")
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batch = [train_rows[i] for i in order[len(order) // 2 :][: bench.args.batch]]
    steps = {system: training_step(model, bench.tokenizer, batch) for system, model in models.items()}
    texts = sorted((source for source, _ in bench.pairs["test2016"]), key=len)
    texts = texts[len(texts) // 2 :][: bench.args.decode_batch]
    encoded = bench.tokenizer(texts, return_tensors="pt", padding=True).to(device)
    length = max(len(ids) for ids in bench.tokenizer([target for _, target in bench.pairs["test2016"][:200]]).input_ids)

    def search(model: Any) -> None:
        with torch.inference_mode():
            model.eval().generate(**encoded, num_beams=5, min_new_tokens=length, max_new_tokens=length)

    seconds: dict[str, dict[str, list[float]]] = {}
    for turn in range(rounds + 1):  # the first one warms up
        for precision in ("fp32", "bf16"):
            for system, model in models.items():
                for kind, work in (("train", lambda s=system: steps[s]()), ("beam 5", lambda m=model: search(m))):
                    with bench.autocast(model, precision):
                        taken = clock(work, device)
                    if turn:
                        seconds.setdefault(f"{kind} {precision}", {}).setdefault(system, []).append(taken)
        print(f"  timing: round {turn} of {rounds}", flush=True)
    medians = {kind: {s: statistics.median(t) for s, t in by.items()} for kind, by in seconds.items()}
    if "dense" in models:
        print(timing_table(medians))
    return {
        "medians": medians,
        "of_dense": {k: {s: t / by["dense"] for s, t in by.items()} for k, by in medians.items() if "dense" in by},
        "seconds": seconds,
        "batch": len(batch),
        "tokens": {side: [max(len(r[side]) for r in batch)] for side in ("input_ids", "labels")},
        "beam": {"texts": len(texts), "new_tokens": length},
        "size": dataclasses.asdict(bench.size),
        "parameters": {system: model.num_parameters() for system, model in models.items()},
        "device": device,
        "machine": machine(),
    }


def training_step(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> Callable[[], None]:
    """A step of training on one batch, as a function to be timed."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    inputs = DataCollatorForSeq2Seq(tokenizer, model)(rows).to(model.device)  # pyright: ignore[reportAttributeAccessIssue]
    labels = inputs.pop("labels")

    def step() -> None:
        model.train()
        logits = model(**inputs).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, label_smoothing=0.1)
        with torch.autocast(model.device.type, enabled=False):
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def clock(work: Callable[[], None], device: str) -> float:
    """Seconds that something takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def timing_table(medians: dict[str, dict[str, float]]) -> str:
    systems = list(next(iter(medians.values())))
    lines = ["| seconds (of dense) | " + " | ".join(systems) + " |", "|---" * (len(systems) + 1) + "|"]
    for kind, by in medians.items():
        lines.append(f"| {kind} | " + " | ".join(f"{by[s]:.3f} ({by[s] / by['dense']:.2f})" for s in systems) + " |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """Results as Markdown, one line for each run."""
    lines = [
        "| system | seed | parameters | fewer | MB | BLEU | chrF | validation loss | training |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    dense = next((row["parameters"] for row in rows if row["system"] == "dense"), None)
    for row in rows:
        fewer = f"{dense / row['parameters']:.2f}x" if dense else ""
        lines.append(
            f"| {row['system']} | {row['seed']} | {row['parameters']:,} | {fewer} | {row['bytes'] / 1e6:.1f} | "
            f"{row['scores']['bleu']:.2f} | {row['scores']['chrf']:.2f} | {row['validation_loss']:.3f} | "
            f"{row['train_seconds'] / 60:.1f} min |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Validation loss against steps, one line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5))
    colours = dict(zip(LABELS, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    labelled = set()
    for row in rows:
        system = row["system"]
        points = [(point["step"], point["validation_loss"]) for point in row["curve"] if "validation_loss" in point]
        label = f"{LABELS[system]}, {row['parameters'] / 1e6:.2f} M, BLEU {row['scores']['bleu']:.1f}"
        axis.plot(
            *zip(*points, strict=True),
            color=colours[system],
            marker=".",
            label=label if system not in labelled else None,
        )
        labelled.add(system)
    axis.set(xlabel="step", ylabel="validation loss (nats a token)", title="German to English, from scratch")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def merge(work: Path, output: Path) -> list[dict[str, Any]]:
    """Collect the finished runs of a work folder, and its timing, in one file; the runs in the order of the systems."""
    files: Iterator[Path] = (file for file in sorted(work.glob("*.json")) if file.name.partition("-")[0] in LABELS)
    rows = [json.loads(file.read_text()) for file in files]
    rows.sort(key=lambda row: (list(LABELS).index(row["system"]), row["seed"]))
    timed = work / "timing.json"
    content = {"runs": rows, "timing": json.loads(timed.read_text()) if timed.exists() else None}
    if rows or timed.exists():
        write(output, content)
    return rows


def rate(text: str) -> tuple[str, float]:
    system, _, value = text.partition("=")
    if system not in RATES:
        raise argparse.ArgumentTypeError(f"'{text}': give SYSTEM=RATE with one of {', '.join(RATES)}")
    return system, float(value)


def main() -> None:
    parser = options(__doc__, "translation.json")
    parser.add_argument("--data", type=Path, default=default_data() / "multi30k")
    parser.add_argument(
        "--pairs", type=int, default=None, help="use only so many pairs of each part, to try things out"
    )
    parser.add_argument("--systems", nargs="+", default=list(LABELS), choices=LABELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--ratio", type=float, default=10.0, help="parameters of dense over those of the others")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2, help="of the encoder, and of the decoder")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--positions", type=int, default=64, help="tokens of the longest text")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--epochs", type=float, default=12.0)
    parser.add_argument("--steps", type=int, default=3000, help="instead of epochs; 0 for epochs")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rates", nargs="+", type=rate, default=[], metavar="SYSTEM=RATE", help=f"default: {RATES}")
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--warmup", type=float, default=0.1, help="fraction of the steps")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--points", type=int, default=12, help="of the learning curve; each writes a checkpoint")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto", help="'auto' takes a GPU if there is one")
    parser.add_argument("--decode-batch", type=int, default=64, help="texts translated together")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--timing", action="store_true", help="measure speed instead of training")
    parser.add_argument("--rounds", type=int, default=7, help="of the timing")
    parser.add_argument("--plot", action="store_true", help="draw the finished runs and train nothing")
    parser.add_argument("--work", type=Path, default=Path("runs/translation"), help="checkpoints and single results")
    parser.add_argument("--image", type=Path, default=RESULTS.parent.parent / "docs" / "images" / "translation.svg")
    args = start(parser)
    args.rates = RATES | dict(args.rates)
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.timing:
        result = timing(Bench(args), args.systems, args.rounds)
        write(args.work / "timing.json", result)
    elif not args.plot:
        bench = Bench(args)
        for seed in args.seeds:
            for system in args.systems:
                bench.run(system, seed)
                merge(args.work, args.output)
    rows = merge(args.work, args.output)
    if rows:
        print(table(rows))
        plot(rows, args.image)


if __name__ == "__main__":
    main()
