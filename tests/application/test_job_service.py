"""Jobs without HTTP: a server's parts in one's own process, as a notebook has them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from http_calls import BASE

from arbor_core import plugins
from arbor_core.application.requests import CreateFineTuningJobRequest
from arbor_core.application.system import Arbor, open_system
from arbor_core.config.compose import serve_settings
from arbor_core.types import TERMINAL, ApiError

pytest.importorskip("arbor_mock")

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture
async def arbor(tmp_path: Path) -> AsyncIterator[Arbor]:
    mocked = ("executor=mock", "allocator=mock", "inference=mock")
    system = open_system(serve_settings(f"storage={tmp_path}", *mocked), plugins.load([]), "mock")
    async with system.running():
        yield system


async def request(arbor: Arbor, **fields: object) -> CreateFineTuningJobRequest:
    """A request with a training file of its owner, `me`."""
    rows = "".join(json.dumps(ROW) + "\n" for _ in range(10))
    file_id, insert = await arbor.files.add_pieces("me", "rows.jsonl", [rows.encode()], "fine-tune")
    await arbor.store.write(insert)
    return CreateFineTuningJobRequest(BASE, file_id, **fields)  # type: ignore[arg-type]


async def ended(arbor: Arbor, job_id: str) -> str:
    """The status that a job has in the end."""
    async with asyncio.timeout(60):
        while (job := arbor.job_service.find(job_id, "me")).status not in TERMINAL:
            await arbor.jobs.feed.wait(arbor.jobs.feed.newest, 1.0, job_id)
    return job.status


async def test_a_job_is_created_found_shown_and_listed(arbor: Arbor) -> None:
    jobs = arbor.job_service
    first = await jobs.create(await request(arbor, metadata={"run": "1"}), "me", warnings=["mind the step"])
    second = await jobs.create(await request(arbor), "me")
    assert await ended(arbor, first.id) == "succeeded"
    assert await ended(arbor, second.id) == "succeeded"
    job = jobs.find(first.id, "me")
    assert jobs.show(job).fine_tuned_model == job.fine_tuned_model is not None
    assert [shown.id for shown in jobs.list_jobs("me", 10).data] == [second.id, first.id]
    assert [shown.id for shown in jobs.list_jobs("me", 10, metadata={"run": "1"}).data] == [first.id]
    page = jobs.list_jobs("me", 1)
    assert (page.data[0].id, page.has_more) == (second.id, True)
    page = jobs.list_jobs("me", 1, after=second.id)
    assert (page.data[0].id, page.has_more) == (first.id, False)
    events = jobs.list_events(job, 1000)
    assert "mind the step" in [event.message for event in events.data]
    assert jobs.list_events(job, 1000, after=events.data[-1].id).data == []
    checkpoints = jobs.list_checkpoints(job, 1)
    assert checkpoints.first_id == checkpoints.last_id == checkpoints.data[0].id


async def test_a_job_is_paused_resumed_and_cancelled(arbor: Arbor) -> None:
    jobs = arbor.job_service
    body = await request(arbor, hyperparameters={"steps": 1000})
    job = jobs.find((await jobs.create(body, "me")).id, "me")
    assert (await jobs.ask(job, "pause")).desired == "pause"
    async with asyncio.timeout(60):
        while (job := jobs.find(job.id, "me")).status != "paused":
            await arbor.jobs.feed.wait(arbor.jobs.feed.newest, 1.0, job.id)
    assert (await jobs.ask(job, "run")).status == "queued"
    await jobs.ask(jobs.find(job.id, "me"), "cancel")
    assert await ended(arbor, job.id) == "cancelled"
    job = jobs.find(job.id, "me")
    assert await jobs.ask(job, "cancel") == job, "it is cancelled already"
    with pytest.raises(ApiError, match="cannot be resumed: it has cancelled") as caught:
        await jobs.ask(job, "run")
    assert caught.value.code == "invalid_job_state"


async def test_the_changes_of_a_job_are_read_to_its_end_and_by_its_owner_alone(arbor: Arbor) -> None:
    jobs, number = arbor.job_service, arbor.job_service.newest_change
    mine, others = jobs.changes("me", number), jobs.changes("you", number)
    hearing = asyncio.ensure_future(anext(others))
    job = await jobs.create(await request(arbor), "me")
    seen = []
    async with asyncio.timeout(60):
        while jobs.find(job.id, "me").status not in TERMINAL or number < jobs.newest_change:
            page = await anext(mine)
            seen += page.changes
            number = page.position
    assert {change.job_id for change in seen} == {job.id}
    assert {change.what for change in seen} == {"job", "events", "checkpoints", "lease"}
    assert [change.seq for change in seen] == list(range(seen[0].seq, seen[-1].seq + 1))
    assert not hearing.done()
    hearing.cancel()
    again = anext(jobs.changes("me", seen[2].seq))  # another reader takes up where this one had been
    assert (await again).changes[0] == seen[3]
    with pytest.raises(ApiError, match=f"read on from {number}") as caught:
        await anext(jobs.changes("me", number + 1))
    assert (caught.value.status, caught.value.code, caught.value.param) == (410, "changes_gone", "after")


async def test_jobs_of_others_and_cursors_from_elsewhere(arbor: Arbor) -> None:
    jobs = arbor.job_service
    job = await jobs.create(await request(arbor), "me")
    for job_id, owner in ((job.id, "you"), ("ftjob-nobody", "me"), ("../x", "me")):
        with pytest.raises(ApiError) as caught:
            jobs.find(job_id, owner)
        assert (caught.value.status, caught.value.code) == (404, "fine_tune_not_found")
    assert jobs.list_jobs("you", 10).data == []
    with pytest.raises(ApiError, match="no object") as caught:
        jobs.list_jobs("you", 10, after=job.id)
    assert caught.value.code == "invalid_cursor"
    await ended(arbor, job.id)
