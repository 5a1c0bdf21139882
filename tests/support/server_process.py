"""Server processes: forks of one process that has imported the server. With a Python path of its own a server starts as
it does for a user."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from tempfile import TemporaryFile
from typing import BinaryIO

from arbor_core.testing.forks import Forks, Process, forks

MODULES = (
    "arbor_core.cli.serve",
    "arbor_core.config.command_line",
    "arbor_core.config.compose",
    "arbor_core.application.system",
    "arbor_core.server.app",
    "arbor_core.server.http.serving",
    # what Litestar and uvicorn import when they begin
    "anyio._backends._asyncio",
    "litestar.exceptions.responses",
    "litestar.plugins.pydantic",
    "uvicorn.lifespan.on",
    "uvicorn.loops.asyncio",
)
SERVE = "from arbor_core.cli.serve import serve; serve()"
READ = ("ARBOR_SEGMENT_BYTES",)
"""Variables that the server reads while it is imported."""


def ran(*arguments: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """What a server says that ends by itself: it cannot start, or was asked for its configuration."""
    with TemporaryFile() as said, TemporaryFile() as errors:
        process = parent(os.environ).start(SERVE, arguments, env=os.environ, stdout=said, stderr=errors)
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
        texts = [(file.seek(0), file.read().decode())[1] for file in (said, errors)]
    return subprocess.CompletedProcess(arguments, code, *texts)


def start(arguments: Sequence[str], env: Mapping[str, str], errors: BinaryIO, before: str = "") -> Process:
    """A server process, whose standard output can be read.

    Args:
        errors: Its standard error.
        before: Python to run in it first.
    """
    if env.get("PYTHONPATH") != os.environ.get("PYTHONPATH"):
        assert not before
        command = [sys.executable, "-m", "arbor_core", "serve", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=env)
    return parent(env).start(f"{before}\n{SERVE}", arguments, env=env, stderr=errors)


def parent(env: Mapping[str, str]) -> Forks:
    """The process that has imported the server and its plugins."""
    plugins = [plugin.module for plugin in entry_points(group="arbor")]
    return forks((*MODULES, *plugins), env, READ)
