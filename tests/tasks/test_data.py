"""Texts and labels arrive as they were written, or the error says what is wrong with the file."""

from __future__ import annotations

import bz2
import functools
import gzip
import json
import lzma
import os
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers as tf
from datasets.table import InMemoryTable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.tiny import MODELS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from factorformer.errors import DataError, ModelError
from factorformer.hf.source import load_tokenizer
from factorformer.tasks.data import (
    Columns,
    Labels,
    batches,
    encode,
    indexed_batches,
    read,
    sample,
    with_decoder_inputs,
)

AWKWARD = [
    'a "quoted" word',
    '"',
    '"begins with a quote',
    "NA",
    "null",
    "None",
    "nan",
    "N/A",
    "",
    "123",
    "1.50",
    "True",
    "it's, with a comma",
    "naïve café — 中文",
    " spaces around ",
]


def table(**columns: list) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


# Files


def test_tsv_has_no_quoting_and_no_missing_values(tmp_path: Path) -> None:
    file = tmp_path / "data.tsv"
    file.write_text("text\tlabel\n" + "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(AWKWARD)), encoding="utf-8")
    rows = read(file)
    assert list(rows["text"]) == AWKWARD
    assert list(rows["label"]) == [str(i % 2) for i in range(len(AWKWARD))]


def test_csv_is_quoted(tmp_path: Path) -> None:
    file = tmp_path / "data.CSV"
    quoted = ['"' + text.replace('"', '""') + '"' for text in AWKWARD]
    file.write_text("text,label\n" + "".join(f"{text},yes\n" for text in quoted), encoding="utf-8")
    rows = read(str(file))
    assert list(rows["text"]) == AWKWARD
    assert set(rows["label"]) == {"yes"}


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"data{suffix}"
    lines = [json.dumps({"text": text, "label": i / 4}) + "\n" for i, text in enumerate(AWKWARD)]
    file.write_text("".join(lines), encoding="utf-8")
    rows = read(file)
    assert list(rows["text"]) == AWKWARD
    assert list(rows["label"]) == [i / 4 for i in range(len(AWKWARD))]


def test_plain_text(tmp_path: Path) -> None:
    file = tmp_path / "data.txt"
    texts = [text for text in AWKWARD if text]
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    assert list(read(file)["text"]) == texts


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "data.tsv"
    for text in ("one", "two"):
        file.write_text(f"text\n{text}\n")
        assert list(read(file)["text"]) == [text]


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".json", ".txt"])
def test_an_empty_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"data{suffix}"
    file.write_text("")
    with pytest.raises(DataError, match=f"'{re.escape(str(file))}' is empty"):
        read(file)


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_a_file_with_a_header_only(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"data{suffix}"
    file.write_text("text\n")
    with pytest.raises(DataError, match="data"):
        read(file)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data file.*nothing\.tsv"):
        read(tmp_path / "nothing.tsv")


def test_a_directory_in_place_of_a_file(tmp_path: Path) -> None:
    for name in ("data.tsv", "data"):
        (tmp_path / name).mkdir()
        with pytest.raises(DataError, match="is a directory"):
            read(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.tsv")
    with pytest.raises(DataError, match="is a pipe"):
        read(tmp_path / "pipe.tsv")


MALFORMED: dict[str, list[tuple[bytes, str]]] = {
    "data.jsonl": [
        (b'{"text": "cut', r"line 1, column 10: not JSON"),
        (b"no json at all\n", r"line 1, column 1: not JSON"),
        (b'{"text": "a"}\n\n{"text": }\n', r"line 3, column 10: not JSON"),
        (b'{"text": "a"}\n["b"]\n', r"line 2: an object of columns.*a list"),
        (b'[{"text": "a"},\n {"text": b}]', r"line 2, column 11: not JSON"),
        (b'{"text": ["a"],\n"label": [1, 2]}', "different lengths: 'text' 1, 'label' 2"),
        (b'{"text": "a"}\n{"text": ' + b"[" * 99999 + b"]" * 99999 + b"}\n", "line 2: not JSON: nested"),
    ],
    "data.json": [(b'{"text": ["a"], "label": [1, 2]}', "different lengths: 'text' 1, 'label' 2")],
    "data.tsv": [
        (b"text\tlabel\none\ttwo\none\ttwo\tthree\n", "line 3: 3 fields, .* 2"),
        (b"text\tlabel\n\none\n", "line 3: 1 field.*names 2"),
        (b"text\ttext\na\tb\n", "line 1: two columns are named 'text'"),
        (b"text\n\xc3\xa9t\xe9\n", r"line 2, column 3: byte 0xe9 \(at offset 8\) is not UTF-8"),
        (b"text\n\x82\xa0\x82\xa2\n", r"line 2, column 1: byte 0x82 .*UTF-8"),
        ("text\nпривет\n".encode("cp1251"), r"line 2, column 1: byte 0xef .*save the file as UTF-8"),
        ("text\na\n".encode("utf-16-le"), "line 1, column 2: a zero byte .*UTF-16"),
    ],
    "data.csv": [
        (b'text,label\n"a film,1\na book,0\n', "line 2: quotes that do not match"),
        (b'text,label\na,1\n"a "good" film",1\n', "line 3: quotes that do not match"),
        (b"text,label\na film, and more,1\n", "line 2: 3 fields.*commas.*quoted"),
        (b'text,label\n"two\nlines",1\nshort\n', "line 4: 1 field"),
        (b"\x1f\x8b\x08\x00\x00", "gzip"),
        (b"PK\x03\x04rest", "Excel"),
    ],
    "data.csv.gz": [
        (b"\x1f\x8b\x08\x00\x00", "cannot read .*data.csv.gz"),
        (b"text\na\n", "cannot read .*data.csv.gz"),
    ],
    "data.csv.zst": [(b"text\na\n", "cannot read .*data.csv.zst")],
    "data.parquet": [(b"text\na\n", "cannot read .*data.parquet"), (b"", "empty")],
    "data.xlsx": [(b"PK\x03\x04", "data.xlsx.*kind")],
}


def test_a_malformed_file_is_named_with_line_and_column(tmp_path: Path) -> None:
    for name, contents in MALFORMED.items():
        for content, message in contents:
            (tmp_path / name).write_bytes(content)
            with pytest.raises(DataError, match=message) as caught:
                read(tmp_path / name)
            assert name in str(caught.value)


def test_files_as_people_have_them(tmp_path: Path) -> None:
    content = "text,label\nthe café,1\na dog,0\n"
    plain, told = content.encode(), []
    written: dict[str, bytes] = {
        "plain.csv": plain,
        "windows.csv": b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode(),
        "semicolons.csv": content.replace(",", ";").encode(),
        "tabs.csv": content.replace(",", "\t").encode(),
        "utf16.csv": content.encode("utf-16"),
        "western.csv": content.encode("cp1252"),
        "t.csv.gz": gzip.compress(plain),
        "t.csv.bz2": bz2.compress(plain),
        "t.csv.xz": lzma.compress(plain),
        "t.csv.zst": bytes(pyarrow.compress(plain, "zstd", asbytes=True)),
        "t.tsv": content.replace(",", "\t").encode(),
        "t.jsonl.gz": gzip.compress('{"text": "the café", "label": "1"}\n{"text": "a dog", "label": "0"}\n'.encode()),
        "t.json": '[{"text": "the café", "label": "1"},\n {"label": "0", "text": "a dog"}]'.encode(),
        "columns.json": '{\n"text": ["the café", "a dog"],\n"label": ["1", "0"]}'.encode(),
    }
    for name, raw in written.items():
        (tmp_path / name).write_bytes(raw)
        for columns in (None, Columns(("text",), "label")):
            rows = read(tmp_path / name, columns, told.append)
            assert list(rows["text"]) == ["the café", "a dog"], name
            assert list(rows["label"]) == ["1", "0"], name
    assert len(told) == 2
    assert "western.csv', line 2, column 8: byte 0xe9" in told[0]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features).to_parquet(tmp_path / "t.parquet")
    assert Labels.of(read(tmp_path / "t.parquet"), "label").names == ("no", "yes")
    categories = pyarrow.table({"text": ["a", "b"], "label": pyarrow.array(["x", "y"]).dictionary_encode()})
    pyarrow.parquet.write_table(categories, tmp_path / "pandas.parquet")
    assert list(read(tmp_path / "pandas.parquet", Columns(("text",), "label"))["label"]) == ["x", "y"]


def test_numbers_in_tables_stay_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\n007,1.0\n1.50,2.0\n")
    rows = read(tmp_path / "t.csv")
    assert list(rows["text"]) == ["007", "1.50"]
    assert Labels.of(rows, "label").names == ("1", "2")
    long = "word " * 60_000
    (tmp_path / "t.csv").write_text(f'text,label\n"{long}",1\n')
    assert rows.column_names == ["text", "label"]
    assert list(read(tmp_path / "t.csv")["text"]) == [long]


def test_a_separator_that_is_not_the_one_of_the_name(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("text,label\na,1\n")
    with pytest.raises(DataError, match=r"t\.tsv.*column 'text'.*commas"):
        read(tmp_path / "t.tsv", Columns(("text",)))


CELLS = [
    ("text", {"body": "the cat"}, "an object"),
    ("text", ["the", "cat"], r"a list .*--task token-classification"),
    ("text", None, "no text"),
    ("text", float("nan"), "no text"),
    ("text", True, "a truth value"),
    ("label", None, "no label"),
    ("label", "", "no label"),
    ("label", " ", "no label"),
    ("label", float("nan"), "no label"),
    ("label", float("inf"), "infinite"),
    ("label", {"a": 1}, "an object"),
    ("label", "x", "text.*line 1 holds a number"),
    ("label", True, "a truth value.*line 1 holds a number"),
    ("label", [1], "a number.*line 1 holds a number"),
    ("label", 10**30, "64 bits"),
    ("text", -(10**30), "64 bits"),
    ("text", "\ud800", "surrogate"),
]


def test_a_cell_that_is_not_what_its_column_is_for(tmp_path: Path) -> None:
    """The same in a file, where the message names the line, and in a table of the user's, where it names the row."""
    columns = Columns(("text",), "label")
    for column, value, message in CELLS:
        rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": 1, column: value}]
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
        with pytest.raises(DataError, match=rf"t\.jsonl', line 5, column '{column}': .*{message}"):
            read(tmp_path / "t.jsonl", columns)
    for cells in ([{"a": 1}], [["a", "b"]], [None], [True]):
        with pytest.raises(DataError, match="row 1, column 'text'"):
            Columns(("text",)).check(table(text=cells))


def test_labels_that_say_that_they_are_none(tmp_path: Path) -> None:
    columns = Columns(("text",), "label")
    for numbers in (("0.5", "1"), ("0", "1")):
        for missing in ("nan", "NaN", "-inf", "N/A", "null"):
            (tmp_path / "t.csv").write_text(f"text,label\na,{numbers[0]}\nb,{missing}\nc,{numbers[1]}\n")
            with pytest.raises(DataError, match=f"t.csv', line 3, column 'label': no label .*{missing}"):
                read(tmp_path / "t.csv", columns)
    for names in (("yes", "none", "no"), ("1", "none", "x"), ("NA", "nan", "NA")):
        (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"a,{name}\n" for name in names))
        assert tuple(read(tmp_path / "t.csv", columns)["label"]) == names


def test_a_document_of_columns_may_be_one_line(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"text": ["a", "b"], "label": [0, 1]}')
    assert read(tmp_path / "t.json", Columns(("text",), "label"))[1] == {"text": "b", "label": 1}
    (tmp_path / "t.json").write_text('{"version": 1, "data": [{"text": "a"}]}')
    with pytest.raises(DataError, match="no column 'text'; allowed: version, data"):
        read(tmp_path / "t.json", Columns(("text",)))


def test_no_column_is_read_twice() -> None:
    for columns in (Columns(("text", "text")), Columns(("text",), "text")):
        with pytest.raises(DataError, match="'text' is named twice"):
            columns.check(table(text=["a"]))


def test_a_missing_label_is_missing_in_every_format(tmp_path: Path) -> None:
    for name, content in {
        "t.csv": "text,label\nthe cat,1\na dog,0\nvery good,\n",
        "t.tsv": "text\tlabel\nthe cat\t1\na dog\t0\nvery good\t\n",
        "t.jsonl": '{}\n{"text": "the cat", "label": 1}\n{"text": "a dog", "label": 0}\n{"text": "very good"}\n'[3:],
    }.items():
        (tmp_path / name).write_text(content)
        line = 3 if name == "t.jsonl" else 4
        with pytest.raises(DataError, match=rf"{name}', line {line}, column 'label': no label"):
            read(tmp_path / name, Columns(("text",), "label"))
        with pytest.raises(DataError, match="row 3, column 'label': no label"):
            Labels.of(read(tmp_path / name), "label")


def test_columns_that_nothing_reads_may_hold_anything(tmp_path: Path) -> None:
    rows = [{"text": "a", "meta": {"x": 1}}, {"text": "b", "meta": [1, "y"]}, {"text": "c", "more": 2**80}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read(tmp_path / "t.jsonl", Columns(("text",)))["text"]) == ["a", "b", "c"]
    with pytest.raises(DataError, match="line 2, column 'meta'"):
        read(tmp_path / "t.jsonl")


@pytest.mark.parametrize(("name", "mark"), [("data.tsv", "\t"), ("data.csv", ",")])
def test_surplus_fields_do_not_shift_the_columns(tmp_path: Path, name: str, mark: str) -> None:
    (tmp_path / name).write_text(f"text{mark}label\none{mark}1{mark}\n\ntwo{mark}0{mark}\n  \n")
    rows = read(tmp_path / name)
    assert list(rows["text"]) == ["one", "two"]
    assert list(rows["label"]) == ["1", "0"]


@pytest.mark.parametrize("source", ["some-data", "a:b:c:d"])
def test_a_name_that_is_neither_a_file_nor_on_the_hub(source: str) -> None:
    with pytest.raises(DataError, match=r"file \(\.tsv, .*Hub"):
        read(source)


# Columns


def test_columns_that_are_there() -> None:
    rows = table(text=["a"], other=["b"], label=[1])
    Columns(("text",)).check(rows)
    Columns(("text", "other"), "label").check(rows)


@pytest.mark.parametrize("columns", [Columns(("txt",)), Columns(("text", "txt")), Columns(("text",), "txt")])
def test_a_missing_column_is_named_with_the_nearest(columns: Columns) -> None:
    with pytest.raises(DataError, match=r"train\.tsv .*column 'txt' .*'text'.*allowed: text, label"):
        columns.check(table(text=["a"], label=[1]), "train.tsv")


@pytest.mark.parametrize("count", [0, 3])
def test_one_or_two_texts(count: int) -> None:
    with pytest.raises(DataError, match=f"pairs; got {count}"):
        Columns(("text",) * count).check(table(text=["a"]))


# Labels


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([2, 10, 1, 2], ("1", "2", "10")),
        (["10", "9", "1"], ("1", "9", "10")),
        (["yes", "no"], ("no", "yes")),
        ([1.0, 0.0, 2.0], ("0", "1", "2")),
        ([-1, 1], ("-1", "1")),
        ([True, False], ("False", "True")),
        (["b", "3", "a"], ("3", "a", "b")),
    ],
)
def test_classes_are_in_natural_order(values: list, names: tuple[str, ...]) -> None:
    rows = table(label=values)
    labels = Labels.of(rows, "label")
    assert labels == Labels("classification", names)
    assert [names[i] for i in labels.ids(rows, "label")] == [
        str(int(v)) if isinstance(v, float) else str(v) for v in values
    ]


