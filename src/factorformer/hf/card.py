"""The README.md of a compressed model: what it is, what was measured, and how to load it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from factorformer.files import (
    BEFORE,
    FITTED,
    INTERVAL,
    NO_QUALITY,
    ORIGINAL_CARD,
    RESULT_FILE,
    whole_file,
)
from factorformer.hf import layout
from factorformer.hf.description import factorized
from factorformer.structures import Dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "README.md"

ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")
CACHED = re.compile(r"models--([\w.-]+?)(?:--([\w.-]+))?/snapshots/")
SNAPSHOT = re.compile(r"/snapshots/[0-9a-f]+")

GENERATED = "has been automatically generated"
"""What transformers says in a card that it makes up."""

TAGS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
    "ForCTC": "automatic-speech-recognition",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}
"""What the Hub calls tasks, by the ends of the names of classes."""

MODELS = {BEFORE: "original", FITTED: "before training", "": "compressed"}
"""Prefixes of metrics, and the models that they are of."""


def write(
    model: PreTrainedModel, directory: Path, record: Mapping[str, Any] | None = None, origin: Path | None = None
) -> None:
    """Write the card of a model that was saved into a directory, unless there is one already.

    The card of the original is kept beside it.

    Args:
        model: compressed.
        directory: of the model.
        record: what is known of how it was made, as in `factorformer.json`; a card is written again then.
        origin: the directory of the original, where that is not where the model was loaded from.
    """
    file = directory / FILE
    if file.exists() and record is None:
        return
    origin = origin or Path(str(getattr(model.config, "name_or_path", "") or ""))
    with contextlib.suppress(OSError):  # this is about a comment, and the model may have taken hours
        for name in (ORIGINAL_CARD, FILE):  # that of a compressed model is not the original's
            if (origin / name).is_file() and origin.resolve() != directory.resolve():
                shutil.copyfile(origin / name, directory / ORIGINAL_CARD)
                break
    with whole_file(file, "the model card") as partial:
        partial.write_text(text(model, directory, record, origin), encoding="utf-8")


def bring(model: PreTrainedModel, directory: Path) -> None:
    """Put a card where transformers made one, in a directory that is about to go to the Hub.

    Of a model that was loaded from a directory of this package it is the one there, with what it refers to.
    """
    file = directory / FILE
    if file.exists() and GENERATED not in file.read_text(encoding="utf-8"):
        return
    file.unlink(missing_ok=True)
    origin = Path(str(getattr(model.config, "name_or_path", "") or ""))
    if (origin / RESULT_FILE).is_file() and (origin / FILE).is_file():
        for name in (FILE, ORIGINAL_CARD, RESULT_FILE):
            if (origin / name).is_file():
                shutil.copyfile(origin / name, directory / name)
        return
    write(model, directory)


def text(
    model: PreTrainedModel, directory: Path, record: Mapping[str, Any] | None = None, origin: Path | None = None
) -> str:
    """The card: metadata that the Hub reads, what was done and measured, and the lines that load the model.

    Args:
        model: compressed.
        directory: of the model.
        record: what is known of how it was made.
        origin: the directory of the original; None for where the model was loaded from.
    """
    record, loaded = record or {}, str(getattr(model.config, "name_or_path", "") or "")
    source = origin or Path(loaded)
    there = (origin is not None or bool(loaded)) and source.is_dir()
    of_source = _metadata(source / FILE) if there else {}
    named = _name_on_the_hub(loaded, there=there) or of_source.get("model_id")
    base = named or of_source.get("base_model")
    kind = type(model).__name__
    loader = kind if hasattr(transformers, kind) else "AutoModel"
    name = named or (source.name if there and not SNAPSHOT.search(str(source)) else None)
    sentences = (directory / layout.MODULES).exists()
    known: dict[str, Any] = {
        "library_name": "sentence-transformers" if sentences else "transformers",
        "tags": ["factorformer", *(["sentence-similarity"] if sentences else [])],
    }
    known |= {"base_model": base} if base else {}
    known |= {"base_model_relation": "quantized"} if named else {}
    known |= {key: of_source[key] for key in ("license", "license_name", "license_link") if of_source.get(key)}
    tag = of_source.get("pipeline_tag") or ("sentence-similarity" if sentences else _tag(kind))
    known |= {"pipeline_tag": tag} if tag else {}
    measured = _measured(record.get("metrics") or {})
    known |= {"metrics": list(measured)} if measured else {}
    parts = [
        f"---\n{_yaml(known)}---",
        f"# {f'{name}, compressed' if name else 'A compressed model'}",
        _done(model, record),
        *_table(measured, record),
        f"""## Load it

