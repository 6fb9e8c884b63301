"""A sentence encoder in a tenth of its size, in Python: compress, heal on plain text, save, compare.

    python examples/encoder.py [MODEL] [TEXT_FILE] [MINUTES]

By default the embedded MiniLM and, as text, the docstrings of Python's standard library, for two minutes of training. A
file of your own sentences, ten minutes or more, and calibration on 2,048 texts, as the command line does, are
what it takes to keep what the encoder is used for.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

import factorformer
from factorformer.export.sentence import find_layout
from factorformer.hf import minilm
from factorformer.hf.source import copy_companions
from factorformer.layers.modes import has_bfloat16_products
from factorformer.tasks.data import Columns, batches, count_tokens, encode, hold_out, read, sample, unlike
from factorformer.tasks.docstrings import stdlib_docstrings
from factorformer.tasks.targets import Embeddings

CALIBRATED = 256

output = Path("encoder")
if output.exists():
    sys.exit(f"'{output}' exists already: move it")
layout = find_layout(sys.argv[1] if len(sys.argv) > 1 else str(minilm.directory()))
if len(sys.argv) > 2:
    texts = read(sys.argv[2], Columns(("text",)))
else:
    texts = stdlib_docstrings()["train"].select_columns("text")
tokenizer = AutoTokenizer.from_pretrained(layout.transformer)
original, model = (AutoModel.from_pretrained(layout.transformer, dtype=torch.float32).eval() for _ in range(2))
data = encode(tokenizer, texts, Columns(("text",)))
data, held = hold_out(data, seed=0)  # to compare on, and neither to fit nor to learn
data = data.select(unlike(data, held))

options = {"calibration": list(batches(tokenizer, sample(data, CALIBRATED))), "token_counts": None}
options["token_counts"] = count_tokens([data], model.get_input_embeddings().num_embeddings)
target = Embeddings(layout.pooler)  # as the model's directory says: the mean over tokens, the first one, ...
with target.shown(model):
    plan = factorformer.plan(model, ratio=10, scope="all", int4=True, keep_statistics=True, **options)
    print(plan)  # every matrix: what it becomes, what it costs
    print(*factorformer.compress(model, plan, hold_floats=True, **options).notes, sep="\n")

minutes = float(sys.argv[3]) if len(sys.argv) > 3 else 2.0
settings = factorformer.HealingSettings(minutes=minutes, precision="bf16" if has_bfloat16_products() else "fp32")
curve = factorformer.heal(model, original, data, settings, tokenizer=tokenizer, held=held, target=target, report=print)
factorformer.quantize(model)
model.save_pretrained(output / layout.transformer.relative_to(layout.source))
copy_companions(layout.source, output)  # the tokenizer, and what sentence-transformers needs
print({name: round(value, 3) for name, value in curve[-1].items()})
