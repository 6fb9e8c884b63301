"""README and docs: tables match the results, links lead somewhere, commands and snippets are of this version."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import re
import shlex
import sys
from types import ModuleType

import pytest
import typer
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACEHOLDERS = ("DIR", "COMMAND", "FILE")
WORDS = re.compile(
    r"\b(at once|by turns|in turns|spread out|multiplied out|dearer|of ours|contestants?|starved?|healed|starts? anew|"
    r"at the begin of|earlier form|is told|for people)\b",
    re.IGNORECASE,
)
"""Words for which the field has a standard term: before fine-tuning, jointly, interleaved, materialized, ..."""


@functools.cache
def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_match_the_results() -> None:
    render = benchmark("render")
    stale = {path.name: names for path in render.PAGES if (names := render.render(path.read_text())[1])}
    assert not stale, "run `python benchmarks/render.py`"


def test_an_edited_figure_is_stale_and_is_written_again() -> None:
    render = benchmark("render")
    page = (ROOT / "docs" / "results.md").read_text()
    edited = page.replace("| 41.33 |", "| 51.33 |")
    assert edited != page
    assert render.render(edited) == (page, ["translation"])


def test_terms_of_the_field() -> None:
    assert not {page.name: found for page in PAGES if (found := WORDS.findall(page.read_text()))}


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text())):
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
                broken.append(f"{page.name}: {target}")
    assert not broken


def commands() -> list[tuple[str, list[str]]]:
    """Every `factorformer ...` in a code block, continued lines joined and comments dropped."""
    found = []
    for page in PAGES:
        text = page.read_text()
        blocks = [block for language, block in FENCED.findall(text) if language != "python"]
        blocks += [line + "\n" for line in FENCED.sub("", text).splitlines() if line.startswith("    ")]
        for line in "".join(blocks).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if line.strip().startswith("factorformer ") else []
            if words and not set(words) & set(PLACEHOLDERS):
                found.append((page.name, words[1:]))
    return found


def test_commands() -> None:
    from factorformer.cli.app import app

    known = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    wrong, found = [], commands()
    for page, (name, *arguments) in found:
        try:
            known[name].make_context(name, arguments)
        except Exception as error:  # typer may bring a click of its own, whose errors are other classes
            wrong.append(f"{page}: {name} {' '.join(arguments)}: {error!r}")
    assert not wrong
    assert len(found) > 20


def snippets() -> list[tuple[str, str]]:
    return [(page.name, code) for page in PAGES for name, code in FENCED.findall(page.read_text()) if name == "python"]


def is_there(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name) or bool(importlib.import_module(f"{module}.{name}"))
    except ImportError:
        return False


def absent(code: str) -> list[str]:
    """What code imports or takes from the package, and is not there."""
    wanted = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "factorformer":
            wanted += [(str(node.module), alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "factorformer":
            wanted.append(("factorformer", node.attr))
    return [f"{module}.{name}" for module, name in wanted if not is_there(module, name)]


def test_snippets() -> None:
    wrong = {page: names for page, code in snippets() if (names := absent(code))}
    assert not wrong


def test_scripts_import_what_is_there() -> None:
    files = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")]
    wrong = {file.name: names for file in files if (names := absent(file.read_text()))}
    assert not wrong


def test_benchmarks_refuse_uncommitted_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    common = benchmark("common")
    parser = common.options("a benchmark", "nothing.json")
    monkeypatch.setattr("sys.argv", ["benchmark"])
    monkeypatch.setattr(common, "commit", lambda: "0123456789-dirty")
    monkeypatch.setattr(common, "changes", lambda: ["src/factorformer/recipes.py"])
    with pytest.raises(SystemExit, match=r"recipes\.py"):
        common.start(parser)
    monkeypatch.setattr("sys.argv", ["benchmark", "--allow-dirty"])
    assert common.start(parser).output == common.RESULTS / "nothing.json"