def test_class_labels_of_a_data_set_keep_their_order() -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["zebra", "ant"])})
    rows = datasets.Dataset.from_dict({"label": [1, 0, 1]}, features=features)
    labels = Labels.of(rows, "label")
    assert labels.names == ("zebra", "ant")
    assert labels.ids(rows, "label") == [1, 0, 1]
    assert labels.ids(table(label=["ant", "zebra"]), "label") == [1, 0]


def test_a_label_that_a_data_set_does_not_name(tokenizer: tf.PreTrainedTokenizerBase) -> None:
    """Test splits on the Hub number their classes -1: Python would take the last one."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    for value, message in ((-1, "no label"), (None, "no label"), (2, "label 2")):
        made = pyarrow.table({"text": ["w1", "w2"], "label": pyarrow.array([1, value], pyarrow.int64())})
        rows = datasets.Dataset(InMemoryTable(made.replace_schema_metadata(features.arrow_schema.metadata)))
        labels = Labels("classification", ("no", "yes"))
        columns = Columns(("text",), "label")
        uses = [
            functools.partial(Labels.of, rows, "label"),
            functools.partial(labels.ids, rows, "label"),
            functools.partial(encode, tokenizer, rows, columns, labels),
        ]
        for use in uses:
            with pytest.raises(DataError, match=f"row 2, column 'label': {message}"):
                use()


def test_several_labels_a_text() -> None:
    rows = table(text=["w1", "w2", "w3"], label=[["b", "a"], [], ["c"]])
    labels = Labels.of(rows, "label")
    assert labels == Labels("multi_label", ("a", "b", "c"))
    assert labels.ids(rows, "label") == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert Labels.of(table(label=[[2, 10], [1]]), "label").names == ("1", "2", "10")
    named = datasets.Features({"label": datasets.List(datasets.ClassLabel(names=["z", "a"]))})
    rows = datasets.Dataset.from_dict({"label": [[1], [0, 1]]}, named)
    assert Labels.of(rows, "label").names == ("z", "a")
    assert labels.ids(table(label=[["a"]]), "label") == [[1, 0, 0]]
    for other in ([["d"]], ["a"]):
        with pytest.raises(DataError, match="'d'" if other == [["d"]] else "multi-label"):
            labels.ids(table(label=other), "label")
    with pytest.raises(DataError, match=r"one label a text.*a list"):
        Labels("classification", ("a", "b")).ids(table(label=[["a"]]), "label")


def test_labels_of_words(tokenizer: tf.PreTrainedTokenizerBase, tmp_path: Path) -> None:
    columns = Columns(("words",), "tags", words=True)
    lines = [{"words": ["w1", "w2"], "tags": ["O", "B"]}, {"words": ["w3", "w4", "w5"], "tags": ["O", "O", "I"]}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read(tmp_path / "t.jsonl", columns)
    labels = Labels.of(rows, "tags", "tokens")
    assert labels == Labels("tokens", ("B", "I", "O"))
    data = encode(tokenizer, rows, columns, labels)
    assert list(data["labels"]) == [[-100, 2, 0, -100], [-100, 2, 2, 1, -100]]
    assert [list(batch["labels"].shape) for batch in batches(tokenizer, data)] == [[2, 5]]
    assert list(encode(tokenizer, rows, columns, labels, max_length=4)["labels"][1]) == [-100, 2, 2, -100]
    assert list(encode(tokenizer, rows, Columns(("words",), words=True))["length"]) == [4, 5]
    for text in ("w1 w2", ["w1", 2], [["w1"]]):
        with pytest.raises(DataError, match="row 1, column 'words': a list of words"):
            columns.check(table(words=[text] if text != ["w1", 2] else [[1, 2]], tags=[["O", "O"]]))
    with pytest.raises(DataError, match=r"row 1, column 'tags': 2 words.*label"):
        columns.check(table(words=[["w1", "w2"]], tags=["O"]))
    with pytest.raises(DataError, match=r"one text column.*got 2"):
        Columns(("words", "tags"), words=True).check(rows)
    (tmp_path / "t.jsonl").write_text(json.dumps({"words": ["w1", "w2"], "tags": ["O"]}) + "\n")
    with pytest.raises(DataError, match=r"line 1, column 'tags': 2 words.* 1 label"):
        read(tmp_path / "t.jsonl", columns)
    with pytest.raises(DataError, match=r"words.*a string"):
        encode(tokenizer, rows, columns, Labels("multi_label", ("B", "I", "O")))


def test_what_pads_texts(tmp_path: Path) -> None:
    tf.BertModel(tf.BertConfig(vocab_size=4, hidden_size=8, num_attention_heads=1)).save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2, "|": 3}, unk_token="?"))
    for names, expected in (({"unk_token": "?", "sep_token": "|"}, "|"), ({"unk_token": "?"}, "?"), ({}, None)):
        tf.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(tmp_path)
        if expected is None:
            with pytest.raises(ModelError, match="no token to pad"):
                load_tokenizer(tmp_path)
        else:
            assert load_tokenizer(tmp_path).pad_token == expected


def test_texts_without_tokens() -> None:
    words = Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    bare = tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]")
    assert list(encode(bare, table(text=["a", "", "b"]), Columns(("text",)))["length"]) == [1, 1]
    rows = table(text=["a", ""], label=["x", "y"])
    with pytest.raises(DataError, match=r"row 2: .*no token"):
        encode(bare, rows, Columns(("text",), "label"), Labels.of(rows, "label"))
    with pytest.raises(DataError, match="no text"):
        encode(bare, table(text=["", ""]), Columns(("text",)))


def test_decoders_read_the_text_one_token_late() -> None:
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    for name in ("bert", "whisper", "llama"):
        assert with_decoder_inputs(MODELS[name].build(), batch) == batch
    whole = MODELS["t5"].build()
    for model in (whole, tf.T5Model(whole.config)):
        made = with_decoder_inputs(model, batch)
        assert made["decoder_input_ids"].tolist() == [[0, 5, 6], [0, 8, 9]]
        assert made["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
        assert torch.isfinite(model(**made)[0]).all()
    assert with_decoder_inputs(tf.T5ForSequenceClassification(whole.config), batch) == batch
    sizes = {"vocab_size": 20, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    model = tf.BartModel(tf.BartConfig(**sizes))
    model.config.decoder_start_token_id = None
    with pytest.raises(DataError, match="decoder_start_token_id"):
        with_decoder_inputs(model, batch)


def test_fractions_mean_regression() -> None:
    assert Labels.of(table(label=["0.5", "1", "2.25"]), "label") == Labels("regression")
    assert Labels.of(table(label=["0.5", "1", "x"]), "label").names == ("1", "0.5", "x")
    rows = table(label=[0.5, 1.0, 2.0])
    labels = Labels.of(rows, "label")
    assert labels == Labels("regression")
    assert labels.ids(rows, "label") == [0.5, 1, 2]
    assert labels.ids(table(label=["1.5", "2"]), "label") == [1.5, 2]


def test_a_label_never_seen_in_training() -> None:
    labels = Labels.of(table(label=["a", "b"]), "label")
    with pytest.raises(DataError, match=r"\['d', 'c'\].*row 2.*\['a', 'b'\]"):
        labels.ids(table(label=["a", "d", "c"]), "label")


@pytest.mark.parametrize("values", [["x"], ["x", "x"], [1.0]])
def test_a_single_class(values: list) -> None:
    with pytest.raises(DataError, match="single label"):
        Labels.of(table(label=values), "label")


def test_a_row_without_a_label() -> None:
    for values in ([1, None, 0], ["a", "", "b"], [0.5, float("nan"), 1.0], [["a"], ["a", None], ["b"]]):
        with pytest.raises(DataError, match="row 2, column 'label': no label"):
            Labels.of(table(label=values), "label")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["x"], "numbers"),
        ([None], "no label"),
        ([float("nan")], "no label"),
        (["inf"], "finite"),
        ([True], "truth value"),
    ],
)
def test_regression_wants_numbers(values: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Labels("regression").ids(table(label=values), "label")


# Tokens and batches


def test_encode(tokenizer: tf.PreTrainedTokenizerBase) -> None:
    rows = table(text=["w1 w2", "w3"], label=["b", "a"])
    data = encode(tokenizer, rows, Columns(("text",), "label"), Labels.of(rows, "label"))
    assert [tokenizer.decode(ids) for ids in data["input_ids"]] == ["[CLS] w1 w2 [SEP]", "[CLS] w3 [SEP]"]
    assert list(data["labels"]) == [1, 0]
    assert list(data["length"]) == [4, 3]
    assert "labels" not in encode(tokenizer, rows, Columns(("text",))).column_names


def test_encode_pairs(tokenizer: tf.PreTrainedTokenizerBase) -> None:
    data = encode(tokenizer, table(a=["w1"], b=["w2 w3"]), Columns(("a", "b")))
    assert tokenizer.decode(data["input_ids"][0]) == "[CLS] w1 [SEP] w2 w3 [SEP]"
    assert data["token_type_ids"][0] == [0, 0, 0, 1, 1, 1]


def test_encode_cuts_long_texts(tokenizer: tf.PreTrainedTokenizerBase) -> None:
    data = encode(tokenizer, table(text=["w1 " * 50]), Columns(("text",)), max_length=10)
    assert list(data["length"]) == [10]


def test_encode_takes_numbers_for_texts(tokenizer: tf.PreTrainedTokenizerBase) -> None:
    assert len(encode(tokenizer, table(text=[1, 2]), Columns(("text",)))) == 2


def test_encode_checks_columns(tokenizer: tf.PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="column 'label'"):
        encode(tokenizer, table(text=["w1"]), Columns(("text",), "label"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=20), size=st.integers(1, 8))
def test_batches_hold_every_row_once(tokenizer: tf.PreTrainedTokenizerBase, lengths: list[int], size: int) -> None:
    texts = [" ".join(f"w{(row + i) % 60}" for i in range(length)) for row, length in enumerate(lengths)]
    data = encode(tokenizer, table(text=texts), Columns(("text",)))
    order, found = [], {}
    for rows, batch in indexed_batches(tokenizer, data, size):
        assert 1 <= len(rows) <= size
        assert batch["input_ids"].shape == (len(rows), max(data["length"][row] for row in rows))
        assert "length" not in batch
        order += rows
        for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
            found[row] = ids[mask.bool()].tolist()
    assert sorted(order) == list(range(len(texts)))
    assert [found[row] for row in range(len(texts))] == list(data["input_ids"])
    seen = [data["length"][row] for row in order]
    assert seen == sorted(seen, reverse=True)
    assert len(list(batches(tokenizer, data, size))) == -(-len(texts) // size)
    bounded = list(batches(tokenizer, data, size, 24))
    assert sum(len(batch["input_ids"]) for batch in bounded) == len(texts)
    assert all(len(batch["input_ids"]) == 1 or batch["input_ids"].numel() <= 24 for batch in bounded)


def test_batches_carry_labels(tokenizer: tf.PreTrainedTokenizerBase) -> None:
    for values, dtype in (([1, 0], torch.int64), ([0.5, 1.5], torch.float32)):
        rows = table(text=["w1", "w2 w3"], label=values)
        data = encode(tokenizer, rows, Columns(("text",), "label"), Labels.of(rows, "label"))
        (batch,) = batches(tokenizer, data)
        assert batch["labels"].dtype == dtype
        assert batch["labels"].tolist() == [values[1], values[0]]  # the longer text comes first


def test_samples_are_drawn_without_replacement() -> None:
    data = table(row=list(range(50)))
    drawn = sample(data, 20)["row"]
    assert len(set(drawn)) == 20
    assert list(sample(data, 20)["row"]) == list(drawn)
    assert list(sample(data, 20, seed=1)["row"]) != list(drawn)
    assert list(sample(data, 50)["row"]) == list(sample(data, 99)["row"]) == list(range(50))


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "columns", "rows", "classes"),
    [
        ("banking77/test.tsv", Columns(("text",), "label"), 3080, 77),
        ("sst2/dev.tsv", None, 872, 2),
        ("mrpc/test.tsv", None, 1725, 2),
    ],
)
def test_real_files(data: Path, name: str, columns: Columns | None, rows: int, classes: int) -> None:
    found = read(data / name)
    assert len(found) == rows
    label = columns.label if columns else "label"
    assert label is not None
    assert len(Labels.of(found, label).names) == classes
    assert len((data / name).read_text(encoding="utf-8").splitlines()) == rows + 1


@pytest.mark.parametrize("columns", [("a",), ("b", "a")])
def test_a_row_without_text(columns: tuple[str, ...], tokenizer: tf.PreTrainedTokenizerBase) -> None:
    rows = table(a=["w1", None, None], b=["w1", "w2", "w3"])
    with pytest.raises(DataError, match="row 2, column 'a': no text"):
        encode(tokenizer, rows, Columns(columns))


def test_whole_numbers_are_scores_on_demand() -> None:
    rows = table(label=[0, 5, 3])
    assert Labels.of(rows, "label").names == ("0", "3", "5")
    labels = Labels.of(rows, "label", "regression")
    assert labels == Labels("regression")
    assert labels.ids(rows, "label") == [0.0, 5.0, 3.0]
