"""Every error that a user can cause or meet, so that one `except FactorformerError` catches them all."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable


class FactorformerError(ValueError):
    """Base of all errors raised on purpose; the command line prints its message and exits with code 2."""


class FactorformerWarning(UserWarning):
    """Something that a user should know, and that is no error; the command line prints it as one line."""


class MethodError(FactorformerError):
    """An unknown method, structure, scope or an unusable combination of options."""


class BudgetError(FactorformerError):
    """A byte budget that cannot be met; the message names the nearest that can."""


class ModelError(FactorformerError):
    """A model, layer or weight that cannot be factorized as asked."""


class DivergedError(ModelError):
    """A training whose loss became NaN or infinite."""


class DataError(FactorformerError):
    """Calibration, training or evaluation data that is missing, empty or malformed."""


class CheckpointError(FactorformerError):
    """A compressed model directory that is incomplete, corrupt or does not fit the model."""


class ExportError(FactorformerError):
    """A model that cannot be exported, or an exported file that does not compute what the model does."""


class OutputError(FactorformerError):
    """An output path that is taken, would cost other files, or cannot be written."""


class MissingPackageError(FactorformerError, ImportError):
    """A package that only some features need; the message says what to install."""


EXTRAS = {
    "cli": ("rich", "typer"),
    "train": ("accelerate", "datasets", "filelock", "scipy", "sklearn", "tokenizers"),
    "onnx": ("onnx", "onnx_ir", "onnxruntime", "onnxscript"),
    "openvino": ("openvino", "nncf"),
    "plot": ("matplotlib",),
    "sentence": ("sentence_transformers",),
    "translation": ("sacrebleu",),
}
"""Names of modules, by the optional dependencies in pyproject.toml that bring them."""


def require(extra: str) -> None:
    """Raise `MissingPackageError` if a module of an extra is not installed."""
    for name in EXTRAS[extra]:
        if importlib.util.find_spec(name) is None:
            raise missing(name)


def missing(module: str) -> MissingPackageError:
    """The error for a module that is not installed.

    >>> print(missing("typer"))
    this needs the package 'typer': pip install 'factorformer[cli]'
    """
    package, extra = module.partition(".")[0], extra_of(module)
    wanted = package if extra is None else f"'factorformer[{extra}]'"
    return MissingPackageError(f"this needs the package '{package}': pip install {wanted}")


def extra_of(module: str) -> str | None:
    """The extra that brings a module; None where none does."""
    return next((extra for extra, names in EXTRAS.items() if module.partition(".")[0] in names), None)


LONGEST = 500
"""Characters of another package's message that are passed on."""


def one_of(given: str, allowed: Iterable[str]) -> str:
    """Describe a wrong choice: what was given, the nearest allowed name, and all allowed names.

    >>> one_of("svdd", ["svd", "fwsvd"])
    "'svdd' (did you mean 'svd'?); allowed: svd, fwsvd"
    """
    names = list(allowed)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    return f"'{given}'{hint}; allowed: {', '.join(names)}"


def one_line(error: BaseException) -> str:
    """The message of another package's error on one line, cut off where it goes on for pages.

    >>> one_line(RuntimeError("cannot load:\\n  no such file"))
    'cannot load: no such file'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST or isinstance(error, FactorformerError) else f"{text[:LONGEST]}..."
