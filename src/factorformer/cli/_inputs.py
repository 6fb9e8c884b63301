"""Inputs that `compress`, `finetune` and `evaluate` share: teachers, plans, output."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from factorformer import processes
from factorformer.cli._options import note
from factorformer.errors import ExportError, FactorformerError, ModelError, OutputError
from factorformer.export.sentence import Layout, read_layout
from factorformer.files import BEFORE, RESULT_FILE, output_directory, whole_file
from factorformer.hf import card
from factorformer.hf.attachment import described
from factorformer.hf.description import has_factors
from factorformer.hf.source import (
    copy_companions,
    find,
    load_model,
    load_tokenizer,
    place_of_weights,
    read_config,
    vocabulary_files,
)
from factorformer.layers.surgery import find_matrices
from factorformer.planning import TOLERANCE, Entry, Plan
from factorformer.report import Result
from factorformer.tasks.classification import Head, head_labels, is_causal
from factorformer.tasks.finetuning import check_can_follow
from factorformer.tasks.targets import Predictions, Target
from factorformer.training.rank_history import RankHistory


def find_pooling(path: Path) -> Layout:
    """What users of a model directory make of its hidden states.

    Raises:
        ModelError: that is something that is not known here: to learn or to judge by anything else would mislead.
    """
    try:
        return read_layout(path, alone=False)
    except ExportError as error:
        raise ModelError(f"what embeddings '{path}' makes of hidden states is not known: {error}") from error


def check_dense(path: Path, config: PretrainedConfig) -> None:
    """Raise `ModelError` if its configuration says that a model is compressed already."""
    if described(config) is not None:
        raise ModelError(f"'{path}' is compressed already: start from the dense model")


PREDICTED = {
    "loss": "predicted_loss_rise",
    "1 - cosine": "predicted_cosine_loss",
    "error of the weights": "predicted_weight_error",
}
"""The metric that a plan predicts, by its objective."""


def predictions(plan: Plan) -> dict[str, float]:
    """Predicted values of a plan, as metrics: the loss that compression costs, before any training."""
    found = {} if plan.predicted is None else {PREDICTED[plan.objective or ""]: plan.predicted}
    if plan.milliseconds is not None:
        found |= dict(zip((f"{BEFORE}latency_products", "latency_products"), plan.milliseconds, strict=True))
    return found


def off_target(plan: Plan) -> str | None:
    """A line about a ratio that is not the one that was asked for; None if it is, within the tolerance of plans."""
    if plan.budget != "bytes" or abs(plan.ratio / plan.target - 1) <= TOLERANCE:
        return None
    asked = f"the ratio is {plan.ratio:.4g} in place of {plan.target:g}"
    if any(entry.spec is None and entry.matrix.bits is not None for entry in plan.entries):
        return f"{asked}: matrices are in integers or in floats as a whole, and no other choice comes nearer from above"
    return f"{asked}: with all matrices in integers the model takes no more than that"


def check_teacher(
    name: str, student: PretrainedConfig, head: Head | None, target: Target | None = None, own: Path | None = None
) -> None:
    """Compare a teacher with the model that is to follow it, by their configurations.

    Args:
        name: of the teacher.
        student: of the model.
        head: for the labels of the task; None for plain text.
        target: what is learned without labels; None for all hidden states.
        own: the directory of the model, whose tokenizer is compared; None to compare none.

    Raises:
        ModelError: the two do not fit together, or are encoder-decoders; the message says where.
    """
    place = find(name)
    teacher = read_config(place)
    check_can_follow(student, labelled=head is not None)
    for field in ("vocab_size", "hidden_size", "num_hidden_layers") if target is None else target.fields:
        theirs, ours = getattr(teacher, field, None), getattr(student, field, None)
        if theirs != ours:
            raise ModelError(f"the teacher '{name}' does not fit the model: its {field} is {theirs}, not {ours}")
    if own is not None and place != own and _vocabulary(place) not in (None, _vocabulary(own)):
        raise ModelError(f"the teacher '{name}' knows other tokens than the model, and could not read what that reads")
    if head is None and not isinstance(target, Predictions):
        return
    known = head_labels(teacher)
    if known is None:
        raise ModelError(f"the teacher '{name}' has no sequence-classification head: fine-tune it first")
    ours = head_labels(student) if head is None or head.trained else head.labels
    if known != ours:
        raise ModelError(f"the teacher '{name}' predicts other labels: {known}, not {ours}")


def _vocabulary(path: Path) -> dict[str, int] | None:
    """Tokens of the tokenizer in a directory; None if there is none."""
    try:
        return load_tokenizer(path).get_vocab()
    except ModelError:
        return None


def check_speaks_alike(name: str, config: PretrainedConfig, own: Path) -> None:
    """Raise `ModelError` if a model does not predict the tokens that a causal language model does.

    Args:
        name: of the other model.
        config: of the language model.
        own: its directory.
    """
    path = find(name)
    theirs = read_config(path)
    if not is_causal(theirs):
        raise ModelError(f"'{name}' is no causal language model, and predicts no next tokens")
    ours, known = (c.get_text_config().vocab_size for c in (config, theirs))
    if ours != known:
        raise ModelError(f"'{name}' has {known:,} tokens, and the model {ours:,}: they predict others")
    if load_tokenizer(path).get_vocab() != load_tokenizer(own).get_vocab():
        raise ModelError(f"'{name}' has other tokens than the model: their predictions cannot be compared")


def load_teacher(name: str | None, student: PreTrainedModel) -> PreTrainedModel | None:
    """The model that a student learns from, in the student's precision; None if there is none."""
    return None if name is None else load_model(find(name), student.dtype, str(student.device))


