"""Files of rows: CSV, TSV, JSON, plain text; compressed or not. Every error names the file, the line and the place."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow

from factorformer.errors import DataError, one_line

TEXT_FORMATS = (".tsv", ".csv", ".jsonl", ".json", ".txt")
COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BytesIO(pyarrow.input_stream(str(path), compression="zstd").read()),
}
CONTAINERS = {b"\x1f\x8b": "gzip (.gz)", b"PK\x03\x04": "ZIP or an Excel workbook", b"PAR1": "Parquet (.parquet)"}
"""How files begin that are no text, whatever their name says."""

SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}

_PUNCTUATION = frozenset("“”‘’‚„–—…•€£§°«»©®™¿¡\xa0")
_ELSEWHERE = frozenset("ðþýÐÞÝªº")
"""Letters of Windows-1252 that, in the bytes of a stranger, more often stand for others (Turkish, Czech)."""


class Rows(NamedTuple):
    """The columns of a file.

    Args:
        names: of all columns, in order.
        columns: cells of those that were asked for; None where a row lacks one.
        lines: where each row begins, counted from 1; empty if rows are not on lines of their own.
    """

    names: list[str]
    columns: dict[str, list[Any]]
    lines: array[int] | range

    def where(self, row: int) -> str:
        """The place of a row in the file, as a person finds it."""
        return f"line {self.lines[row]}" if len(self.lines) else f"row {row + 1}"


def text_format(path: Path) -> str | None:
    """The suffix that tells how a file is read, that of compression aside; None if it is not one of `TEXT_FORMATS`."""
    name = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower() if name.suffix.lower() in TEXT_FORMATS else None


def check_file(path: Path) -> None:
    """Raise `DataError` unless there is a file with something in it."""
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "a pipe, a socket or a device, which cannot be read twice"
        raise DataError(f"'{path}' is {kind}: give the name of a file")
    if not path.is_file():
        raise DataError(f"no such data file: '{path}'")
    if path.stat().st_size == 0:
        raise DataError(f"'{path}' is empty")


def read_rows(path: Path, wanted: Iterable[str] | None, note: Callable[[str], None]) -> Rows:
    """Rows of a text file. Cells of CSV and TSV stay the strings that they are; empty lines of plain text are no rows.

    Args:
        path: ends in one of `TEXT_FORMATS`, maybe followed by one of `COMPRESSED`.
        wanted: columns to keep; None for all.
        note: told if the encoding had to be guessed.

    Raises:
        DataError: a byte, quote or bracket that does not belong where it stands, or rows of different lengths; the
            message names line and column.
    """
    kind, kept = text_format(path), None if wanted is None else frozenset(wanted)
    with _decoded(path, note, "" if kind in (".csv", ".tsv") else None) as text:
        if kind in (".csv", ".tsv"):
            return _read_table(path, text, tabs=kind == ".tsv", wanted=kept)
        if kind == ".txt":
            lines = {number: line.removesuffix("\n") for number, line in enumerate(text, 1) if line.strip()}
            if not lines:
                raise DataError(f"'{path}' has no text: every line is empty")
            return Rows(["text"], {"text": list(lines.values())}, array("q", lines))
        return _read_json(path, text, kept)


def read_lines(path: Path, note: Callable[[str], None]) -> list[str]:
    """Lines of a text file, whatever its name ends in, without their ends; `note` and errors as in `read_rows`.

    Only a newline ends a line: other separators of Unicode may stand inside a sentence.
    """
    check_file(path)
    with _decoded(path, note, "\n") as text:
        return [line.rstrip("\r\n") for line in text]


@contextlib.contextmanager
def _decoded(path: Path, note: Callable[[str], None], newline: str | None) -> Iterator[io.TextIOWrapper]:
    """The text of a file, decompressed and decoded."""
    encoding = _encoding(path, note)
    with _opened(path) as raw, io.TextIOWrapper(raw, encoding, newline=newline) as text:
        try:
            yield text
        except UnicodeDecodeError as error:  # only UTF-16 and UTF-32 come here: the others were checked
            raise DataError(f"'{path}' is not valid {encoding.upper()}: {error}: save it as UTF-8") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed."""
    damaged = (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
    try:
        with COMPRESSED.get(path.suffix.lower(), lambda path: path.open("rb"))(path) as stream:
            yield stream
    except damaged as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise DataError(f"cannot read '{path}': {reason}") from error


# Encodings


def _encoding(path: Path, note: Callable[[str], None]) -> str:
    """UTF-8; what a byte-order mark says; or Windows-1252, if all that is not ASCII reads as Western words in it."""
    with _opened(path) as stream:
        start = stream.read(4)
    for marks, name in (((b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "utf-32"), ((b"\xff\xfe", b"\xfe\xff"), "utf-16")):
        if start.startswith(marks):
            return name
    for mark, name in CONTAINERS.items():
        if start.startswith(mark):
            raise DataError(f"'{path}' is not text but {name}: give it the name of what it is, or save it as CSV")
    bad, western = None, True
    with _opened(path) as stream:
        offset = len(stream.read(len(codecs.BOM_UTF8))) if start.startswith(codecs.BOM_UTF8) else 0
        for number, line in enumerate(stream, 1):
            if b"\0" in line:
                column = line.index(b"\0") + 1
                raise DataError(
                    f"'{path}', line {number}, column {column}: a zero byte (at offset {offset + column - 1}): is this "
                    "UTF-16? Save the file as UTF-8"
                )
            if not line.isascii():
                try:
                    line.decode("utf-8")
                    western = False  # it is UTF-8, but for a bad byte elsewhere
                except UnicodeDecodeError as error:
                    column = len(line[: error.start].decode("utf-8")) + 1
                    bad = bad or (number, column, line[error.start], offset + error.start)
                    western = western and _is_western(line)
            offset += len(line)
    if bad is None:
        return "utf-8-sig"
    place = f"'{path}', line {bad[0]}, column {bad[1]}: byte 0x{bad[2]:02x} (at offset {bad[3]}) is not UTF-8"
    if not western:
        raise DataError(f"{place}: save the file as UTF-8")
    note(f"{place}: read as Windows-1252; if letters come out wrong, save the file as UTF-8")
    return "cp1252"


def _is_western(line: bytes) -> bool:
    """Whether a line reads as Windows-1252: accented letters and typographic marks among twice as many plain ones."""
    try:
        text = line.decode("cp1252")
    except UnicodeDecodeError:
        return False
    others = [character for character in text if not character.isascii()]
    plain = sum(character.isascii() and character.isalpha() for character in text)
    fit = all(c in _PUNCTUATION or (c.isalpha() and c not in _ELSEWHERE) for c in others)
    return fit and 2 * len(others) <= plain


# Tables


def separator_of(header: str) -> str | None:
    """What else than a comma separates the names of a header; None if nothing does."""
    if "," in header:
        return None
    return next((mark for mark in SEPARATORS if mark in header), None)


def _read_table(path: Path, stream: Iterable[str], tabs: bool, wanted: frozenset[str] | None) -> Rows:
    """Without quoting if tabs separate: there a quote in a sentence is a quote."""
    lines = iter(stream)
    blank = 0
    for first in lines:
        if first.strip():
            break
        blank += 1
    else:
        raise DataError(f"'{path}' has no rows")
    separator = "\t" if tabs else separator_of(first) or ","
    quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    reader = csv.reader(itertools.chain([first], lines), delimiter=separator, quoting=quoting, strict=True)
    records = _records(path, reader, blank)
    names = [name or f"Unnamed: {i}" for i, name in enumerate(next(records)[1])]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"'{path}', line {blank + 1}: two columns are named '{twice}'")
    kept = [(i, name) for i, name in enumerate(names) if wanted is None or name in wanted]
    columns: dict[str, list[Any]] = {name: [] for _, name in kept}
    starts = array("Q")
    for line, record in records:
        if len(record) == 1 < len(names) and not record[0].strip():
            continue  # a line of spaces
        if any(record[len(names) :]) or len(record) < len(names):
            mark = SEPARATORS[separator]
            advice = "" if tabs else f"; texts that hold {mark} or line breaks are to be quoted"
            raise DataError(
                f"'{path}', line {line}: {_count(len(record), 'field')}, but the header names "
                f"{_count(len(names), 'column')} (separated by {mark}){advice}"
            )
        for i, name in kept:
            columns[name].append(record[i])
        starts.append(line)
    return Rows(names, columns, starts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _records(path: Path, reader: Any, blank: int) -> Iterator[tuple[int, list[str]]]:
    """Records with the line on which each begins."""
    limit = csv.field_size_limit(2**31 - 1)  # texts may be longer than 128 KiB
    try:
        while True:
            line = blank + reader.line_num + 1
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(
                    f"'{path}', line {line}: quotes that do not match ({error}, before line {blank + reader.line_num}"
                    ' ends): a text in quotes holds quotes twice, "", and ends before a separator'
                ) from error
            if record:
                yield line, record
    finally:
        csv.field_size_limit(limit)


# JSON


def _read_json(path: Path, stream: io.TextIOWrapper, wanted: frozenset[str] | None) -> Rows:
    """One object a line, an array of objects, or an object of columns."""
    builder = _Columns(path, wanted)
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except ValueError as error:
            if builder.count == 0:  # perhaps one document over many lines
                return _read_document(path, line + stream.read(), number - 1, wanted)
            raise _malformed(path, error, number - 1) from error
        if builder.count == 0 and (isinstance(row, list) or (text_format(path) == ".json" and _is_columns(row))):
            return _read_document(path, line + stream.read(), number - 1, wanted)
        builder.add(row, f"line {number}", number)
    return builder.rows()


def _read_document(path: Path, text: str, before: int, wanted: frozenset[str] | None) -> Rows:
    try:
        content = _parsed(text)
    except ValueError as error:
        raise _malformed(path, error, before) from error
    if _is_columns(content):
        if len({len(column) for column in content.values()}) > 1:
            sizes = ", ".join(f"'{name}' {len(column)}" for name, column in content.items())
            raise DataError(f"'{path}' holds columns of different lengths: {sizes}")
        kept = {name: column for name, column in content.items() if wanted is None or name in wanted}
        return Rows(list(content), kept, range(0))
    builder = _Columns(path, wanted)
    for number, row in enumerate(content if isinstance(content, list) else [content], 1):
        builder.add(row, f"row {number}", None)
    return builder.rows()


def _is_columns(content: Any) -> bool:
    return isinstance(content, dict) and bool(content) and all(isinstance(column, list) for column in content.values())


def _parsed(text: str) -> Any:
    """What a JSON text says; `ValueError` if it is none, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _malformed(path: Path, error: ValueError, before: int) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        place = f"line {before + error.lineno}, column {error.colno}"
        return DataError(f"'{path}', {place}: not JSON: {error.msg}")
    return DataError(f"'{path}', line {before + 1}: not JSON: {error}")


class _Columns:
    """Columns of objects that need not all have the same keys."""

    def __init__(self, path: Path, wanted: frozenset[str] | None) -> None:
        self.path, self.wanted = path, wanted
        self.names: dict[str, None] = {}
        self.columns: dict[str, list[Any]] = {}
        self.lines = array("Q")
        self.count = 0

    def add(self, row: Any, place: str, line: int | None) -> None:
        if not isinstance(row, dict):
            raise DataError(f"'{self.path}', {place}: an object of columns belongs here, not {described(row)}")
        for name, value in row.items():
            self.names.setdefault(name)
            if self.wanted is None or name in self.wanted:
                column = self.columns.setdefault(name, [])
                column.extend([None] * (self.count - len(column)))
                column.append(value)
        self.count += 1
        if line is not None:
            self.lines.append(line)

    def rows(self) -> Rows:
        for column in self.columns.values():
            column.extend([None] * (self.count - len(column)))
        return Rows(list(self.names), self.columns, self.lines)


def kind_of(value: object) -> str:
    """The type of a cell, for messages."""
    kinds = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "nothing" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def described(value: object) -> str:
    """The type of a cell, and its value if that is short, for messages."""
    if value is None:
        return kind_of(value)
    shown = json.dumps(value, default=str, ensure_ascii=False)
    return f"{kind_of(value)} ({shown if len(shown) <= 40 else shown[:37] + '...'})"
