"""Models as a user names them: a directory, a name on the Hub, or `minilm`; loaded without surprises."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from factorformer.errors import CheckpointError, FactorformerError, ModelError, first_line
from factorformer.hf import minilm
from factorformer.hf.checkpoint import load

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot", ".tflite", ".gguf", ".index.json")
"""How names of weight files end."""


def find(model: str) -> Path:
    """The directory of a model; a name on the Hub is downloaded first.

    Args:
        model: a directory, a name such as `google-bert/bert-base-uncased`, or `minilm`.

    Raises:
        ModelError: no such directory, or the Hub has no such model or cannot be reached.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"'{model}' is not a model directory: it has no config.json")
        return path
    if model == "minilm":
        return minilm.directory()
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model) or ("/" in model and path.parent.exists()):
        raise ModelError(f"no such model directory: '{model}'")
    return _download(model)


def _download(name: str) -> Path:
    patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
    others = ["onnx/*", "openvino/*", "coreml/*"]
    try:
        path = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=others))
        if not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(name, allow_patterns=[*patterns, "pytorch_model*.bin"]))
    except Exception as error:  # of the Hub's client, of HTTP, of sockets
        raise ModelError(
            f"'{name}' is no directory here, and it cannot be had from the Hub: {first_line(error)}"
        ) from error
    if not (path / "config.json").is_file():
        raise ModelError(f"'{name}' on the Hub holds no Transformers model: it has no config.json")
    return path


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, with a padding token.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raise many types, all of which mean a directory without a usable one
        raise ModelError(f"cannot load a tokenizer from '{path}': {first_line(error)}") from error
    files = {"tokenizer.json", "tokenizer_config.json", *tokenizer.vocab_files_names.values()}
    if not any((path / file).exists() for file in files):  # transformers then makes one with an empty vocabulary
        raise ModelError(f"'{path}' has no tokenizer: none of {', '.join(sorted(files))}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path: Path, dtype: torch.dtype | None = None, device: str | None = None) -> PreTrainedModel:
    """The model of a directory, dense or compressed, as the class that it was saved from.

    Tensors in the files that the class has no use for (heads of other tasks) are passed over in a dense model.

    Args:
        path: the directory.
        dtype: of the weights; None keeps the one on disk.
        device: where the model is put; None for a GPU if there is one.

    Raises:
        CheckpointError: weights that are missing or misshapen.
        ModelError: a class that transformers does not have, or weights that are not finite.
    """
    read_config(path)
    return ready(load(path, **({} if dtype is None else {"dtype": dtype})), device)


def most_tokens(model: PreTrainedModel) -> int | None:
    """How long a text may be for a model with a table of positions; None for rotary or relative ones."""
    tables = ("position_embeddings", "embed_positions", "wpe")
    table = next((m for name, m in model.named_modules() if name.rpartition(".")[2] in tables), None)
    positions = getattr(model.config, "max_position_embeddings", None)
    if table is None or positions is None:
        return None
    padding = getattr(table, "padding_idx", None)  # RoBERTa counts from behind this one
    return positions - (0 if padding is None else padding + 1)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what stands beside the weights of a model, byte by byte, wherever `target` does not have it already.

    These are the small files at the top (tokenizer, `modules.json`, ...), and the folders of the sentence-transformers
    modules that `modules.json` lists. Weights, hidden files, the model card and the original's records stay behind.
    """
    for file in source.iterdir():
        left = file.name.startswith((".", "README", "factorformer")) or file.name.endswith(WEIGHTS)
        if file.is_file() and not left and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
    for folder in _module_folders(source):
        shutil.copytree(source / folder, target / folder, dirs_exist_ok=True)


def _module_folders(source: Path) -> list[str]:
    description = source / "modules.json"
    if not description.is_file():
        return []
    try:
        folders = [module["path"] for module in json.loads(description.read_text(encoding="utf-8"))]
        inside = [path for path in folders if path and ".." not in Path(path).parts and not Path(path).is_absolute()]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"cannot read '{description}': {error}") from error
    return [path for path in inside if (source / path).is_dir()]


def read_config(path: Path) -> PretrainedConfig:
    """The configuration of a model directory.

    Raises:
        CheckpointError: it is missing, malformed, or of a model that transformers does not know.
    """
    try:
        return AutoConfig.from_pretrained(path)
    except FactorformerError:
        raise
    except Exception as error:  # malformed content surfaces as many types
        raise CheckpointError(f"cannot read '{path}/config.json': {first_line(error)}") from error


def from_pretrained(architecture: Any, path: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model and what transformers says of its tensors; any failure is a `CheckpointError`."""
    try:
        return architecture.from_pretrained(path, output_loading_info=True, **options)
    except FactorformerError:
        raise
    except Exception as error:  # transformers, safetensors and torch raise many types for files that do not fit
        raise CheckpointError(f"cannot load '{path}': {first_line(error)}") from error


def refuse(path: Path, missing: list[str], misshapen: list[Any]) -> None:
    """Raise `CheckpointError` if weights of a model are missing or misshapen."""
    for what, keys in (("lacks", missing), ("has other shapes for", misshapen)):
        if keys:
            names = sorted(map(str, keys))
            raise CheckpointError(f"'{path}' {what} {len(names)} weights of its model: {', '.join(names[:5])}")


def ready(model: PreTrainedModel, device: str | None = None) -> PreTrainedModel:
    """The model in evaluation mode, on the device it is to run on; `ModelError` if a weight is not finite."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(f"the weight '{name}' holds NaN or infinite values")
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()  # pyright: ignore[reportArgumentType]
