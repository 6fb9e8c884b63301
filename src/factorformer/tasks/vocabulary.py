"""A vocabulary without the tokens that a text never uses: the tokenizer, and the tables of a model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from factorformer.errors import ModelError
from factorformer.layers.embeddings import embeddings_of

PREFIXES = ("##", "\u2581", "\u0120")
"""What begins tokens inside of a word, or at its start, in the vocabularies of WordPiece, SentencePiece and bytes."""

CONFIGURED = ("config", "generation_config")
"""Attributes of a model that name tokens by number, in fields whose names end in `TOKEN_ID`."""

TOKEN_ID = "_token_id"


def used_tokens(tokenizer: PreTrainedTokenizerBase, counts: Int[Tensor, " vocabulary"]) -> Int[Tensor, " kept"]:
    """Tokens without which a text would be read differently, or another could not be read at all; ascending.

    Those that occur in it, all special ones, all single characters, so that any word can be spelled, and what merges of
    pairs make on their way to one of these.

    Args:
        tokenizer: a fast one.
        counts: how often each token occurs in the text.

    Raises:
        ModelError: not a tokenizer of the `tokenizers` library, or one whose vocabulary cannot be cut.
    """
    described = _description(tokenizer)
    tokens = _tokens(described["model"])
    kept = {tokens[number] for number in counts.nonzero().flatten().tolist() if number in tokens}
    kept |= {token for token in tokens.values() if _is_elementary(token)}
    kept |= {token for token in (described["model"].get("unk_token"),) if token}
    for pair in reversed(described["model"].get("merges") or ()):
        first, second = _parts(pair)
        if first + second in kept:
            kept |= {first, second}
    numbers = {number for number, token in tokens.items() if token in kept}
    numbers |= {added["id"] for added in described["added_tokens"]} | set(tokenizer.all_special_ids)
    unknown = described["model"].get("unk_id")
    return torch.tensor(sorted(numbers | ({unknown} if unknown is not None else set())))


def trimmed_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Int[Tensor, " kept"]) -> PreTrainedTokenizerBase:
    """A tokenizer that knows these tokens alone, numbered in their order.

    Raises:
        ModelError: as `used_tokens`.
    """
    described, new = _description(tokenizer), {old: place for place, old in enumerate(kept.tolist())}
    model = described["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: new[old] for token, old in model["vocab"].items() if old in new}
    else:
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in new]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    if model.get("merges"):
        made = model["vocab"]
        model["merges"] = [
            pair for pair in model["merges"] if "".join(_parts(pair)) in made and set(_parts(pair)) <= made.keys()
        ]
    for added in described["added_tokens"]:
        added["id"] = new[added["id"]]
    _renumber(described.get("post_processor"), new)
    if described.get("padding"):
        described["padding"]["pad_id"] = new[described["padding"]["pad_id"]]
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        (Path(scratch) / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
        for name, file in type(tokenizer).vocab_files_names.items():
            if name != "tokenizer_file":
                (Path(scratch) / file).unlink(missing_ok=True)
        settings = Path(scratch) / "tokenizer_config.json"
        content = json.loads(settings.read_text(encoding="utf-8"))
        decoder = content.get("added_tokens_decoder")
        if decoder:
            content["added_tokens_decoder"] = {str(new[int(old)]): token for old, token in decoder.items()}
        settings.write_text(json.dumps(content), encoding="utf-8")
        return AutoTokenizer.from_pretrained(scratch)


def trim_model(model: PreTrainedModel, kept: Int[Tensor, " kept"]) -> None:
    """Drop all other rows from the tables of a dense model, and number tokens anew in its configuration, in place.

    Raises:
        ModelError: the model has no table of tokens, or fewer rows than the tokenizer has tokens.
    """
    table = embeddings_of(model, "input_embeddings")
    if not isinstance(table, nn.Embedding):
        raise ModelError(f"{type(model).__name__} has no table of tokens whose rows could be dropped")
    if int(kept.max()) >= table.num_embeddings:
        raise ModelError(f"the tokenizer has the token {int(kept.max())}, and the model {table.num_embeddings} of them")
    new = {old: place for place, old in enumerate(kept.tolist())}
    padding = table.padding_idx
    head = embeddings_of(model, "output_embeddings")
    rows = kept.to(table.weight.device)
    with torch.no_grad():
        tensors = {id(t): t for part in (table, head) if part is not None for t in part.parameters()}
        for tensor in tensors.values():
            tensor[: len(rows)] = tensor[rows].clone()
    model.resize_token_embeddings(len(rows), mean_resizing=False)
    table = embeddings_of(model, "input_embeddings")
    assert isinstance(table, nn.Embedding)
    table.padding_idx = None if padding is None else new.get(padding)
    for holder in (getattr(model, name, None) for name in CONFIGURED):
        for field, value in list(vars(holder).items()) if holder is not None else ():
            if field.endswith(TOKEN_ID) and value is not None:
                several = isinstance(value, list)
                setattr(holder, field, [new[v] for v in value if v in new] if several else new.get(value))


def _description(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{type(tokenizer).__name__} is no tokenizer of the tokenizers library: it cannot be trimmed")
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] not in ("WordPiece", "BPE", "Unigram", "WordLevel"):
        raise ModelError(f"a vocabulary of {model['type']} cannot be trimmed")
    marks = [model.get(mark) for mark in ("continuing_subword_prefix", "end_of_word_suffix")]
    if model["type"] == "BPE" and any(marks):
        raise ModelError(
            f"a vocabulary of BPE that marks parts of words by {' and '.join(filter(None, marks))!r} cannot be trimmed"
        )
    return described


def _tokens(model: Mapping[str, Any]) -> dict[int, str]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return {number: token for token, number in vocabulary.items()}
    return {number: token for number, (token, _) in enumerate(vocabulary)}


def _is_elementary(token: str) -> bool:
    """A single character, or a byte that stands for a part of one."""
    for prefix in PREFIXES:
        token = token.removeprefix(prefix) or token
    return len(token) == 1 or (len(token) == 6 and token.startswith("<0x"))


def _parts(pair: str | Sequence[str]) -> tuple[str, str]:
    """Both sides of a merge, in the old notation as well."""
    first, second = pair.split(" ") if isinstance(pair, str) else pair
    return first, second


def _renumber(node: Any, new: Mapping[int, int]) -> None:
    """Special tokens of a post-processor, wherever they are named by number."""
    if isinstance(node, list):
        for item in node:
            _renumber(item, new)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key == "ids":
                node[key] = [new[number] for number in value]
            elif key in ("sep", "cls") and isinstance(value, list):
                node[key] = [value[0], new[value[1]]]
            else:
                _renumber(value, new)
