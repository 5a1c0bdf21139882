"""Requests that come twice: one job, whatever became of the first answer."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from http_calls import BASE, JOBS, Answer, call
from live import LiveServer

from arbor_core.application import idempotency
from arbor_core.application.idempotency import Repeatable, RepeatedError
from arbor_core.application.requests import CreateFineTuningJobRequest
from arbor_core.storage.database import Store


@pytest.fixture(scope="module")
def file(server: LiveServer) -> str:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 10
    return server.upload(rows)


def create(server: LiveServer, file: str, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
    return call(server.url, "POST", JOBS, {"model": BASE, "training_file": file, **fields}, headers)


def count(server: LiveServer, metadata: str) -> int:
    return len(server.client.fine_tuning.jobs.list(limit=100, metadata={"test": metadata}).data)


def test_row_64_a_retry_finds_the_job_of_the_first_attempt(server: LiveServer, file: str) -> None:
    asked: dict[str, Any] = {"seed": 3, "metadata": {"test": "row-64", "a": "b"}}
    first = create(server, file, {"x-stainless-retry-count": "0"}, **asked).json
    turned = {"metadata": {"a": "b", "test": "row-64"}, "seed": 3}
    for _ in range(2):
        again = create(server, file, {"x-stainless-retry-count": "1"}, **turned)
        assert (again.status, again.json) == (200, first)
    assert count(server, "row-64") == 1
    other = create(server, file, {"x-stainless-retry-count": "1"}, **{**asked, "seed": 4}).json
    assert other["id"] != first["id"], "another body is another job"
    meant = create(server, file, **asked).json
    assert meant["id"] != first["id"], "whoever does not say that it is a retry means a second job"
    assert create(server, file, {"x-stainless-retry-count": "2"}, **asked).json["id"] == meant["id"]
    assert count(server, "row-64") == 3


def test_row_64_the_client_retries_by_itself(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    """The server dies between the job and its answer; the client's own second attempt gets that job."""
    server = start_server(env={"ARBOR_CRASH_AT": "job.created"})
    uploaded = server.upload(chat_rows)
    port = server.url.rpartition(":")[2]
    client = server.new_client(max_retries=10)
    with ThreadPoolExecutor(1) as pool:
        creating = pool.submit(client.fine_tuning.jobs.create, model=BASE, training_file=uploaded)
        assert server.process.wait(120) == -signal.SIGKILL
        again = start_server(f"port={port}")
        job = creating.result(170)
    assert [found.id for found in again.client.fine_tuning.jobs.list().data] == [job.id]
    assert again.wait(job.id).status == "succeeded"


def test_a_key_names_a_request(server: LiveServer, file: str) -> None:
    key = {"idempotency-key": "order 66"}
    first = create(server, file, key, metadata={"test": "key"}).json
    assert server.wait(first["id"]).status == "succeeded"
    again = create(server, file, key, metadata={"test": "key"})
    assert (again.status, again.json) == (200, first), "what was answered then"
    assert count(server, "key") == 1
    assert create(server, file, {"idempotency-key": "order 67"}, metadata={"test": "key"}).json["id"] != first["id"]


def test_row_65_a_key_with_another_body(server: LiveServer, file: str) -> None:
    key = {"idempotency-key": "row-65"}
    first = create(server, file, key, metadata={"test": "row-65"}).json
    refused = create(server, file, key, metadata={"test": "row-65"}, seed=1)
    refused.error(400, "idempotency_key_reuse", "Idempotency-Key")
    assert count(server, "row-65") == 1
    assert create(server, file, key, metadata={"test": "row-65"}).json == first


def test_what_was_refused_is_not_remembered(server: LiveServer, file: str) -> None:
    key = {"idempotency-key": "refused first"}
    create(server, "file-nobodys", key).error(400, "file_not_found", "training_file")
    assert create(server, file, key, metadata={"test": "refused"}).status == 200


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\xe9"])
def test_keys_that_are_none(server: LiveServer, file: str, key: str) -> None:
    create(server, file, {"idempotency-key": key}).error(400, "invalid_value", "Idempotency-Key")


@pytest.mark.parametrize("tried", ["0", "", "-1", "x", "\xb2x"])
def test_counts_that_say_nothing(server: LiveServer, file: str, tried: str) -> None:
    headers = {"x-stainless-retry-count": tried}
    made = [create(server, file, headers, metadata={"test": "counts"}).json["id"] for _ in range(2)]
    assert len(set(made)) == 2


@pytest.mark.parametrize("header", ["idempotency-key", "x-stainless-retry-count"])
def test_many_at_once_make_one_job(server: LiveServer, file: str, header: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        asked = {"metadata": {"test": header}}
        answers = list(pool.map(lambda _: create(server, file, {header: "7"}, **asked), range(16)))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.json["id"] for answer in answers}) == 1
    assert count(server, header) == 1


def test_keys_of_different_callers_do_not_meet(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server("auth.keys=[{name:a,key:ka,scopes:[train],tenant:t},{name:b,key:kb,scopes:[train],tenant:t}]")
    server.new_client("ka")
    uploaded = server.upload(chat_rows)
    made = [
        create(server, uploaded, {"idempotency-key": "same", "authorization": f"Bearer {secret}"}).json["id"]
        for secret in ("ka", "kb", "ka")
    ]
    assert made[0] == made[2] != made[1]


async def test_answers_are_kept_for_a_day_and_those_without_a_key_for_minutes(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, asked = Store(tmp_path / "arbor.db"), CreateFineTuningJobRequest("m", "file-1")
    now = int(time.time())
    monkeypatch.setattr(idempotency.time, "time", lambda: now)
    named = Repeatable.of("me", asked, {"idempotency-key": "k"})
    unnamed = Repeatable.of("me", asked, {"x-stainless-retry-count": "1"})
    await store.write(lambda db: named.remember(db, b"one"))
    await store.write(lambda db: unnamed.remember(db, b"two"))
    with pytest.raises(RepeatedError):
        await store.write(lambda db: named.remember(db, b"three"))
    now += idempotency.UNNAMED_SECONDS - 1
    assert (named.earlier_response(store.one), unnamed.earlier_response(store.one)) == (b"one", b"two")
    now += 1
    assert (named.earlier_response(store.one), unnamed.earlier_response(store.one)) == (b"one", None)
    now += idempotency.NAMED_SECONDS
    assert named.earlier_response(store.one) is None
    await store.write(lambda db: unnamed.remember(db, b"four"))
    store.close()
    with closing(sqlite3.connect(tmp_path / "arbor.db")) as db:
        assert db.execute("SELECT response FROM repeats").fetchall() == [(b"four",)], "what is too old is forgotten"
