"""A job that is created while what it needs goes away: of two requests that exclude each other, one is refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_calls import BASE

from arbor_core import plugins
from arbor_core.application.requests import CreateFineTuningJobRequest
from arbor_core.application.system import Arbor, open_system
from arbor_core.config.compose import serve_settings
from arbor_core.models.catalog import add_model
from arbor_core.types import ApiError

FULL = f"ft:{BASE}:arbor::12345678"


@pytest.fixture
def arbor(tmp_path: Path) -> Iterator[Arbor]:
    """A server's parts, of which nothing runs."""
    mocked = ("executor=mock", "allocator=mock", "inference=mock", "limits.queued_jobs=1")
    system = open_system(serve_settings(f"storage={tmp_path}", *mocked), plugins.load([]), "mock")
    yield system
    system.store.close()
    system.lock.close()


async def at_once(arbor: Arbor, *requests: Coroutine[Any, Any, Any]) -> list[str | None]:
    """Have all requests come to the point where they wait for the database, in this order; then go on. Returns the code
    of each error."""
    go = threading.Event()
    held = asyncio.create_task(arbor.store.write(lambda _: go.wait(120)))
    tasks = [asyncio.create_task(request) for request in requests]
    await asyncio.sleep(0)
    go.set()
    await held
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(one, ApiError) for one in outcomes if isinstance(one, BaseException)), outcomes
    return [one.code if isinstance(one, ApiError) else None for one in outcomes]


async def add_file(arbor: Arbor) -> str:
    file_id, insert = await arbor.files.add_pieces("me", "rows.jsonl", [b"{}\n"], "fine-tune")
    await arbor.store.write(insert)
    return file_id


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
async def test_row_26_row_54_a_file_is_deleted_or_used(arbor: Arbor, param: str) -> None:
    needed, other = await add_file(arbor), await add_file(arbor)
    asked = CreateFineTuningJobRequest(BASE, **{"training_file": other, param: needed})
    codes = await at_once(arbor, arbor.files.delete(needed, "me"), arbor.job_service.create(asked, "me"))
    assert codes == [None, "file_not_found"]
    assert arbor.jobs.count_waiting() == 0
    needed = await add_file(arbor)
    asked = CreateFineTuningJobRequest(BASE, **{"training_file": other, param: needed})
    codes = await at_once(arbor, arbor.job_service.create(asked, "me"), arbor.files.delete(needed, "me"))
    assert codes == [None, "file_in_use"]
    assert arbor.files.path(needed).exists()


async def test_row_116_a_model_is_deleted_or_trained_further(arbor: Arbor) -> None:
    path = "jobs/ftjob-1/checkpoints/1-1"
    (arbor.models.root / path).mkdir(parents=True)

    def add(db: Any) -> None:
        add_model(db, name=FULL, owner="me", job_id="ftjob-1", base=BASE, base_path="", path=path, kind="full")

    await arbor.store.write(add)
    asked = CreateFineTuningJobRequest(FULL, await add_file(arbor))
    codes = await at_once(arbor, arbor.models.delete(FULL, "me"), arbor.job_service.create(asked, "me"))
    assert codes == [None, "model_not_found"]
    await arbor.store.write(lambda db: db.execute("UPDATE models SET deleted=0"))
    codes = await at_once(arbor, arbor.job_service.create(asked, "me"), arbor.models.delete(FULL, "me"))
    assert codes == [None, "model_in_use"]


async def test_row_66_one_place_in_the_queue(arbor: Arbor) -> None:
    asked = CreateFineTuningJobRequest(BASE, await add_file(arbor))
    codes = await at_once(arbor, *(arbor.job_service.create(asked, "me") for _ in range(3)))
    assert codes == [None, "queue_full", "queue_full"]
    assert arbor.jobs.count_waiting() == 1