```python
import factorformer  # before the model is loaded: its weights fit no other layers
import transformers

model = transformers.{loader}.from_pretrained("PATH OR NAME OF THIS MODEL")
```

So do `AutoModel`, `pipeline` and, where the directory is one of sentence-transformers, `SentenceTransformer`. Without
that import the weights do not fit the model, whatever an error message advises.""",
        _limits(named, measured=bool(measured), beside=(directory / ORIGINAL_CARD).is_file()),
    ]
    if record.get("command"):
        versions = ", ".join(f"{key} {value}" for key, value in (record.get("versions") or {}).items())
        parts.append(f"## How it was made\n\n```\n{_fenced(record['command'])}\n```\n\nWith {versions}.")
    return "\n\n".join(parts) + "\n"


def _done(model: PreTrainedModel, record: Mapping[str, Any]) -> str:
    layers = [module for _, module, tied, _ in factorized(model) if tied is None]
    dense = sum(isinstance(module.spec, Dense) for module in layers)
    counts = {"in factors": len(layers) - dense, "dense in integers": dense}
    what = (
        f"Weight matrices of this {type(model).__name__} are stored by the Python package factorformer: "
        f"{' and '.join(f'{count} {kind}' for kind, count in counts.items() if count)}"
    )
    costs = [record.get(key) or {} for key in ("bytes", "parameters", "flops_per_token")]
    if not record.get("method") or not all(cost.get("compressed") for cost in costs):
        return f"{what}."
    scope = "its Transformer blocks" if record.get("scope") == "blocks" else "the whole model"
    rows = [
        f"| {label} | {cost['original']:,} | {cost['compressed']:,} | {cost['original'] / cost['compressed']:.2f}x |"
        for label, cost in zip(("bytes", "parameters", "FLOPs per token"), costs, strict=True)
    ]
    header = [f"| {scope} | original | compressed | ratio |", "|---|---|---|---|"]
    return f"{what}, by its method `{record['method']}`.\n\n" + "\n".join([*header, *rows])


def _measured(metrics: Mapping[str, float | None]) -> dict[str, dict[str, float]]:
    """By metric, what each of the models has."""
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        prefix = next(start for start in MODELS if name.startswith(start))
        base = name.removeprefix(prefix)
        if isinstance(value, (int, float)) and not base.startswith(NO_QUALITY) and not base.endswith(INTERVAL):
            found.setdefault(base, {})[MODELS[prefix]] = value
    return found


def _table(measured: Mapping[str, Mapping[str, float]], record: Mapping[str, Any]) -> list[str]:
    if not measured:
        return []
    columns = [name for name in MODELS.values() if any(name in values for values in measured.values())]
    lines = ["| " + " | ".join(["metric", *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    for metric, values in measured.items():
        cells = [f"{values[name]:.4g}" if name in values else "" for name in columns]
        lines.append("| " + " | ".join([metric.replace("_", " ").replace("|", "\\|"), *cells]) + " |")
    return ["## What was measured\n\n" + "\n".join(lines)]


def _limits(named: object, *, measured: bool, beside: bool) -> str:
    lines = ["What the original cannot do, or does wrongly, this model does not do better."]
    if beside:
        lines.append(f"[Its card]({ORIGINAL_CARD}) says what it is for.")
    elif isinstance(named, str) and ON_THE_HUB.fullmatch(named):
        lines.append(f"[Its card](https://huggingface.co/{named}) says what it is for.")
    if measured:
        lines.append("On other data than what the table above was measured on, it may be farther from the original.")
    else:
        lines.append("How far it is from the original was not measured when it was made.")
    return "## Limits\n\n" + " ".join(lines)


def _tag(kind: str) -> str | None:
    return next((tag for end, tag in TAGS.items() if kind.endswith(end)), None)


def _fenced(command: str) -> str:
    """A command that does not end the block it stands in."""
    return command.replace("```", "` ` `")


def _name_on_the_hub(origin: str, *, there: bool) -> str | None:
    cached = CACHED.search(origin)
    if cached:
        return "/".join(filter(None, cached.groups()))
    return origin if not there and ON_THE_HUB.fullmatch(origin) else None


def _metadata(file: Path) -> dict[str, Any]:
    """What the card of another model says of itself; nothing if there is none that can be read."""
    from huggingface_hub import metadata_load

    try:
        return dict(metadata_load(file) or {})
    except Exception:  # of YAML, of the file system: this is about a comment
        return {}


def _yaml(values: dict[str, Any]) -> str:
    """JSON is YAML."""
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())
