"""A text-classification task without a download: which part of the standard library is a docstring from?"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets

from factorformer.errors import DataError

MIN_CHARACTERS = 30
MAX_CHARACTERS = 300
TEST_FRACTION = 0.2

# Left out on purpose, so that the task depends on Python's version and little else:
# - tkinter, turtle, turtledemo, idlelib, ensurepip: some distributions ship them apart from Python itself;
# - distutils, lib2to3, asyncore, cgi, telnetlib and the others that Python 3.12 and 3.13 removed.
# A name with an underscore is where some versions keep the Python source of the public module.
GROUPS: dict[str, tuple[str, ...]] = {
    "asyncio": ("asyncio",),
    "codecs": ("codecs", "encodings", "base64", "quopri", "stringprep", "locale", "gettext"),
    "collections": (
        *("collections", "_collections_abc", "functools", "operator", "contextlib", "weakref", "_weakrefset"),
        *("heapq", "bisect", "copy", "copyreg", "graphlib", "reprlib", "contextvars"),
    ),
    "commands": (
        *("argparse", "optparse", "getopt", "cmd", "shlex", "getpass"),
        *("curses", "rlcompleter", "platform"),
    ),
    "compression": ("zipfile", "tarfile", "gzip", "bz2", "lzma", "_compression", "compression"),
    "concurrency": (
        *("threading", "_threading_local", "multiprocessing", "concurrent", "subprocess", "queue", "sched"),
        *("selectors", "signal"),
    ),
    "dates": ("datetime", "_pydatetime", "calendar", "_strptime", "zoneinfo"),
    "debugging": (
        *("bdb", "pdb", "trace", "traceback", "tracemalloc", "warnings"),
        *("profile", "profiling", "cProfile", "pstats", "timeit"),
    ),
    "files": (
        *("os", "pathlib", "posixpath", "ntpath", "genericpath", "shutil", "tempfile", "glob", "fnmatch"),
        *("filecmp", "fileinput", "stat", "io", "_pyio"),
    ),
    "formats": (
        *("json", "csv", "configparser", "pickle", "pickletools", "shelve", "dbm", "sqlite3", "plistlib"),
        *("tomllib", "wave", "mimetypes", "netrc"),
    ),
    "imports": (
        *("importlib", "pkgutil", "runpy", "zipimport", "zipapp", "modulefinder"),
        *("site", "sysconfig", "venv", "py_compile", "compileall"),
    ),
    "logging": ("logging",),
    "mail": ("email", "mailbox", "imaplib", "poplib", "smtplib"),
    "markup": ("xml", "html", "_markupbase"),
    "network": ("socket", "socketserver", "ssl", "ftplib", "ipaddress", "uuid", "hashlib", "hmac"),
    "numbers": (
        *("numbers", "decimal", "_pydecimal", "fractions"),
        *("statistics", "random", "secrets", "colorsys"),
    ),
    "sources": (
        *("ast", "_ast_unparse", "inspect", "dis", "opcode", "symtable", "pyclbr"),
        *("token", "tokenize", "tabnanny", "linecache", "pydoc", "code", "codeop"),
    ),
    "testing": ("unittest", "doctest"),
    "text": ("re", "sre_compile", "sre_parse", "string", "textwrap", "difflib", "pprint"),
    "types": ("typing", "types", "enum", "dataclasses", "abc", "_py_abc", "annotationlib", "ctypes"),
    "web": ("http", "urllib", "wsgiref", "xmlrpc", "webbrowser"),
}

_NAMES = {name for modules in GROUPS.values() for name in modules}
_NAMES |= {name.strip("_") for name in _NAMES} | set(GROUPS)
# `\b` keeps `io` out of `ratio`; the dot goes along in `email.Header` and stays at the end of a sentence.
_NAME = re.compile(rf"\b(?:{'|'.join(sorted(_NAMES))})\b(?:\.(?=\w))?", re.IGNORECASE)
_EXAMPLE = re.compile(r"^[ \t]*>>>.*", re.DOTALL | re.MULTILINE)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def stdlib_docstrings() -> dict[str, datasets.Dataset]:
    """Tell from a docstring of Python's standard library which group of modules (`GROUPS`) it belongs to.

    A text is the docstring of a module, class or function, without its doctest examples, on one line, cut at
    a word to at most `MAX_CHARACTERS`; shorter ones than `MIN_CHARACTERS` are left out. The names of all
    groups and of all their modules are removed from every text, whatever its label, because a docstring that
    names its own module would give the answer away; doing so without looking at the label leaves no trace of
    it in the gap either.

    Texts that differ only in case, digits, spaces or punctuation count as one. Of texts with the same label
    one is kept, and texts with more than one label are dropped, so nothing in the test part occurs in the
    training part. Both parts hold every label in the same proportion. Which text goes where, and the order of
    the rows, follow from a hash of the text: they depend on Python's version, which brings the texts, and on
    nothing else.

    Sources are parsed, never imported.

    Returns:
        The parts `train` and `test`, with the columns `text` and `label`.

    Raises:
        DataError: this Python has no standard-library sources to read.
    """
    rows = sorted(_labelled_texts(Path(sysconfig.get_paths()["stdlib"])), key=_draw)
    sizes, seen = Counter(label for _, label in rows), Counter[str]()
    parts: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for text, label in rows:
        seen[label] += 1
        held_out = min(max(1, round(sizes[label] * TEST_FRACTION)), sizes[label] - 1)
        parts["test" if seen[label] <= held_out else "train"].append({"text": text, "label": label})
    return {name: datasets.Dataset.from_list(part) for name, part in parts.items()}


def _draw(row: tuple[str, str]) -> bytes:
    """A pseudo-random sort key, fixed by its definition where `random.shuffle` could change with Python."""
    return hashlib.sha256(f"0\n{row[0]}".encode()).digest()


def _labelled_texts(stdlib: Path) -> list[tuple[str, str]]:
    """All texts with their labels, without repetitions and without texts that have several labels."""
    found: dict[str, dict[str, str]] = {}
    for label, modules in GROUPS.items():
        for module in modules:
            for source in _sources(stdlib, module):
                for docstring in _docstrings(source):
                    text = _clean(docstring)
                    if len(text) >= MIN_CHARACTERS:
                        found.setdefault(_identity(text), {}).setdefault(label, text)
    rows = [(text, label) for labels in found.values() if len(labels) == 1 for label, text in labels.items()]
    sizes = Counter(label for _, label in rows)
    if missing := [label for label in GROUPS if sizes[label] < 2]:
        raise DataError(
            f"no standard-library docstrings for {', '.join(missing)} in {stdlib}: this Python seems to come "
            "without the sources of its standard library (embedded, zipped or frozen builds do); run under a "
            "Python that has them, e.g. one from python.org, or use a data set of your own"
        )
    return rows


def _sources(stdlib: Path, module: str) -> list[Path]:
    """The source files of one top-level module or package, without its tests, in a fixed order."""
    package = stdlib / module
    files = [stdlib / f"{module}.py", *package.rglob("*.py")]
    inside = {file: file.relative_to(stdlib).as_posix() for file in files if file.is_file()}
    kept = [file for file, path in inside.items() if not {"test", "tests"} & set(path.split("/"))]
    return sorted(kept, key=inside.__getitem__)


def _docstrings(source: Path) -> Iterator[str]:
    """The docstrings of a source file."""
    with warnings.catch_warnings():
        # Newer Pythons warn of invalid escapes in string literals, which are not ours to mend.
        warnings.simplefilter("ignore")
        tree = ast.parse(source.read_bytes(), filename=str(source))
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node)):
            yield docstring


def _clean(docstring: str) -> str:
    r"""One line without doctest examples and without the names of the modules and groups, cut at a word.

    >>> _clean("Parse an email.\n\n>>> parse('x')\n'x'\n\nThe email.Header stays.")
    'Parse an . The Header stays.'
    """
    paragraphs = re.split(r"\n[ \t]*\n", docstring)
    text = "\n".join(_EXAMPLE.sub("", paragraph) for paragraph in paragraphs)
    text = " ".join(_NAME.sub("", text).split())
    if len(text) > MAX_CHARACTERS:
        text = text[: MAX_CHARACTERS + 1].rsplit(" ", 1)[0][:MAX_CHARACTERS]
    return text


def _identity(text: str) -> str:
    """What two texts must share to count as the same: their letters.

    >>> _identity("Codec for CP 037.") == _identity("codec for cp1250")
    True
    """
    return "".join(character for character in text.casefold() if character.isalpha())
