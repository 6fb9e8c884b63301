"""Documents are joined and cut, and nothing of them is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from factorformer.errors import DataError
from factorformer.tasks.tables import Columns
from factorformer.tasks.windows import LONGEST, read_documents, sequence_length, windows

WORDS = ["[UNK]", "[END]", "[BEGIN]", *"abcdefgh"]
TEXT = Columns(("text",))


def words(*, begins: bool = False, ends: bool = True) -> PreTrainedTokenizerFast:
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    if begins:
        inner.post_processor = TemplateProcessing(single="[BEGIN] $A", special_tokens=[("[BEGIN]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", bos_token="[BEGIN]", eos_token="[END]" if ends else None
    )


def cut(tokenizer: PreTrainedTokenizerFast, documents: list[Any], length: int) -> list[str]:
    data = windows(tokenizer, documents, length)
    assert data["length"][:] == [len(ids) for ids in data["input_ids"]]
    assert all(set(mask) == {1} for mask in data["attention_mask"])
    return [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in data["input_ids"]]


def test_documents_end_and_are_joined() -> None:
    texts = ["a b c", "d", "e f g h"]
    assert cut(words(), texts, 5) == ["a b c [END] d", "[END] e f g h"]  # of the last end nothing could be predicted
    assert cut(words(begins=True), texts, 6) == ["[BEGIN] a b c [END] [BEGIN]", "d [END] [BEGIN] e f g", "h [END]"]
    assert cut(words(ends=False), texts, 4) == ["a b c d", "e f g h"]
    assert cut(words(), texts[:1], 5) == ["a b c"]
    with pytest.raises(DataError, match="two tokens"):
        windows(words(), ["a"], 5)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("a\n\n b  c\nd\n")
    assert read_documents(str(file), TEXT, print) == ["a\n\n b  c\nd"]
    file.write_text("\n \n")
    with pytest.raises(DataError, match="every line is empty"):
        read_documents(str(file), TEXT, print)


def test_rows_are_documents(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a b", "other": "c"}\n{"text": " ", "other": "d"}\n{"text": "e", "other": "f"}\n')
    assert read_documents(str(file), TEXT, print) == ["a b", "e"]
    assert read_documents(str(file), Columns(("other",)), print) == ["c", "d", "f"]
    for columns, message in ((Columns(("txt",)), "'txt'.*text"), (Columns(("text", "other")), "one column")):
        with pytest.raises(DataError, match=message):
            read_documents(str(file), columns, print)


def test_conversations(tmp_path: Path) -> None:
    file, talk = tmp_path / "talks.jsonl", [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    file.write_text(f"{json.dumps({'text': talk})}\n{json.dumps({'text': talk[:1]})}\n")
    documents = read_documents(str(file), TEXT, print)
    tokenizer = words(begins=True)
    with pytest.raises(DataError, match="no chat template"):
        windows(tokenizer, documents, 5)
    tokenizer.chat_template = "[BEGIN]{% for m in messages %} {{ m['content'] }} [END]{% endfor %}"
    assert cut(tokenizer, documents, 9) == ["[BEGIN] a b [END] c [END] [BEGIN] a b"]
    assert cut(tokenizer, documents, 5)[-1] == "[END] [BEGIN] a b [END]"
    tokenizer.chat_template = "{{ raise_exception('no user') }}"
    with pytest.raises(DataError, match=r"refuses.*no user"):
        windows(tokenizer, documents, 5)
    file.write_text('{"text": [{"role": "user"}]}\n')
    with pytest.raises(DataError, match=r"row 1.*'role' and a 'content'"):
        read_documents(str(file), TEXT, print)


def test_lengths() -> None:
    assert sequence_length(GPT2Config(n_positions=512), None) == 512
    assert sequence_length(LlamaConfig(max_position_embeddings=8192), None) == LONGEST
    assert sequence_length(LlamaConfig(max_position_embeddings=8192), 4096) == 4096
    with pytest.raises(DataError, match="--sequence-length 600: the model reads 512"):
        sequence_length(GPT2Config(n_positions=512), 600)
