"""Programs in processes of their own, which begin with some packages imported: that takes most of their time.

Each is a fork of an interpreter that has imported these packages and done nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

SERVER = """
import atexit, json, os, sys, traceback, warnings
warnings.simplefilter("ignore")
{preparation}
warnings.resetwarnings()

def run(job):
    for place, file in enumerate(job["files"], 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), place)
    sys.argv = ["-c", *job["arguments"]]
    status = 0
    try:
        exec(compile(job["code"], "<string>", "exec"), {{"__name__": "__main__"}})
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Interpreter:
    """Runs programs, each in a fork of one process.

    Args:
        preparation: what that has done before, such as imports.
        environment: of all programs, beside what is inherited.
    """

    def __init__(self, preparation: str, **environment: str) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER.format(preparation=preparation)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._server.communicate()
        self._folder.cleanup()

    def run(self, code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
        """What becomes of a program with these arguments."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        files = [str(Path(self._folder.name, name)) for name in ("out", "err")]
        job = {"code": code, "arguments": [*map(str, arguments)], "files": files}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        status = self._server.stdout.readline()
        assert status, "the interpreter did not outlast its preparation"
        return subprocess.CompletedProcess([], int(status), *(Path(file).read_text() for file in files))
