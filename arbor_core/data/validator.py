"""Reads a job's files row by row, before the job is queued: `python -m arbor_core.data.validator <FileCheck as JSON>`.

A process of its own with limits on memory and time, because the rows are a stranger's. Says what it found as one JSON
object on standard output.
"""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from arbor_core.jobdir.documents import import_object
from arbor_core.process.prctl import die_with_parent
from arbor_core.types import JobFailed

from .rows import MAX_REPORTED, RowError, excerpt, parse_lines, require_rows

MEMORY_BYTES = 4 << 30
CPU_SECONDS = 3600


class FileCheck(msgspec.Struct, frozen=True):
    """What is to be checked, and how."""

    check_row: str
    """`"package.module:function"`, of the trainer."""
    min_rows: int
    training_file: str
    validation_file: str | None = None


class Report(msgspec.Struct):
    """What the validator found."""

    rows: dict[str, int] = msgspec.field(default_factory=dict)
    warnings: list[str] = msgspec.field(default_factory=list)
    error: dict[str, Any] | None = None


def check(files: FileCheck) -> Report:
    """Check both files against what the trainer accepts."""
    report = Report()
    check_row: Callable[[dict[str, Any]], None] = import_object(files.check_row)
    found = [("training_file", files.training_file, files.min_rows)]
    if files.validation_file:
        found.append(("validation_file", files.validation_file, 1))
    try:
        for param, path, minimum in found:
            report.rows[param] = check_file(Path(path), param, check_row, report.warnings)
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


def main(files: FileCheck) -> None:
    die_with_parent(sys.stdout.fileno())  # without the server nobody reads the report
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 60))  # SIGXCPU, which is no SIGKILL
    report = check(files)
    sys.stdout.write(msgspec.json.encode(report).decode())


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=FileCheck))
