"""The command `factorformer`."""

from __future__ import annotations

import os
import signal
import sys
import warnings

from factorformer.errors import extra_of, missing


def main() -> None:
    """Run the command line; the exit code is 0, 2 after an error, 130 after Ctrl-C or a signal to terminate."""
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        # Warnings of other packages are for programmers; each command prints ours as notes.
        warnings.simplefilter("ignore")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("DATASETS_VERBOSITY", "error")
        from factorformer.cli.app import app

        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name is None or extra_of(error.name) is None:
            raise
        print(f"error: {missing(error.name)}", file=sys.stderr)
        sys.exit(2)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt  # as Ctrl-C does: what is half written is deleted, what can go on is kept
