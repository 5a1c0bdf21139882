"""A server without keys is for this machine alone: what a web page has a browser send is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from http_calls import JOBS, call
from live import LiveServer


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1.evil.example:80"},
        {"origin": "http://localhost@evil.example"},
        {"host": "evil.example"},
        {"host": "evil.example:7453"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "8.8.8.8"},
        {"host": "[::1"},
    ],
    ids=str,
)
def test_row_51_without_keys_web_pages_are_refused(server: LiveServer, headers: dict[str, str]) -> None:
    for method, path in [("POST", JOBS), ("GET", "/v1/files"), ("POST", "/v1/chat/completions")]:
        call(server.url, method, path, b"{}", headers).error(403, "forbidden_origin")


@pytest.mark.parametrize(
    "headers",
    [{"host": "localhost:7453"}, {"host": "[::1]:80"}, {"host": "127.3.2.1"}, {"origin": "http://localhost:3000"}],
    ids=str,
)
def test_without_keys_this_machine_is_welcome(server: LiveServer, headers: dict[str, str]) -> None:
    assert call(server.url, "GET", "/v1/files", headers=headers).status == 200


def test_with_keys_or_when_everybody_may_come_the_name_does_not_matter(
    start_server: Callable[..., LiveServer], tmp_path: Path
) -> None:
    page = {"host": "arbor.example", "origin": "https://app.example"}
    guarded, open_to_all = (
        start_server("auth.keys=[one]"),
        start_server("auth.insecure=true", storage=tmp_path / "open"),
    )
    assert call(guarded.url, "GET", "/v1/files", headers={**page, "authorization": "Bearer one"}).status == 200
    assert call(open_to_all.url, "GET", "/v1/files", headers=page).status == 200
