"""What `compress`, `finetune` and `evaluate` prepare alike: tables, teachers, plans, output."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorformer.cli._options import note
from factorformer.errors import DataError, ModelError
from factorformer.files import RESULT_FILE, output_directory
from factorformer.hf.source import copy_companions, find, load_model
from factorformer.layers.surgery import find_matrices
from factorformer.planning import Entry, Plan
from factorformer.report import Result
from factorformer.report.result import BEFORE
from factorformer.tasks.classification import Classifier, head_labels
from factorformer.tasks.data import Columns, encode, read
from factorformer.tasks.finetuning import check_can_follow
from factorformer.training.rank_history import RankHistory

HELD_OUT = 500
"""At most so many rows, and at most a tenth of them, are held out of plain text to compare embeddings on."""


def columns_of(text: list[str] | None, label: str | None) -> Columns:
    """The columns that the options name."""
    return Columns(tuple(text or ["text"]), label)


def read_table(source: str, columns: Columns) -> datasets.Dataset:
    """Rows of a file or of the Hub that have these columns.

    Raises:
        DataError: missing, unreadable or empty, or without one of the columns.
    """
    rows = read(source)
    columns.check(rows, f"'{source}'")
    return rows


def plain_columns(source: str, columns: Columns) -> Columns:
    """The text columns alone; a plain text file has its own."""
    return Columns(("text",) if Path(source).suffix.lower() == ".txt" else columns.text)


def encoded_text(
    source: str, columns: Columns, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> datasets.Dataset:
    """Encoded rows of the text columns alone.

    Raises:
        DataError: missing, unreadable or empty, or without one of the columns.
    """
    plain = plain_columns(source, columns)
    return encode(tokenizer, read_table(source, plain), plain, None, max_length)


def predictions(plan: Plan) -> dict[str, float]:
    """What a plan expects, as metrics."""
    found = {} if plan.predicted is None else {"predicted_error": plan.predicted}
    if plan.milliseconds is not None:
        found |= dict(zip((f"{BEFORE}latency_products", "latency_products"), plan.milliseconds, strict=True))
    return found


def hold_out(data: datasets.Dataset, seed: int, options: str = "--eval") -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split rows at random into those to train on and those to measure on.

    Args:
        data: rows.
        seed: of the choice.
        options: those that make it unnecessary, for the message.

    Raises:
        DataError: too few rows.
    """
    rows = min(len(data) // 10, HELD_OUT)
    if rows < 3:
        raise DataError(f"{len(data)} rows are too few to hold some out and measure on them: give {options}")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    return data.select(order[rows:]), data.select(order[:rows])


def load_teacher(name: str, student: PreTrainedModel, *, labelled: bool) -> PreTrainedModel:
    """A model that a student can follow: same inputs, same hidden states, and with labels the same outputs.

    Raises:
        ModelError: the two do not fit together, or are encoder-decoders; the message says where.
    """
    check_can_follow(student)
    teacher = load_model(find(name), student.dtype)
    for field in ("vocab_size", "hidden_size", "num_hidden_layers"):
        theirs, ours = getattr(teacher.config, field, None), getattr(student.config, field, None)
        if theirs != ours:
            raise ModelError(f"the teacher '{name}' does not fit the model: its {field} is {theirs}, not {ours}")
    if not labelled:
        return teacher
    theirs, ours = head_labels(teacher.config), student.config.id2label
    if theirs is None:
        raise ModelError(f"the teacher '{name}' has no sequence-classification head: fine-tune it first")
    if teacher.config.num_labels != student.config.num_labels or teacher.config.id2label != ours:
        raise ModelError(f"the teacher '{name}' predicts other labels: {teacher.config.id2label}, not {ours}")
    return teacher


def note_new_head(classifier: Classifier) -> None:
    """Tell that a head of the model was for other labels and is gone."""
    if classifier.replaced is not None:
        note(
            f"new head: the model's labels ({classifier.replaced}) differ from the data's ({classifier.labels}), "
            "what its head has learned is lost"
        )


def fit_plan(plan: Plan, model: PreTrainedModel) -> Plan:
    """The same plan for the same model with another head, whose modules have other names.

    Raises:
        ModelError: a matrix of the plan is not in the model.
    """
    matrices, rest = find_matrices(model, plan.scope)
    prefix = f"{model.base_model_prefix}."
    found = {matrix.name.removeprefix(prefix): matrix.name for matrix in matrices}
    planned = {entry.matrix.name.removeprefix(prefix): entry for entry in plan.entries}
    entries: list[Entry] = []
    for matrix in matrices:
        entry = planned.pop(matrix.name.removeprefix(prefix), None)
        if entry is None:
            entries.append(Entry(matrix, None, "not in the plan"))
        else:
            same = dataclasses.replace(matrix, shape=entry.matrix.shape, dense=entry.matrix.dense)
            owner = None if entry.shares is None else found.get(entry.shares.removeprefix(prefix), entry.shares)
            entries.append(dataclasses.replace(entry, matrix=same, shares=owner))
    lost = [name for name, entry in planned.items() if entry.spec is not None]
    if lost:
        raise ModelError(f"the plan does not fit the model: there is no weight matrix '{lost[0]}' in scope")
    return dataclasses.replace(plan, entries=tuple(entries), rest=rest)


def save(
    result: Result,
    model: PreTrainedModel,
    *,
    overwrite: bool,
    tokenizer: PreTrainedTokenizerBase | None = None,
    companions: Path | None = None,
    history: RankHistory | None = None,
) -> None:
    """Write a model directory with everything that belongs to it; it appears complete or not at all.

    Args:
        result: goes along as `factorformer.json`; its `output` is the directory.
        model: dense or compressed.
        overwrite: replace a directory that is there.
        tokenizer: saved beside the model, if given.
        companions: the directory whose small files are copied, if given.
        history: how ranks moved in training, written beside the model, if given.
    """
    assert result.output is not None
    with output_directory(result.output, overwrite=overwrite, inputs=(companions,)) as partial:
        write(result, model, partial, tokenizer=tokenizer)
        if companions is not None:
            copy_companions(companions, partial)
        if history is not None:
            history.save(partial)


def write(
    result: Result, model: PreTrainedModel, directory: Path, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write model, result and, if given, tokenizer into a directory."""
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    description = directory / RESULT_FILE
    description.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    for weights in directory.glob("*.safetensors"):  # which safetensors makes private
        weights.chmod(description.stat().st_mode)
