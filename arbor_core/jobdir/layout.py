"""Every path of a job's directory, once."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def claimed(attempt_dir: Path, ref: str) -> str:
    """Who keeps an attempt: `ref` if nobody did before, else what was written then. Empty: nobody, for good."""
    attempt_dir.mkdir(parents=True, exist_ok=True)
    path, draft = attempt_dir / "keeper", attempt_dir / f".keeper.{os.getpid()}"
    if not path.exists():
        draft.write_text(ref)
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)  # with its content, or not at all
        draft.unlink()
    return path.read_text()
