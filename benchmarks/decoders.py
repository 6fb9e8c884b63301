"""Language models in fewer bytes: what factors cost in perplexity, seconds and memory, and what training brings back.

    python benchmarks/decoders.py SMOLLM2 --work FOLDER
    python benchmarks/decoders.py SMOLLM2 --work FOLDER --methods fisher --keep 0.8 --heal 2000000
    python benchmarks/decoders.py SMOLLM2 --work FOLDER --methods torchao-int4 fisher:int4 --keep 0.14 0.1
    python benchmarks/decoders.py gpt2 opt qwen3 --work FOLDER --methods fisher --keep 0.8

A model is a directory; `gpt2`, `opt` and `qwen3` are models of random weights in the sizes of GPT-2, OPT-125M and
Qwen3-0.6B, of which nothing but time and memory is measured, on random tokens. `--keep` is the part of the bytes of the
Transformer blocks that is left, and `:int4` behind a method stores these in 4 bits. Calibration is on windows of
WikiText-2's training text, and so is healing (`--heal`, in tokens), which learns next tokens from the original.
`torchao-int4` is the peer that only quantizes: 4 bits, symmetric, a scale for each 32 weights, counted as if packed
without a gap, with scales of 16 bits.

Perplexities are those of the first 40 windows of 512 tokens, without overlap, of WikiText-2's test text, and of English
captions of multi30k, a text of another kind. Each cell is a row, and a process of its own, whose highest resident set
is told, Python and torch included; a run skips those that are there already.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import resource
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from common import append_line, default_data, machine, options, read_lines, start
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import factorformer
from factorformer import recipes
from factorformer.files import output_directory
from factorformer.layers.dense import dense_weight
from factorformer.layers.modes import has_bfloat16_products
from factorformer.layers.surgery import find_matrices
from factorformer.report import inventory
from factorformer.tasks.healing import HealingSettings, heal
from factorformer.tasks.language_modelling import predict
from factorformer.tasks.targets import NextTokens
from factorformer.tasks.windows import windows

WINDOW, TOGETHER = 512, 4
"""Tokens of a window, and windows in a step of training, or in a forward pass."""

METHODS = ["svd", "fwsvd", "whitened", "fisher", "auto", "dense_sparse"]
ORIGINAL, PEER = "original", "torchao-int4"
GROUP = 32
"""Weights that share a scale in torchao's int4."""

RANDOM: dict[str, transformers.PretrainedConfig] = {
    "gpt2": transformers.GPT2Config(),
    "opt": transformers.OPTConfig(),
    "qwen3": transformers.Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row; all of it but the places of files.

    Args:
        model: the name of the directory, or of a random model.
        method: of `compress`, with `:int4` behind it; or a peer.
        keep: part of the block bytes; None where the method decides.
        healed: tokens that were learned on.
        calibrated, judged: windows.
    """

    model: str
    method: str
    keep: float | None
    healed: int
    calibrated: int
    judged: int

    def key(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def place(self, work: Path) -> Path:
        """Where the model is kept that is healed later."""
        return work / f"{self.model}-{self.method.replace(':', '-')}-{self.keep}-{self.calibrated}"


@dataclasses.dataclass(frozen=True)
class Files:
    """Where a cell reads and keeps."""

    model: str
    data: Path
    work: Path


def load(path: str) -> PreTrainedModel:
    if path in RANDOM:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(RANDOM[path]).eval()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def tokens(files: Files, file: str, count: int | None = None, seed: int | None = None) -> Any:
    """Windows of a text: the first ones, or drawn at random."""
    text = (files.data / file).read_text(encoding="utf-8")
    rows = windows(AutoTokenizer.from_pretrained(files.model), [text], WINDOW)
    whole = rows.select(range(len(rows) - (rows[-1]["length"] < WINDOW)))
    whole = whole if seed is None else whole.shuffle(seed=seed)
    return whole if count is None else whole.select(range(min(count, len(whole))))


def calibration(cell: Cell, files: Files, model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Batches of two windows; with the next tokens as labels where a method needs them."""
    if files.model in RANDOM:
        torch.manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (cell.calibrated, WINDOW))
    else:
        ids = torch.tensor(tokens(files, "wikitext2/train.txt", cell.calibrated, seed=0)["input_ids"])
    labelled = recipes.get(cell.method.partition(":")[0]).needs == "labelled text"
    return [{"input_ids": pair, **({"labels": pair} if labelled else {})} for pair in ids.split(2)]


def judge(cell: Cell, files: Files, model: PreTrainedModel) -> dict[str, Any]:
    """Perplexity on both texts, and how many tokens were predicted."""
    if files.model in RANDOM:
        return {}
    tokenizer, found = AutoTokenizer.from_pretrained(files.model), {}
    began = time.perf_counter()
    for name, file in (("wikitext2", "wikitext2/test.txt"), ("multi30k", "multi30k/train.en")):
        metrics = predict(model, tokenizer, tokens(files, file, cell.judged), "causal", TOGETHER)
        found[name] = {key: round(metrics[key], 4) for key in ("perplexity", "bits_per_byte", "tokens")}
    return {"text": found, "seconds": {"evaluate": round(time.perf_counter() - began, 1)}}


