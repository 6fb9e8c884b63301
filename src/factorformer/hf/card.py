"""The README.md of a compressed model: what it is, and how to load it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from factorformer.hf.description import factorized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "README.md"

ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def write(model: PreTrainedModel, directory: Path) -> None:
    """Write the card of a model that was saved into a directory, unless there is one already."""
    file = directory / FILE
    if not file.exists():
        file.write_text(text(model), encoding="utf-8")


def text(model: PreTrainedModel) -> str:
    """The card: metadata that the Hub reads, and the lines that load the model."""
    known: dict[str, Any] = {"library_name": "transformers", "tags": ["factorformer"]}
    origin = str(getattr(model.config, "name_or_path", "") or "")
    source, there = Path(origin), bool(origin) and Path(origin).is_dir()
    of_source = _metadata(source / FILE) if there else {}
    base = _name_on_the_hub(origin, there=there)
    base = base or next((of_source[key] for key in ("model_id", "base_model") if of_source.get(key)), None)
    known |= {"base_model": base} if base else {}
    known |= {key: of_source[key] for key in ("license", "license_name", "license_link") if of_source.get(key)}
    count = sum(1 for _ in factorized(model))
    kind = type(model).__name__
    loader = kind if hasattr(transformers, kind) else "AutoModel"
    name = base if isinstance(base, str) else source.name if there else None
    return f"""---
{_yaml(known)}---

# {f"{name}, compressed" if name else "A compressed model"}

{count} weight matrices of this {kind} are stored in factorized form by the Python package factorformer. Plain
`transformers` loads it once that is imported:

```python
import factorformer
import transformers

model = transformers.{loader}.from_pretrained("PATH OR NAME OF THIS MODEL")
```

So do `AutoModel`, `pipeline` and, where the directory is one of sentence-transformers, `SentenceTransformer`. Without
that import the weights do not fit the model, whatever an error message advises.
"""


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
