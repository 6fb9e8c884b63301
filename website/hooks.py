"""What the site has beside the pages of docs/: the commands and the public names, as they are in the code, and files
that pages link to from outside of docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages of the repository, and their names in the site."""

OUTSIDE = re.compile(r"\]\((\.\./)?(?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
"""A link to a file, from the folder docs/ or beside it."""


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add pages that are made, and files that others link to."""
    for name, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, "commands.md", content=commands()))
    files.append(File.generated(config, "api.md", content=api()))
    linked = set()
    for page in (ROOT / "docs").glob("*.md"):
        for above, name, _anchor in OUTSIDE.findall(page.read_text(encoding="utf-8")):
            if above and name not in PAGES and (ROOT / name).is_file() and not name.endswith(".md"):
                linked.add(name)
    for name in sorted(linked):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to where a file is in the site."""
    outside = page.file.src_uri in PAGES.values()

    def moved(match: re.Match[str]) -> str:
        above, name, anchor = match[1] or "", match[2], match[3] or ""
        if outside:
            name = name.removeprefix("docs/") if name.startswith("docs/") else PAGES.get(name, name)
            known = (name.endswith((".md", ".svg")) and (ROOT / "docs" / name).exists()) or name in PAGES.values()
            return f"]({name}{anchor})" if known else "](#)"
        if not above:
            return match[0]
        if name == "README.md":
            return "](index.md)"
        if (ROOT / name).is_dir():
            return "](results.md)"
        return f"]({PAGES.get(name, name)}{anchor})"

    return OUTSIDE.sub(moved, markdown)


def commands() -> str:
    """Every command, from the code."""
    from factorformer.cli.app import app

    group: Any = typer.main.get_command(app)
    parts = ["# Commands", "`factorformer COMMAND --help` prints the same."]
    for name, command in group.commands.items():
        parts.append(f"## factorformer {name}")
        parts.append(_text(command.help or ""))
        rows = [_parameter(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
        parts.append("\n".join(["| option | meaning |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _text(text: str) -> str:
    """A help text in Markdown: examples become blocks of code."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("\b"):
            lines = [line for line in paragraph.splitlines()[1:] if "[bold]" not in line]
            paragraphs.append("```\n" + "\n".join(line.removeprefix("  ") for line in lines) + "\n```")
        else:
            paragraphs.append(paragraph.replace("[bold]", "**").replace("[/bold]", "**").replace("<", "&lt;"))
    return "\n\n".join(paragraphs)


def _parameter(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if parameter.param_type_name == "argument":
        names = f"`{parameter.metavar or parameter.name}`"
    elif parameter.metavar:
        names += f" {parameter.metavar}"
    text = " ".join((getattr(parameter, "help", "") or "").split()).replace("|", "\\|").replace("<", "&lt;")
    return f"| {names} | {text} |"


def api() -> str:
    """The public names."""
    import factorformer

    parts = ["# Python", "Everything that is public, in the order of the alphabet."]
    parts += [f"::: {home_of(name)}" for name in factorformer.__all__ if not name.startswith("_")]
    return "\n\n".join(parts) + "\n"


def home_of(name: str) -> str:
    """Where a public name is defined, which is what is read."""
    import factorformer

    value = getattr(factorformer, name)
    return f"{value.__module__}.{value.__qualname__}"
