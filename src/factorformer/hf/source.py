"""Models as a user names them: a directory, a name on the Hub, or `minilm`; loaded without surprises."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from factorformer.errors import CheckpointError, ModelError, one_line
from factorformer.hf import checkpoint, layout, minilm
from factorformer.hf.checkpoint import choose, load
from factorformer.hf.trust import trusted

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot", ".tflite", ".gguf", ".index.json")
"""How names of weight files end; those of optimizers too."""

RECORDS_OF_TRAINING = (
    *("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json", "predict_results.json"),
    *("latest", "zero_to_fp32.py", "training_args.json"),
)
"""What a `Trainer` leaves beside a model."""


def find(model: str) -> Path:
    """The directory of a model; a name on the Hub is downloaded first.

    Args:
        model: a directory, plain or of sentence-transformers, a name such as `google-bert/bert-base-uncased`, or
            `minilm`.

    Raises:
        ModelError: no such directory, or the Hub has no such model or cannot be reached.
        CheckpointError: a directory that holds no model, or several.
    """
    path = Path(model)
    if path.is_dir():
        layout.place(path)
        return path
    if model == "minilm":
        return minilm.directory()
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model) or ("/" in model and path.parent.exists()):
        raise ModelError(f"no such model directory: '{model}'")
    return _download(model)


def _download(name: str) -> Path:
    patterns = ["README.md", "*.json", "*.txt", "*.model", "*.safetensors", *(["*.py"] if trusted() else [])]
    others = ["onnx/*", "openvino/*", "coreml/*"]
    try:
        path = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=others))
        if not any(path.rglob("*.safetensors")):
            path = Path(snapshot_download(name, allow_patterns=[*patterns, "pytorch_model*.bin"]))
    except Exception as error:  # of the Hub's client, of HTTP, of sockets
        raise ModelError(
            f"'{name}' is no directory here, and it cannot be had from the Hub: {one_line(error)}"
        ) from error
    layout.place(path)
    return path


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, with a padding token.

    Raises:
        ModelError: there is none, or it cannot be read; or the model reads something else than text.
    """
    alone = not any((path / name).is_file() for name in ("config.json", layout.MODULES))  # saved without a model
    folder = path if alone else layout.place(path).folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted())
    except Exception as error:  # tokenizers raise many types, all of which mean a directory without a usable one
        if not alone:
            _check_reads_text(path)
        raise ModelError(f"cannot load a tokenizer from '{path}': {one_line(error)}") from error
    files = {"tokenizer.json", "tokenizer_config.json", *tokenizer.vocab_files_names.values()}
    if not any((folder / file).exists() for file in files):  # transformers then makes one with an empty vocabulary
        if not alone:
            _check_reads_text(path)
        raise ModelError(f"'{path}' has no tokenizer: none of {', '.join(sorted(files))}")
    if tokenizer.pad_token is None:
        others = (tokenizer.eos_token, tokenizer.sep_token, tokenizer.unk_token)
        tokenizer.pad_token = next((token for token in others if token is not None), None)
    if tokenizer.pad_token is None:
        raise ModelError(f"the tokenizer of '{path}' has no token to pad texts with: set its pad_token and save it")
    return tokenizer


def _check_reads_text(path: Path) -> None:
    """Raise `ModelError` if the model in a directory reads images or sound."""
    name = getattr(choose(path).loader, "main_input_name", "input_ids")
    kinds = {"pixel": "images", "input_features": "sound", "input_values": "sound", "audio": "sound"}
    reads = next((kind for start, kind in kinds.items() if name.startswith(start)), None)
    if reads is not None:
        raise ModelError(
            f"the model in '{path}' reads {reads} ({name}) and has no tokenizer: compress it without text "
            "(--method svd), or calibrate in Python, where batches may hold anything"
        )


def load_model(
    path: Path, dtype: torch.dtype | None = None, device: str | None = None, *, whole: bool = False
) -> PreTrainedModel:
    """The model of a directory, dense or compressed; which class it is says `checkpoint.load`.

    Args:
        path: the directory.
        dtype: of the weights; None keeps the one on disk.
        device: where the model is put; None for a GPU if there is one.
        whole: take a missing head for an error.

    Raises:
        CheckpointError: weights that are missing or misshapen, or a class that transformers does not have.
        ModelError: weights that are not finite.
    """
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    return ready(load(path, whole=whole, **options), device)


def most_tokens(model: PreTrainedModel) -> int | None:
    """How long a text may be for a model with a table of positions; None for rotary or relative ones."""
    tables = ("position_embeddings", "embed_positions", "wpe")
    table = next((m for name, m in model.named_modules() if name.rpartition(".")[2] in tables), None)
    positions = getattr(model.config, "max_position_embeddings", None)
    if table is None or positions is None:
        return None
    padding = getattr(table, "padding_idx", None)  # RoBERTa counts from behind this one
    return positions - (0 if padding is None else padding + 1)


def vocabulary_files(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Names of files in which tokenizers of its kind may keep their vocabulary."""
    known = {"vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "unigram.json", "spiece.model"}
    return {*known, "sentencepiece.bpe.model", "tokenizer.model", *type(tokenizer).vocab_files_names.values()}


def copy_companions(source: Path, target: Path, without: Collection[str] = ()) -> None:
    """Copy what stands beside the weights of a model, byte by byte, wherever `target` does not have it already.

    These are the small files (tokenizer, `modules.json`, ...) at the top and beside the Transformer, and the folders of
    the other modules that `modules.json` lists. The model's weights, hidden files, the model card, and the records of
    how it was trained stay behind.
    """
    inside = layout.place(source).folder.relative_to(source)
    for folder in dict.fromkeys((Path(), inside)):
        (target / folder).mkdir(parents=True, exist_ok=True)
        for file in (source / folder).iterdir():
            stays = _stays(file.name) or file.name in without
            if file.is_file() and not stays and not (target / folder / file.name).exists():
                shutil.copyfile(file, target / folder / file.name)
    for folder in layout.module_folders(source):
        if Path(folder) != inside:
            shutil.copytree(source / folder, target / folder, dirs_exist_ok=True)
    for router in source.glob(f"*/{layout.ROUTER}"):
        shutil.copyfile(router, target / router.relative_to(source))


def _stays(name: str) -> bool:
    """Whether a file is not of the model that comes out."""
    return name.startswith((".", "README", "factorformer")) or name.endswith(WEIGHTS) or name in RECORDS_OF_TRAINING


def place_of_weights(source: Path) -> Path:
    """The folder of the Transformer's weights, relative to its directory: not `.` in some of sentence-transformers."""
    return layout.place(source).folder.relative_to(source)


def read_config(path: Path) -> PretrainedConfig:
    """The configuration of the model in a directory.

    Raises:
        CheckpointError: it is missing, malformed, or of a model that transformers does not know.
    """
    return choose(path).config or checkpoint.read_config(layout.place(path).folder)


def from_pretrained(architecture: Any, path: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model in a directory as another class, and what transformers says of its tensors.

    Raises:
        CheckpointError: any failure.
    """
    return checkpoint.read_model(architecture, layout.place(path).folder, trust_remote_code=trusted(), **options)


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