def compressed(cell: Cell, files: Files) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model as the method leaves it, kept for healing, and what it took."""
    model = load(files.model)
    name, _, values = cell.method.partition(":")
    batches = calibration(cell, files, model)
    began = time.perf_counter()
    given = None if recipes.get(name).needs == "nothing" else batches
    assert cell.keep is not None
    plan = factorformer.plan(model, name, 1 / cell.keep, calibration=given, int4=values == "int4", keep_statistics=True)
    planned = time.perf_counter()
    report = factorformer.compress(model, plan, given)
    seconds = {"plan": round(planned - began, 1), "compress": round(time.perf_counter() - planned, 1)}
    if files.model not in RANDOM:
        with output_directory(cell.place(files.work), overwrite=True) as output:
            model.save_pretrained(output)
    found = {
        "reached": round(1 / report.plan.ratio, 4),
        "predicted": None if plan.predicted is None else round(plan.predicted, 4),
        "matrices": len(plan.entries),
    }
    return model, {**found, "seconds": seconds}


def quantized(cell: Cell, files: Files) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The peer's model, and the part of the block bytes that it takes."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = load(files.model)
    names = {matrix.name for matrix in find_matrices(model, "blocks")[0]}
    values = sum(dense_weight(model.get_submodule(name)).numel() for name in names)
    whole, began = inventory(model, "blocks").original.bytes, time.perf_counter()
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))  # pyright: ignore
    quantize_(model, config, filter_fn=lambda module, name: name in names)
    left = whole - values * 4 + values / 2 + values / GROUP * 2
    return model, {"reached": round(left / whole, 4), "seconds": {"compress": round(time.perf_counter() - began, 1)}}


def healed(cell: Cell, files: Files) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model that an earlier cell left, after so many tokens of the training text."""
    place = cell.place(files.work)
    if not place.exists():
        raise SystemExit(f"{place} is missing: run the same cells without --heal first, with the same --work")
    model, tokenizer = load(str(place)), AutoTokenizer.from_pretrained(files.model)
    factorformer.hold_floats(model)
    data = tokens(files, "wikitext2/train.txt", seed=1)
    epochs = cell.healed / (len(data) * WINDOW)
    settings = HealingSettings(
        epochs=epochs,
        batch_size=TOGETHER,
        precision="bf16" if has_bfloat16_products() else "fp32",
        points=4,
    )
    training, said = files.work / f"{place.name}-{cell.healed}.training", []
    curve = heal(
        model,
        load(files.model),
        data,
        settings,
        tokenizer=tokenizer,
        held=tokens(files, "wikitext2/valid.txt", 16),
        target=NextTokens(),
        output=training,
        report=lambda line: said.append(line) or print(line, flush=True),  # pyright: ignore
    )
    factorformer.quantize(model)
    shutil.rmtree(training)  # or else a later run would take this one's end for its own
    return model, {"seconds": {"heal": round(curve[-1]["seconds"], 1)}, "curve": curve, "said": said}


def measured(cell: Cell, files: Files) -> dict[str, Any]:
    """A row, in a process of its own."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    if cell.method == ORIGINAL:
        model, row = load(files.model), {}
    elif cell.method == PEER:
        model, row = quantized(cell, files)
    else:
        model, row = healed(cell, files) if cell.healed else compressed(cell, files)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = judge(cell, files, model)
    seconds = row.get("seconds", {}) | found.get("seconds", {})
    return {**cell.key(), **row, **found, "seconds": seconds, "peak_bytes": peak}


def cells(args: Any) -> list[tuple[Cell, Files]]:
    """All that was asked for, one ratio after another."""
    wanted = []
    for path in args.models:
        files = Files(path, args.data, args.work)
        rest = (args.texts, args.judged)
        name = Path(path).name
        found = [] if path in RANDOM else [Cell(name, ORIGINAL, None, 0, *rest)]
        for keep in args.keep:
            for method in args.methods:
                alone = Cell(name, method, None if method == PEER else keep, 0, *rest)
                found += [alone] if alone not in found else []
                if args.heal and method != PEER and path not in RANDOM:
                    found.append(dataclasses.replace(alone, healed=args.heal))
        wanted += [(cell, files) for cell in found]
    return wanted


def main() -> None:
    parser = options(__doc__, "decoders.jsonl")
    parser.add_argument("models", nargs="+", help=f"model directories, or {', '.join(RANDOM)}")
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with wikitext2 and multi30k")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and checkpoints")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--keep", nargs="+", type=float, default=[0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--heal", type=int, default=0, help="tokens to learn on; none by default")
    parser.add_argument("--texts", type=int, default=64, help="windows to calibrate on")
    parser.add_argument("--judged", type=int, default=40, help="windows of each text to measure on")
    args = start(parser)
    for cell, files in cells(args):
        if any(row | cell.key() == row for row in read_lines(args.output)):
            continue
        alone = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=alone) as pool:
            row = pool.submit(measured, cell, files).result()
        print(json.dumps(row), flush=True)
        append_line(args.output, {**row, "machine": machine()})


if __name__ == "__main__":
    main()
