"""Reads a job's files row by row, before the job is queued: `python -m arbor_core.validate <job.json>`.

A process of its own with limits on memory and time, because the rows are a stranger's. Says what it found as one JSON
object on standard output.
"""

from __future__ import annotations

import asyncio
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import msgspec

from .data import MAX_REPORTED, RowError, excerpt, parse_lines, require_rows
from .environment import clean_env
from .logs import decode
from .papers import WorkOrder, imported
from .prctl import PR_SET_PDEATHSIG, prctl
from .types import JobFailed

VALIDATORS = 2
"""Files that are checked at the same time."""
REMEMBERED = 1000
MEMORY_BYTES = 4 << 30
CPU_SECONDS = 3600
TRIES = 3


class Report(msgspec.Struct):
    """What the validator found."""

    rows: dict[str, int] = msgspec.field(default_factory=dict)
    warnings: list[str] = msgspec.field(default_factory=list)
    error: dict[str, Any] | None = None


class Validators:
    """Checks files, a few at a time. Stored files never change: those that were found good are not read again."""

    def __init__(self) -> None:
        self.turns = asyncio.Semaphore(VALIDATORS)
        self.good: dict[Hashable, Report] = {}

    async def report(self, job_json: Path, python: str, what: Hashable) -> Report:
        """Check the files of a job; `what` names the files and how they are checked."""
        if what in self.good:
            return self.good[what]
        async with self.turns:
            report = self.good.get(what) or await validate(job_json, python)
        if not report.error:
            self.good[what] = report
            if len(self.good) > REMEMBERED:
                del self.good[next(iter(self.good))]
        return report


async def validate(job_json: Path, python: str) -> Report:
    """Run the validator on a job's papers; one that is killed is no fault of the files and runs again."""
    for _ in range(TRIES):
        code, output, errors = await _validator(job_json, python)
        if code == 0:
            return msgspec.json.decode(output, type=Report)
        if code != -signal.SIGKILL:
            break
    said = errors.decode(errors="replace").strip().splitlines()
    reason = said[-1] if said else f"it ended with status {code}"
    return Report(error={"code": "invalid_training_file", "message": f"The files could not be checked: {reason}"})


async def _validator(job_json: Path, python: str) -> tuple[int | None, bytes, bytes]:
    """Exit status, output and errors of one run."""
    process = await asyncio.create_subprocess_exec(
        python,
        "-m",
        "arbor_core.validate",
        str(job_json),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean_env(),
    )
    try:
        output, errors = await process.communicate()
    except asyncio.CancelledError:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    return process.returncode, output, errors


def check(order: WorkOrder) -> Report:
    """Check both files against what the trainer accepts."""
    report = Report()
    check_row: Callable[[dict[str, Any]], None] = imported(order.check_row)
    files = [("training_file", order.training_file, order.min_rows)]
    if order.validation_file:
        files.append(("validation_file", order.validation_file, 1))
    try:
        for param, path, minimum in files:
            report.rows[param] = check_file(path, param, check_row, report.warnings)
            require_rows(report.rows[param], minimum, param)
    except JobFailed as error:
        report.error = {"code": error.code, "message": str(error), "param": error.param}
    return report


def check_file(path: Path, param: str, check_row: Callable[[dict[str, Any]], None], warnings: list[str]) -> int:
    """Count the rows of a file.

    Raises:
        JobFailed: `invalid_<param>` with the first `MAX_REPORTED` lines that cannot be used.
    """
    seen: Counter[str] = Counter()
    first: dict[str, int] = {}

    def warn(line: int, reason: str) -> None:
        seen[reason] += 1
        first.setdefault(reason, line)

    count, faults = 0, []
    for line, row in parse_lines(path, warn):
        if isinstance(row, RowError):
            faults.append(str(row))
        else:
            count += 1
            try:
                check_row(row)
            except ValueError as error:
                faults.append(str(RowError(line, str(error), excerpt(msgspec.json.encode(row)))))
        if len(faults) >= MAX_REPORTED:
            break
    warnings += [f"{param}: {why} ({n} time(s), first at line {first[why]})" for why, n in seen.items()]
    if faults:
        more = f" (the first {MAX_REPORTED} are shown)" if len(faults) >= MAX_REPORTED else ""
        raise JobFailed(
            f"{len(faults)} line(s) of the {param.replace('_', ' ')} cannot be used{more}: " + "; ".join(faults),
            code=f"invalid_{param}",
            param=param,
        )
    return count


def main(job_json: Path) -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # without the server nobody wants to know
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 60))  # SIGXCPU, which is no SIGKILL
    report = check(decode(job_json.read_bytes(), WorkOrder))
    sys.stdout.write(msgspec.json.encode(report).decode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
