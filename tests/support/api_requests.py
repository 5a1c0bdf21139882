"""Requests to the operations of a server's OpenAPI document, in its shape or out of it: no 5xx, errors in the envelope,
answers as the document says. `API_EXAMPLES=1000` looks longer and elsewhere each time."""

from __future__ import annotations

import contextlib
import os
import re
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from http_calls import BASE, Answer, call, supervised
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import ENDED, LiveServer, launch
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

EXAMPLES = int(os.environ.get("API_EXAMPLES", "0"))
KEY = "sk-schemathesis"
LOOK = settings(
    max_examples=EXAMPLES or 25,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
AS_DOCUMENTED = [content_type_conformance, response_schema_conformance]


def labels(handlers: Iterable[Any]) -> list[str]:
    """What schemathesis calls the operations of route handlers."""
    paths = ((min(handler.http_methods), path) for handler in handlers for path in handler.paths)
    return sorted(f"{method} {re.sub(r':[a-z]+}', '}', path)}" for method, path in paths)


@contextlib.contextmanager
def busy(folder: Path, *overrides: str, key: str | None = None, strict: bool = True) -> Iterator[LiveServer]:
    """A server with one device to train on, whose jobs are cancelled afterwards; its log must hold no traceback then.

    Args:
        key: The only one that it takes; None: it takes any.
        strict: Its client checks answers against OpenAI's types, which do not have all methods of ours.
    """
    more = [f"auth.keys=[{key}]"] if key else []
    live = launch(folder, "gpu.train=[0]", *more, *overrides)
    jobs = live.new_client(KEY, max_retries=20, _strict_response_validation=strict).fine_tuning.jobs
    try:
        yield live
        for job in jobs.list(limit=100):
            if job.status not in ENDED:
                jobs.cancel(job.id)
                live.wait(job.id, "cancelled")
        assert "Traceback" not in live.log
    finally:
        live.stop()


def hold_the_device(live: LiveServer, rows: str) -> None:
    """Start a job on a file that never ends, so that no other begins."""
    endless: Any = supervised(steps=1_000_000, step_seconds=0.5)
    job = live.new_client(KEY).fine_tuning.jobs.create(model=BASE, training_file=rows, method=endless)
    live.wait(job.id, "running")


@dataclass
class Api:
    """A server, its document, and objects that are there: most of what can go wrong lies behind a name that exists."""

    server: LiveServer
    schema: Any
    guarded: bool
    known: dict[str, str]
    doomed: dict[str, str]

    def tame(self, case: Any) -> None:
        """Change what would only make the server wait."""

    def fill_in(self, case: Any) -> None:
        """Put names of objects that are there where a generated request has its own."""
        names = self.doomed if case.method == "DELETE" else self.known
        places = [case.path_parameters, case.body if case.media_type == "application/json" else None]
        for place in places:
            for name in names.keys() & (place if isinstance(place, dict) else {}).keys():
                place[name] = names[name]
        if "after" in (case.query or {}):
            case.query["after"] = self.known["file_id" if case.path.startswith("/v1/files") else "job_id"]


def told(status: int, headers: Any, body: bytes) -> None:
    """Whether an answer is one that this server may give to anything at all."""
    assert status < 500, body
    if status >= 400:
        answer = Answer(status, headers, body)
        answer.error(status, answer.json["error"]["code"], answer.json["error"]["param"])


def cases(operations: Iterable[str]) -> list[Any]:
    """Requests in the shape of an operation, and out of it. Nothing can be wrong about a request for /health, which has
    no parts."""
    return [
        pytest.param(label, mode, id=f"{label} {mode.value}")
        for label in operations
        for mode in schemathesis.GenerationMode
        if mode is schemathesis.GenerationMode.POSITIVE or "/v1/" in label
    ]


def look(api: Api, label: str, mode: schemathesis.GenerationMode, how: settings = LOOK) -> None:
    """Ask for an operation in many ways."""
    operation = next(found.ok() for found in api.schema.get_all_operations() if found.ok().label == label)
    public = not operation.definition.raw.get("security")

    @how
    @given(case=operation.as_strategy(generation_mode=mode), known=st.booleans(), keyed=st.integers(0, 3))
    def ask(case: Any, known: bool, keyed: int) -> None:
        if known:
            api.fill_in(case)
        api.tame(case)
        headers = {"Authorization": f"Bearer {KEY}"} if keyed else {}
        response = case.call(headers=headers)
        told(response.status_code, {name: found[0] for name, found in response.headers.items()}, response.content)
        if api.guarded and not public and not keyed:
            assert response.status_code == 401
        if response.status_code == 200:
            case.validate_response(response, checks=AS_DOCUMENTED)

    ask()


NAMES = ("authorization", "idempotency-key", "x-stainless-retry-count", "content-type", "accept", "host", "cookie")
PRINTABLE = string.ascii_letters + string.digits + string.punctuation + " \t"
VALUES = st.text(st.sampled_from(PRINTABLE) | st.characters(min_codepoint=0x80, max_codepoint=0xFF), max_size=200)
ODD = ["%00", "..", "%2e%2e", "%2F", "%", "%zz", ";", "%0d%0aset-cookie:a=b", "%ff", "%F0%9F%8C%B3", "'"]
PLAIN = st.text(string.ascii_letters + string.digits + "-_:.~", max_size=20)
PIECES = st.lists(st.sampled_from(ODD) | PLAIN, max_size=4).map("".join)
QUERY = ["limit", "after", "order", "purpose", "metadata", "metadata[a]", "metadata[", "metadata[a][b]"]
QUERIES = st.lists(st.tuples(st.sampled_from(QUERY), PIECES), max_size=4)


def look_oddly(api: Api, label: str) -> None:
    """Ask for an operation with what no document describes."""
    method, _, path = label.partition(" ")
    before, brace, after = path.partition("{")
    tail = after.partition("}")[2]

    @LOOK
    @given(
        name=PIECES,
        queries=QUERIES,
        headers=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4),
        body=st.none() | st.sampled_from([b"", b"{}", b"[]", b"null", b"\xff", b'"\\ud800"', b"[" * 2000]),
    )
    def ask(name: str, queries: list[tuple[str, str]], headers: dict[str, str], body: bytes | None) -> None:
        url = before + (name + tail if brace else "")
        query = "&".join(f"{key}={value}" for key, value in queries)
        sent = {"authorization": f"Bearer {KEY}"} | {key: value.strip() for key, value in headers.items()}
        answer = call(api.server.url, method, f"{url}?{query}", body, sent)
        assert "set-cookie" not in answer.headers
        told(answer.status, answer.headers, answer.body)

    ask()
