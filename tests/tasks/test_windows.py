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
from factorformer.tasks.windows import LONGEST, _pieces, read_documents, sequence_length, together, windows

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
    assert cut(words(begins=True), texts, 6) == ["[BEGIN] a b c [END] d", "[BEGIN] [END] e f g h", "[BEGIN] [END]"]
    assert cut(words(ends=False), texts, 4) == ["a b c d", "e f g h"]
    assert cut(words(), texts[:1], 5) == ["a b c"]
    with pytest.raises(DataError, match="two tokens"):
        windows(words(), ["a"], 5)
    with pytest.raises(DataError, match="give 2 at least"):
        windows(words(begins=True), texts, 1)


def test_long_documents_are_encoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(" ".join("abcdefgh"[i % 8 :]) + "\n" * (i % 3) + " " * (i % 2) for i in range(40))
    expected = cut(words(), [text, "a b"], 7)
    for size in (5, 30, 200):
        monkeypatch.setattr("factorformer.tasks.windows.PIECE", size)
        assert "".join(_pieces(text)) == text
        assert len(list(_pieces(text))) > 1
        assert cut(words(), [text, "a b"], 7) == expected


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
    parts = [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}]
    rows = [{"text": talk, "id": 1}, {"text": parts, "id": "of another type"}]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    documents = read_documents(str(file), TEXT, print)
    assert documents == [talk, talk[:1]]
    tokenizer = words(begins=True)
    with pytest.raises(DataError, match="no chat template"):
        windows(tokenizer, documents, 5)
    # As most templates do, it ends with something behind the end of text.
    tokenizer.chat_template = "[BEGIN]{% for m in messages %} {{ m['content'] }} [END] h{% endfor %}"
    assert cut(tokenizer, documents, 8) == ["[BEGIN] a b [END] h c [END] h", "[BEGIN] a b [END] h"]
    assert cut(tokenizer, documents, 5) == ["[BEGIN] a b [END] h", "[BEGIN] c [END] h [BEGIN]", "[BEGIN] a b [END] h"]
    tokenizer.chat_template = "{{ raise_exception('no user') }}"
    with pytest.raises(DataError, match=r"refuses.*no user"):
        windows(tokenizer, documents, 5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([{"role": "user"}], "line 2.*'role' and a 'content'"),
        (None, "line 2.*list of messages.*None"),
        ([], "line 2.*list of messages"),
        ([{"role": "user", "content": [{"type": "image"}]}], "line 2.*content of a message is text.*image"),
        ([{"role": "user", "content": None}], "line 2.*content of a message is text.*None"),
    ],
)
def test_messages_that_are_none(row: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    good = [{"role": "user", "content": "a"}]
    file.write_text(f"{json.dumps({'text': good})}\n{json.dumps({'text': row})}\n")
    with pytest.raises(DataError, match=message):
        read_documents(str(file), TEXT, print)


def test_lengths() -> None:
    assert sequence_length(GPT2Config(n_positions=512), None) == 512
    assert sequence_length(LlamaConfig(max_position_embeddings=8192), None) == LONGEST
    assert sequence_length(LlamaConfig(max_position_embeddings=8192), 4096) == 4096
    with pytest.raises(DataError, match="--sequence-length 600: the model reads 512"):
        sequence_length(GPT2Config(n_positions=512), 600)
    assert sequence_length(GPT2Config(n_positions=514), None, 512) == 512
    # Of a large vocabulary, few predictions at a time.
    assert [together(GPT2Config(vocab_size=n), 1024, 2**27) for n in (50_000, 200_000)] == [2, 1]
    assert [together(GPT2Config(vocab_size=n), 16, 2**27) for n in (50_000, 200_000)] == [167, 41]
