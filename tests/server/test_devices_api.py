"""`/v1/arbor/devices` and `/v1/arbor/leases`: who has each device, who had it, and why that ended."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any

from http_calls import BASE, call
from jobs import check_and_stop, create, lease_ends, pause, supervisor_of
from live import LiveServer, engine_dir, process_of
from waiting import until

SAID = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}
ENDLESS = {"steps": 1_000_000, "step_seconds": 0.02}


def leases(server: LiveServer, **query: Any) -> list[dict[str, Any]]:
    text = "&".join(f"{name}={value}" for name, value in query.items())
    return list(call(server.url, "GET", f"/v1/arbor/leases?{text}").json["data"])


def test_who_had_a_device_and_why_it_was_given_back(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    """Jobs that end in every way, and engines; also across a server that is killed."""
    server = start_server("gpu.train=[0]", "gpu.inference=[1]")
    jobs = server.client.fine_tuning.jobs
    done = server.wait(create(server, chat_rows).id).id
    failed = create(server, chat_rows, hyperparameters={"steps": 5, "fault": "fail", "fault_step": 2}).id
    server.wait(failed, "failed")
    crashed = create(server, chat_rows, hyperparameters={"steps": 5, "fault": "crash", "fault_step": 2}).id
    server.wait(crashed)
    endless = create(server, chat_rows, hyperparameters=ENDLESS).id
    until(lambda: supervisor_of(server, endless))
    pause(server, endless)
    server.new_client(_strict_response_validation=False).fine_tuning.jobs.resume(endless)
    server.wait(endless, "running")
    assert server.client.chat.completions.create(**SAID).choices  # type: ignore[arg-type]
    train, serve = call(server.url, "GET", "/v1/arbor/devices").json["data"]
    assert [(one["id"], one["pools"], one["lost"]) for one in (train, serve)] == [
        ("mock:0", ["train"], False),
        ("mock:1", ["engine"], False),
    ]
    assert [lease["owner"] for lease in train["leases"]] == [endless]
    assert [lease["owner"] for lease in serve["leases"]] == [f"engine:{BASE}"]
    assert serve["leases"][0]["ended_at"] is None

    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    server = start_server("gpu.train=[0]", "gpu.inference=[1]")
    jobs = server.client.fine_tuning.jobs
    engines = leases(server, device="mock:1")
    assert [(lease["owner"], lease["reason"]) for lease in engines] == [(f"engine:{BASE}", "server_ended")]
    assert engines[0]["began_at"] <= engines[0]["ended_at"]
    jobs.cancel(endless)
    server.wait(endless, "cancelled")
    assert lease_ends(server, done) == ["succeeded"]
    assert lease_ends(server, failed) == ["failed"]
    assert lease_ends(server, crashed) == ["crashed", "succeeded"]
    assert lease_ends(server, endless) == ["paused", "cancelled"]
    assert server.client.chat.completions.create(**SAID).choices  # type: ignore[arg-type]
    check_and_stop(server)
    with closing(sqlite3.connect(server.storage / "arbor.db")) as db:
        sql = "SELECT reason FROM lease_history WHERE device='mock:1' ORDER BY seq"
        assert [row[0] for row in db.execute(sql)] == ["server_ended", "server_ended"]


def test_an_engine_that_dies_or_makes_room(start_server: Callable[..., LiveServer]) -> None:
    server = start_server("gpu.train=[]", "gpu.inference=[0]")
    for model in (BASE, "mock/other"):
        assert server.client.chat.completions.create(**{**SAID, "model": model}).choices  # type: ignore[arg-type]
    os.kill(process_of(engine_dir(server)), signal.SIGKILL)
    until(lambda: [lease["reason"] for lease in leases(server)] == ["died", "made_room"])
    assert call(server.url, "GET", "/v1/arbor/devices").json["data"][0]["leases"] == []


def test_pages_of_leases(server: LiveServer, chat_rows: list[dict[str, Any]]) -> None:
    server.cancel_all()  # what other tests have left
    for _ in range(3):
        server.wait(create(server, chat_rows, hyperparameters={"steps": 1}).id)
    whole = [lease["id"] for lease in leases(server, limit=3)]
    assert len(set(whole)) == 3
    first = call(server.url, "GET", "/v1/arbor/leases?limit=1").json
    assert (first["has_more"], first["first_id"], first["last_id"]) == (True, whole[0], whole[0])
    assert [lease["id"] for lease in leases(server, limit=2, after=whole[0])] == whole[1:]
    assert leases(server, device="mock:77") == []
    call(server.url, "GET", "/v1/arbor/leases?after=lease-none.0").error(400, "invalid_cursor", "after")
