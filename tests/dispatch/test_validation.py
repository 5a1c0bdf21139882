"""Files that were found good are not read again, as long as they are good for the same model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from arbor_core.data.validator import UNSEEN, FileCheck, Report
from arbor_core.dispatch import validation
from arbor_core.dispatch.validation import Validators


async def test_files_are_read_again_when_the_chat_template_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[FileCheck] = []

    async def validate(files: FileCheck, python: str) -> Report:
        read.append(files)
        return Report(warnings=[UNSEEN] if files.model == "org/elsewhere" else [])

    monkeypatch.setattr(validation, "validate", validate)
    validators = Validators(asyncio.Semaphore(1))
    here = FileCheck("check", 1, "rows.jsonl", model_check="look", model=str(tmp_path))
    template = tmp_path / "chat_template.jinja"
    for content in ("one", "one more"):
        template.write_text(content)
        await validators.report(here, "python")
        (tmp_path / "model.safetensors").touch()  # no template
        await validators.report(here, "python")
    assert read == [here] * 2
    elsewhere = msgspec.structs.replace(here, model="org/elsewhere")
    await validators.report(elsewhere, "python")
    await validators.report(elsewhere, "python")
    assert read[2:] == [elsewhere] * 2, "its template may be here by now"
    plain = FileCheck("check", 1, "rows.jsonl")
    await validators.report(plain, "python")
    await validators.report(plain, "python")
    assert read[4:] == [plain]
