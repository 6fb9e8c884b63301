"""What post-training compression leaves of a sentence encoder: nothing is trained.

    python benchmarks/embeddings.py --data ../shared/data

MiniLM's blocks are compressed at several ratios, plain and with more or fewer calibration texts from banking77's
training questions; 500 other training questions are embedded by the original and the compressed model. The table shows
the mean cosine between the two embeddings, and the rank correlation of the similarities between questions.
"""

from __future__ import annotations

import time
from pathlib import Path

import datasets
from common import default_data, machine, options, start, write
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import factorformer
from factorformer import recipes
from factorformer.hf import minilm
from factorformer.tasks import data
from factorformer.tasks.evaluation import compare_embeddings, embed

QUESTIONS = 500


def needs_text(method: str) -> bool:
    return recipes.get(method).needs != "nothing"


def main() -> None:
    parser = options(__doc__, "embeddings.json")
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with one folder for each task")
    parser.add_argument("--ratios", nargs="+", type=float, default=[1.5, 2.0, 2.8])
    parser.add_argument("--texts", nargs="+", type=int, default=[30, 200, 1500], help="calibration texts")
    methods = ["svd", "whitened", "kronecker", "kronecker_whitened", "dense_sparse_plain", "cospadi"]
    parser.add_argument("--methods", nargs="+", default=methods, help="methods of factorformer")
    parser.add_argument("--seed", type=int, default=0)
    args = start(parser)
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    directory = minilm.directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = data.read(args.data / "banking77" / "train.tsv").shuffle(seed=args.seed)
    texts = data.encode(tokenizer, rows, data.Columns(("text",)))
    questions = texts.select(range(QUESTIONS))
    original = embed(AutoModel.from_pretrained(directory), tokenizer, questions)
    cells = []
    fits = [(method, count) for method in args.methods for count in (args.texts if needs_text(method) else [0])]
    for ratio in args.ratios:
        for method, count in fits:
            model = AutoModel.from_pretrained(directory)
            chosen = texts.select(range(QUESTIONS, QUESTIONS + count))
            batches = list(data.batches(tokenizer, chosen)) if count else None
            started = time.perf_counter()
            plan = factorformer.plan(model, method, ratio, calibration=batches)
            planned = time.perf_counter() - started
            report = factorformer.compress(model, plan, batches)
            found = compare_embeddings(original, embed(model, tokenizer, questions))
            seconds = {"plan_seconds": planned} | {f"{name}_seconds": value for name, value in report.seconds.items()}
            cells.append({"ratio": ratio, "method": method, "calibration_texts": count, **found, **seconds})
            shown = "  ".join(f"{name} {value:.3f}" for name, value in (found | seconds).items())
            print(f"{ratio:>5}x {method:<18} {count:>5} texts  {shown}", flush=True)
    write(args.output, {"seed": args.seed, "cells": cells, "machine": machine()})


if __name__ == "__main__":
    main()
