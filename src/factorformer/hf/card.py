"""The README.md of a compressed model: what it is, what was measured, and how to load it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from factorformer.files import ORIGINAL_CARD
from factorformer.hf import layout
from factorformer.hf.description import factorized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "README.md"

ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")

TAGS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}
"""What the Hub calls tasks, by the ends of the names of classes."""

PASSED_OVER, ENDS = ("predicted_", "difference_"), ("_low", "_high")
"""Beginnings and ends of the names of numbers that are none of a model's."""

MODELS = {"original_": "original", "fitted_": "before training", "": "compressed"}
"""Prefixes of metrics, and the models that they are of."""


def write(model: PreTrainedModel, directory: Path, record: Mapping[str, Any] | None = None) -> None:
    """Write the card of a model that was saved into a directory, unless there is one already.

    Args:
        model: compressed.
        directory: of the model.
        record: what is known of how it was made, as in `factorformer.json`; a card is written again then, and that of
            the original kept beside it.
    """
    file = directory / FILE
    if file.exists() and record is None:
        return
    origin = Path(str(getattr(model.config, "name_or_path", "") or ""))
    kept = record is not None and (origin / FILE).is_file() and origin.resolve() != directory.resolve()
    if kept:
        shutil.copyfile(origin / FILE, directory / ORIGINAL_CARD)
    plain = not any(type(model).__name__.endswith(end) for end in TAGS)
    sentences = (directory / layout.MODULES).exists() or (plain and (origin / layout.MODULES).exists())
    file.write_text(text(model, record, sentences=sentences, beside=kept), encoding="utf-8")


def text(
    model: PreTrainedModel,
    record: Mapping[str, Any] | None = None,
    *,
    sentences: bool = False,
    beside: bool = False,
) -> str:
    """The card: metadata that the Hub reads, what was done and measured, and the lines that load the model.

    Args:
        model: compressed.
        record: what is known of how it was made.
        sentences: whether the directory is one of sentence-transformers.
        beside: whether the card of the original lies beside this one.
    """
    record = record or {}
    origin = str(getattr(model.config, "name_or_path", "") or "")
    source, there = Path(origin), bool(origin) and Path(origin).is_dir()
    of_source = _metadata(source / FILE) if there else {}
    base = _name_on_the_hub(origin, there=there)
    base = base or next((of_source[key] for key in ("model_id", "base_model") if of_source.get(key)), None)
    kind = type(model).__name__
    loader = kind if hasattr(transformers, kind) else "AutoModel"
    name = base if isinstance(base, str) else source.name if there else None
    known: dict[str, Any] = {
        "library_name": "sentence-transformers" if sentences else "transformers",
        "tags": ["factorformer", *(["sentence-similarity"] if sentences else [])],
    }
    known |= {"base_model": base, "base_model_relation": "quantized"} if base else {}
    known |= {key: of_source[key] for key in ("license", "license_name", "license_link") if of_source.get(key)}
    tag = of_source.get("pipeline_tag") or ("sentence-similarity" if sentences else _tag(kind))
    known |= {"pipeline_tag": tag} if tag else {}
    measured = _measured(record.get("metrics") or {})
    known |= {"metrics": [metric for metric in measured if metric.isidentifier()]} if measured else {}
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
        _limits(record, base, beside=beside),
    ]
    if record.get("command"):
        versions = ", ".join(f"{key} {value}" for key, value in (record.get("versions") or {}).items())
        parts.append(f"## How it was made\n\n```\n{_fenced(record['command'])}\n```\n\nWith {versions}.")
    return "\n\n".join(parts) + "\n"


def _done(model: PreTrainedModel, record: Mapping[str, Any]) -> str:
    count = sum(1 for _ in factorized(model))
    what = (
        f"{count} weight matrices of this {type(model).__name__} are stored in factorized form by the Python package "
        "factorformer"
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
        if value is not None and not base.startswith(PASSED_OVER) and not base.endswith(ENDS):
            found.setdefault(base, {})[MODELS[prefix]] = value
    return found


def _table(measured: Mapping[str, Mapping[str, float]], record: Mapping[str, Any]) -> list[str]:
    if not measured:
        return []
    columns = [name for name in MODELS.values() if any(name in values for values in measured.values())]
    lines = ["| " + " | ".join(["metric", *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    for metric, values in measured.items():
        cells = [f"{values[name]:.4g}" if name in values else "" for name in columns]
        lines.append("| " + " | ".join([metric.replace("_", " "), *cells]) + " |")
    return ["## What was measured\n\n" + "\n".join(lines)]


def _limits(record: Mapping[str, Any], base: object, *, beside: bool) -> str:
    lines = ["What the original cannot do, or does wrongly, this model does not do better."]
    if beside:
        lines.append(f"[Its card]({ORIGINAL_CARD}) says what it is for.")
    elif isinstance(base, str) and ON_THE_HUB.fullmatch(base):
        lines.append(f"[Its card](https://huggingface.co/{base}) says what it is for.")
    if record.get("metrics"):
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
        return "/".join(cached.groups())
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
