"""Reads a job's files row by row, before the job is queued: `python -m arbor_core.data.validator <FileCheck as JSON>`.

A process of its own with limits on memory and time, because the rows are a stranger's. Says what it found as one JSON
object on standard output.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from arbor_core.jobdir.documents import import_object
from arbor_core.process.prctl import die_with_parent
from arbor_core.types import JobFailed

from .rows import MAX_REPORTED, RowError, excerpt_of, followed, parse_lines, require_rows

MEMORY_BYTES = 4 << 30
CPU_SECONDS = 3600
REASON_CHARS = 400
STACK = 200
"""Fewer levels than a trainer can read, which has more on its stack when it reads the same rows."""
UNSEEN = (
    "The rows were not looked at with the model's chat template, because it is not on this machine yet or cannot be "
    "loaded: rows of which it leaves something out fail when training starts"
)
RowCheck = Callable[[dict[str, Any]], Iterable[str] | None]
"""Raises ValueError for a row that cannot be used; what it returns are warnings."""


class FileCheck(msgspec.Struct, frozen=True):
    """What is to be checked, and how."""

    check_row: str
    """`"package.module:function"`, of the trainer."""
    min_rows: int
    training_file: str
    validation_file: str | None = None
    model_check: str | None = None
    """`"package.module:function"`, of the trainer."""
    model: str | None = None
    """Where the weights are that the job starts from."""


class Report(msgspec.Struct):
    """What the validator found."""

    rows: dict[str, int] = msgspec.field(default_factory=dict)
    warnings: list[str] = msgspec.field(default_factory=list)
    error: dict[str, Any] | None = None


def check(files: FileCheck) -> Report:
    """Check both files against what the trainer accepts."""
    report = Report()
    check_row = row_check(files, report.warnings)
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


def row_check(files: FileCheck, warnings: list[str]) -> RowCheck:
    """What a row has to pass."""
    check_row: RowCheck = import_object(files.check_row)
    by_model: RowCheck | None = import_object(files.model_check)(files.model) if files.model_check else None
    if by_model is None:
        if files.model_check:
            warnings.append(UNSEEN)
        return check_row
    return lambda row: [*(check_row(row) or ()), *(by_model(row) or ())]


def check_file(path: Path, param: str, check_row: RowCheck, warnings: list[str]) -> int:
    """Count the rows of a file.

    Raises:
        JobFailed: `invalid_<param>` with the first line of each kind of fault.
    """
    count, faults, hints = 0, Tally(), Tally()
    for line, row in parse_lines(path, hints.add):
        if isinstance(row, RowError):
            faults.add(line, row.reason, row.excerpt)
            continue
        count += 1
        try:
            for hint in check_row(row) or ():
                hints.add(line, hint)
        except ValueError as error:
            faults.add(line, str(error), row)
        except Exception as error:  # a plugin's: it is not said that the row is at fault, but where it stands
            faults.add(line, f"the check of the training method failed: {error!r}", row)
    warnings += [f"{param}: {kind.reason} ({kind.count:,} time(s), first at line {kind.line})" for kind in hints.kinds]
    if hints.others:
        warnings.append(f"{param}: and {hints.others:,} other warning(s)")
    if faults.count:
        name = param.replace("_", " ")
        message = f"{faults.count:,} line(s) of the {name} cannot be used: {faults.text()}"
        raise JobFailed(message, code=f"invalid_{param}", param=param)
    return count


class Kind(msgspec.Struct):
    """What was found in one line or more."""

    line: int
    """The first."""
    reason: str
    excerpt: str
    count: int = 0


class Tally:
    """What was found in the lines of a file, each kind of it once. Kinds differ in more than numbers; of all after the
    first `MAX_REPORTED` only the lines are counted."""

    def __init__(self) -> None:
        self.count = 0
        self._kinds: dict[str, Kind] = {}
        self.others = 0

    @property
    def kinds(self) -> list[Kind]:
        return list(self._kinds.values())

    def add(self, line: int, reason: str, shown: str | Mapping[str, Any] = "") -> None:
        """Count one.

        Args:
            shown: The row or the beginning of its line.
        """
        self.count += 1
        if len(reason) > REASON_CHARS:  # it repeats what is in the row
            reason = reason[:REASON_CHARS] + "…"
        key = NUMBERS.sub("0", reason)
        kind = self._kinds.get(key)
        if kind is None and len(self._kinds) == MAX_REPORTED:
            self.others += 1
            return
        if kind is None:
            text = shown if isinstance(shown, str) else excerpt_of(shown)
            kind = self._kinds[key] = Kind(line, reason, text)
        kind.count += 1

    def text(self) -> str:
        """All that was found, in the order of the lines."""
        found = []
        for kind in self.kinds:
            more = f" and {kind.count - 1:,} more" if kind.count > 1 else ""
            found.append(f"line {kind.line}{more}: {followed(kind.reason, kind.excerpt)}")
        if self.others:
            found.append(f"and {self.others:,} line(s) with other faults")
        return "; ".join(found)


NUMBERS = re.compile(r"[0-9]+")


def main(files: FileCheck) -> None:
    die_with_parent(sys.stdout.fileno())  # without the server nobody reads the report
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 60))  # SIGXCPU, which is no SIGKILL
    sys.setrecursionlimit(sys.getrecursionlimit() - STACK)
    report = check(files)
    sys.stdout.write(msgspec.json.encode(report).decode())


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=FileCheck))
