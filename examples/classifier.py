"""A classifier in int8 at a fifth of the bytes of its blocks, trained by your own `Trainer`.

    python examples/classifier.py [MODEL] [ROWS_FILE] [STEPS]

Rows have a `text` and a `label`. By default the embedded MiniLM learns which part of Python's standard library a
docstring is from.
"""

import sys
from pathlib import Path

import datasets
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import factorformer
from factorformer.hf import minilm
from factorformer.tasks.data import read
from factorformer.tasks.docstrings import stdlib_docstrings

output = Path("classifier")
if output.exists():
    sys.exit(f"'{output}' exists already: move it")
source = sys.argv[1] if len(sys.argv) > 1 else str(minilm.directory())
table = read(sys.argv[2]) if len(sys.argv) > 2 else stdlib_docstrings()["train"]
steps = int(sys.argv[3]) if len(sys.argv) > 3 else 60

tokenizer = AutoTokenizer.from_pretrained(source)
labels = sorted(set(table["label"]))
names = {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
model = AutoModelForSequenceClassification.from_pretrained(source, **names)


def encode(rows: dict) -> dict:
    """Token ids and numbers of labels."""
    found = tokenizer(rows["text"], truncation=True, max_length=64)
    return {**found, "labels": [labels.index(label) for label in rows["label"]]}


table = datasets.Dataset.from_dict({"text": list(table["text"]), "label": list(table["label"])})
parts = table.map(encode, batched=True, remove_columns=["text", "label"]).train_test_split(0.2, seed=0)
collate = DataCollatorWithPadding(tokenizer)


def trainer(learning_rate: float) -> Trainer:
    """A `Trainer` as for any other model."""
    settings = {"learning_rate": learning_rate, "max_steps": steps, "per_device_train_batch_size": 32, "seed": 0}
    arguments = TrainingArguments("runs", save_strategy="no", report_to="none", logging_steps=20, **settings)
    return Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )


dense = trainer(2e-4)
dense.train()  # the dense model learns the task first: what it has learned is what is compressed
print("dense:", dense.evaluate()["eval_accuracy"])

rows = range(min(len(parts["train"]), 256))
calibration = [collate([parts["train"][row] for row in rows[at : at + 32]]) for at in range(0, len(rows), 32)]
plan = factorformer.plan(model, ratio=5, int8=True, calibration=calibration, keep_statistics=True)
print(plan)  # every matrix: what it becomes, what it costs, what it adds to the loss
factorformer.compress(model, plan, calibration, hold_floats=True)  # integers while it trains, held as floats
print("fitted:", trainer(0.0).evaluate()["eval_accuracy"])
compressed = trainer(2e-4)
compressed.train()
print("trained:", compressed.evaluate()["eval_accuracy"])

factorformer.quantize(model)
model.save_pretrained(output)
tokenizer.save_pretrained(output)
again = AutoModelForSequenceClassification.from_pretrained(output)
assert again.num_labels == len(labels)