def note_new_head(head: Head) -> None:
    """Print a note that a head for other labels was dropped."""
    if head.replaced is not None:
        note(
            f"new head: the model's labels ({head.replaced}) differ from the data's ({head.labels}), "
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
            same = dataclasses.replace(
                matrix, shape=entry.matrix.shape, dense=entry.matrix.dense, bits=entry.matrix.bits
            )
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
    if not processes.is_first():
        return
    with output_directory(result.output, overwrite=overwrite, inputs=(companions,)) as partial:
        weights = partial if companions is None else partial / place_of_weights(companions)
        write(result, model, partial, tokenizer=tokenizer, weights=weights)
        if companions is not None:
            copy_companions(companions, partial, set() if tokenizer is None else vocabulary_files(tokenizer))
        if has_factors(model):
            card.write(model, partial, result.to_dict(), companions)
        if history is not None:
            history.save(partial)


def write(
    result: Result,
    model: PreTrainedModel,
    directory: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    weights: Path | None = None,
) -> None:
    """Write model, result and, if given, tokenizer into a directory; the model's own files into a folder of it."""
    model.save_pretrained(directory if weights is None else weights)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory if weights is None else weights)
    description = directory / RESULT_FILE
    description.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    if has_factors(model) and weights is not None and weights != directory:
        (weights / card.FILE).unlink(missing_ok=True)
    for file in directory.rglob("*.safetensors"):  # which safetensors makes private
        file.chmod(description.stat().st_mode)


@contextlib.contextmanager
def saved(output: str, what: str, lacks: str = "was not measured") -> Iterator[None]:
    """Say of whatever stops the measuring of a model that the model itself is saved.

    Args:
        output: its directory, complete but for metrics in `factorformer.json`.
        what: the model is.
        lacks: what it is without.
    """
    fate = f"the {what} model is complete in '{output}', but {lacks}"
    try:
        yield
    except FactorformerError as error:
        raise type(error)(f"{error}; {fate}") from error
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{error}; {fate}") from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(fate) from error
    except BaseException:
        note(fate)
        raise


def update(result: Result, model: PreTrainedModel, companions: Path | None = None) -> None:
    """Write a result over the one that lies in its output directory, and into the card of the model there."""
    assert result.output is not None
    if has_factors(model):
        card.write(model, Path(result.output), result.to_dict(), companions)
    with whole_file(Path(result.output) / RESULT_FILE, "the result") as partial:
        partial.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
