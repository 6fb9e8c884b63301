"""All subcommands in one application, and what happens to their errors."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

from factorformer import processes
from factorformer.cli._given import given
from factorformer.cli._notes import notes
from factorformer.cli._options import quiet
from factorformer.cli.bench import bench
from factorformer.cli.compress import compress
from factorformer.cli.evaluate import evaluate
from factorformer.cli.export import export
from factorformer.cli.finetune import finetune
from factorformer.cli.inspect import inspect as inspect_
from factorformer.cli.methods import methods
from factorformer.cli.plan import plan
from factorformer.cli.quickstart import quickstart
from factorformer.cli.report import report
from factorformer.cli.train import train
from factorformer.errors import FactorformerError, MethodError
from factorformer.hf.trust import trusting

DIVIDED = ("plan", "compress")
"""Commands that several processes do together."""

PATIENCE = 3.0
"""Seconds before another process than the first tells of an error: one that all have met ends it meanwhile."""

ERROR, INTERRUPTED = 2, 130
"""Exit codes; usage errors have code 2 as well."""


class Commands(TyperGroup):
    """Subcommands whose expected errors are one line on standard error, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen subcommand."""
        try:
            return super().invoke(ctx)
        except (FactorformerError, OSError, SafetensorError) as error:
            # A full disk is an OSError from Python, and a SafetensorError from the writer of weights.
            if not processes.is_first():
                time.sleep(PATIENCE)
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(ERROR) from error
        except KeyboardInterrupt as error:
            if processes.is_first():
                typer.echo(f"interrupted; {str(error) or 'nothing was written'}", err=True)
            raise typer.Exit(INTERRUPTED) from error


app = typer.Typer(
    cls=Commands,
    name="factorformer",
    help="Make Transformers small and fast by storing every weight matrix in factorized form.\n\n"
    "A compressed model is an ordinary Hugging Face model directory: after `import factorformer` plain "
    "`AutoModel.from_pretrained`, `pipeline` and `SentenceTransformer` load it.",
    epilog="Start with: factorformer quickstart",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _page(docstring: str) -> str:
    """A docstring as a help text: lines of a paragraph are joined, but for those below a backspace character."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return "\n\n".join(text if text.startswith("\b") else " ".join(text.split()) for text in paragraphs)


TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Execute Python code that a model directory brings. Read it first."),
]


def _given(context: Any) -> dict[str, str]:
    """The parameters that were given on the command line, and how a user writes each."""
    names = {parameter.name: parameter for parameter in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    return {
        name: "/".join([parameter.opts[0], *parameter.secondary_opts])
        if parameter.opts[0].startswith("-")
        else parameter.metavar or name
        for name, parameter in names.items()
        if sources[name] is not None and sources[name].name == "COMMANDLINE"
    }


def _prepared(command: Callable[..., None]) -> Callable[..., None]:
    """The same subcommand without transformers' messages, with warnings of ours as notes, and an option to trust code.

    Not around help pages, which do not wait for transformers.
    """
    signature = inspect.signature(command, eval_str=True)
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [*signature.parameters.values(), context]
    if "model" in signature.parameters:
        trust = inspect.Parameter(
            "trust_remote_code", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=TrustRemoteCode
        )
        parameters.append(trust)

    @functools.wraps(command)
    def run(context: Any, trust_remote_code: bool = False, **options: Any) -> None:
        written = _given(context)
        for name, option in written.items():
            value = options.get(name)
            if value == "" or (isinstance(value, list) and "" in value):
                raise MethodError(f"{option} is empty: give a value, or leave it out")
        if processes.started() > 1 and command.__name__ not in DIVIDED:
            raise MethodError(
                f"'{command.__name__}' is done by one process, and {processes.started()} were started: those of "
                f"torchrun divide {' and '.join(DIVIDED)}"
            )
        with processes.joined(), trusting(trust_remote_code), quiet(), notes(), given(written):
            command(**options)

    run.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


for command in (compress, train, finetune, evaluate, export, bench, inspect_, report, plan, methods, quickstart):
    app.command(help=_page(command.__doc__ or ""))(_prepared(command))
