"""Who may do what: keys, scopes, tenants, limits of each key; and what nobody can reach."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import yaml
from http_calls import BASE, JOBS, call, raw_socket
from litestar.handlers import HTTPRouteHandler
from live import LiveServer, launch

from arbor_core import ConfigError
from arbor_core.config import api_keys, compose, convert, settings
from arbor_core.server.app import ROUTE_MODULES
from arbor_core.server.http import auth
from arbor_core.types import ApiError

SECRETS = {name: f"sk-the-secret-of-{name}" for name in ("boss", "trainer", "talker", "both", "stranger")}
ENTRIES = (
    f"{SECRETS['boss']}",
    f"{{name:trainer,key:{SECRETS['trainer']},scopes:[train],tenant:acme}}",
    f"{{name:talker,sha256:{hashlib.sha256(SECRETS['talker'].encode()).hexdigest()},scopes:[infer],tenant:acme}}",
    f"{{name:both,key:{SECRETS['both']},scopes:[train,infer],tenant:acme}}",
    f"{{name:stranger,key:{SECRETS['stranger']},scopes:[train,infer]}}",
)
CHAT = "/v1/chat/completions"
ASKED = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}


def key(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {SECRETS[name]}"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with a key of every kind."""
    live = launch(tmp_path_factory.mktemp("guarded"), f"auth.keys=[{','.join(ENTRIES)}]")
    yield live
    live.stop()


def handlers() -> Iterator[tuple[str, str, HTTPRouteHandler]]:
    for module in ROUTE_MODULES:
        for handler in module.ROUTES:
            for path in handler.paths:
                yield next(iter(handler.http_methods - {"OPTIONS"})), path, handler


# --- scopes -----------------------------------------------------------------------------------------------------------

NEEDS = {
    "public": {"/health", "/ready", "/docs", "/schema/openapi.json"},
    "admin": {"/v1/arbor/plugins", "/v1/arbor/devices", "/v1/arbor/leases"},
    "train or infer": {"/v1/arbor/trainers/{name:str}/schema", "GET /v1/models", "GET /v1/models/{model:path}"},
    "infer": {"/v1/chat/completions", "/v1/completions"},
}
"""What every route needs; those not named here need `train`."""


@pytest.mark.parametrize(
    ("method", "path", "handler"), [pytest.param(*found, id=f"{found[0]} {found[1]}") for found in handlers()]
)
def test_row_36_every_route_says_what_a_key_must_be_for(
    guarded: LiveServer, method: str, path: str, handler: HTTPRouteHandler
) -> None:
    needs = next((word for word, paths in NEEDS.items() if {path, f"{method} {path}"} & paths), "train")
    url = re.sub(r"\{[^}]+\}", "x", path)
    assert (call(guarded.url, method, url).status == 401) == (needs != "public")
    for name, scopes in [("trainer", {"train"}), ("talker", {"infer"}), ("boss", {"train", "infer", "admin"})]:
        answer = call(guarded.url, method, url, headers=key(name))
        if needs == "public" or scopes & set(needs.split(" or ")):
            assert answer.status not in (401, 403) or b"model_not_deletable" in answer.body, answer.body
        else:
            answer.error(403, "insufficient_permissions")


def test_row_36_the_answer_does_not_wait_for_the_body(guarded: LiveServer) -> None:
    head = f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {SECRETS['talker']}\r\n"
    with raw_socket(guarded.url) as connection:
        connection.sendall(f"{head}content-length: 1000000000\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 403")
    assert list((guarded.storage / "files").rglob("*.tmp")) == []


def test_row_36_the_client_hears_it(guarded: LiveServer) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="needs the scope train or admin, yours is infer") as caught:
        guarded.new_client(SECRETS["talker"]).files.list()
    assert caught.value.code == "insufficient_permissions"


def test_the_document_says_what_a_key_must_be_for(guarded: LiveServer) -> None:
    paths = call(guarded.url, "GET", "/schema/openapi.json").json["paths"]
    assert paths["/v1/files"]["post"]["security"] == [{"key": ["train"]}]
    assert paths["/v1/models"]["get"]["security"] == [{"key": ["train", "infer"]}]
    assert "security" not in paths["/health"]["get"]


async def test_a_plugins_route_needs_an_admin_unless_it_says_otherwise() -> None:
    limits = convert.typed(
        yaml.safe_load((compose.core_config_dir() / "serve.yaml").read_text())["limits"], settings.LimitsConfig, ""
    )
    admit = auth.guard(api_keys.entries([api_keys.ApiKey("t", ["train"], key="secret")]), limits)
    caller: Any = SimpleNamespace(headers={"authorization": "Bearer secret"}, state=SimpleNamespace())
    silent: Any = SimpleNamespace(opt={})
    with pytest.raises(ApiError, match="needs the scope admin, yours is train"):
        await admit(caller, silent)
    said: Any = SimpleNamespace(opt={"scopes": ("train",)})
    await admit(caller, said)
    assert auth.caller_of(caller).name == "t"


# --- tenants ----------------------------------------------------------------------------------------------------------


def test_row_37_tenants_share_what_is_theirs_and_see_nothing_else(
    guarded: LiveServer, chat_rows: list[dict[str, Any]]
) -> None:
    trainer, stranger = guarded.new_client(SECRETS["trainer"]), guarded.new_client(SECRETS["stranger"])
    guarded.clients[:] = [trainer, stranger]
    file = guarded.upload(chat_rows)
    job = guarded.wait(trainer.fine_tuning.jobs.create(model=BASE, training_file=file).id)
    checkpoint = trainer.fine_tuning.jobs.checkpoints.list(job.id).data[0]
    event = trainer.fine_tuning.jobs.list_events(job.id).data[0]

    talker = guarded.new_client(SECRETS["talker"])
    assert talker.models.retrieve(job.fine_tuned_model)
    assert talker.chat.completions.create(model=job.fine_tuned_model, messages=ASKED["messages"]).choices  # type: ignore[arg-type]
    assert guarded.new_client(SECRETS["both"]).files.retrieve(file)

    ours = (
        ("GET", f"/v1/files/{file}"),
        ("GET", f"/v1/files/{file}/content"),
        ("DELETE", f"/v1/files/{file}"),
        ("GET", f"/v1/files/{job.result_files[0]}/content"),
        ("GET", f"{JOBS}/{job.id}"),
        ("GET", f"{JOBS}/{job.id}/events"),
        ("GET", f"{JOBS}/{job.id}/checkpoints"),
        ("GET", f"/v1/arbor/jobs/{job.id}/samples"),
        *(("POST", f"{JOBS}/{job.id}/{verb}") for verb in ("cancel", "pause", "resume")),
        ("GET", f"/v1/models/{job.fine_tuned_model}"),
        ("DELETE", f"/v1/models/{job.fine_tuned_model}"),
        ("GET", f"/v1/models/{checkpoint.fine_tuned_model_checkpoint}"),
    )
    for name in ("stranger", "boss"):
        for method, path in ours:
            theirs = call(guarded.url, method, path, headers=key(name))
            nobodys = call(guarded.url, method, re.sub(r"(ftjob-|file-|:)\w{4}", r"\1none", path), headers=key(name))
            assert (theirs.status, theirs.json["error"]["code"]) == (404, nobodys.json["error"]["code"]), path
        for model in (job.fine_tuned_model, checkpoint.fine_tuned_model_checkpoint):
            call(guarded.url, "POST", CHAT, {**ASKED, "model": model}, key(name)).error(404, "model_not_found", "model")
        mine = {"model": BASE, "training_file": file}
        call(guarded.url, "POST", JOBS, mine, key(name)).error(400, "file_not_found", "training_file")
        for path, cursor in [("/v1/files", file), (JOBS, job.id)]:
            assert call(guarded.url, "GET", path, headers=key(name)).json["data"] == []
            call(guarded.url, "GET", f"{path}?after={cursor}", headers=key(name)).error(400, "invalid_cursor", "after")
    own = guarded.new_client(SECRETS["stranger"])
    guarded.clients[:] = [own]
    other = own.fine_tuning.jobs.create(model=BASE, training_file=guarded.upload(chat_rows))
    for path, cursor in [("events", event.id), ("checkpoints", checkpoint.id)]:
        found = call(guarded.url, "GET", f"{JOBS}/{other.id}/{path}?after={cursor}", headers=key("stranger"))
        found.error(400, "invalid_cursor", "after")
    guarded.wait(other.id)
    assert trainer.fine_tuning.jobs.retrieve(job.id) == job
    trainer.close()
    stranger.close()


def test_nobody_sends_commands_to_another_tenants_job(guarded: LiveServer) -> None:
    body = {"model": BASE, "method": {"type": "mock_commands"}}
    job = call(guarded.url, "POST", JOBS, body, key("trainer")).json["id"]
    ours: tuple[tuple[str, str, dict[str, Any] | None], ...] = (
        ("POST", "commands", {"number": 1, "do": "sum"}),
        ("GET", "results?after=0&seconds=20", None),
        ("POST", "acknowledge", {"up_to": 0}),
        ("POST", "finish", None),
    )
    for method, path, content in ours:
        for name in ("stranger", "boss"):
            refused = call(guarded.url, method, f"/v1/mock/jobs/{job}/{path}", content, key(name))
            refused.error(404, "fine_tune_not_found", "fine_tune_id")
        call(guarded.url, method, f"/v1/mock/jobs/{job}/{path}", content, key("talker")).error(
            403, "insufficient_permissions"
        )
    for method, path, content in ours:
        assert call(guarded.url, method, f"/v1/mock/jobs/{job}/{path}", content, key("both")).status == 200
    client = guarded.new_client(SECRETS["trainer"], _strict_response_validation=False)  # OpenAI knows no such method
    guarded.clients[:] = [client]
    guarded.wait(job, "succeeded")
    client.close()


# --- keys in the configuration ----------------------------------------------------------------------------------------


def auth_config(*entries: Any) -> settings.AuthConfig:
    return convert.typed({"keys": list(entries), "insecure": False}, settings.AuthConfig, where="auth")


def test_keys_are_kept_as_hashes_only() -> None:
    kept = auth_config("plain-secret", {"name": "a", "key": "named-secret", "scopes": ["train"]})
    assert "secret" not in repr(kept)
    first, second = api_keys.entries(kept.keys)
    assert (first.scopes, first.sha256) == (["admin"], hashlib.sha256(b"plain-secret").hexdigest())
    assert (second.key, second.sha256) == (None, hashlib.sha256(b"named-secret").hexdigest())
    assert first.owner == f"key-{first.sha256[:16]}" != second.owner
    assert api_keys.entries(kept.keys) == kept.keys


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([{"name": "a", "scopes": ["train"]}], "needs either 'key' or 'sha256'"),
        ([{"name": "a", "scopes": ["train"], "key": "k1", "sha256": "0" * 64}], "needs either 'key' or 'sha256'"),
        ([{"name": "a", "scopes": ["train"], "sha256": "ab"}], "Invalid 'auth.keys[0].sha256'"),
        ([{"name": "a", "scopes": [], "key": "k1"}], "Invalid 'auth.keys[0].scopes'"),
        ([{"name": "a", "scopes": ["root"], "key": "k1"}], "Invalid 'auth.keys[0].scopes[0]'"),
        ([{"name": "a", "key": "k1"}], "Missing required parameter: 'auth.keys[0].scopes'"),
        ([{"name": "a/b", "scopes": ["train"], "key": "k1"}], "Invalid 'auth.keys[0].name'"),
        ([{"name": "a", "scopes": ["train"], "key": "k1", "tenant": ""}], "Invalid 'auth.keys[0].tenant'"),
        ([{"name": "a", "scopes": ["train"], "key": ""}], "Invalid 'auth.keys[0].key'"),
        (
            [{"name": "a", "scopes": ["train"], "key": "k1", "tennant": "x"}],
            "Unknown parameter: 'auth.keys[0].tennant'",
        ),
        (["k1", "k1"], "the same"),
        (["k1", {"name": "a", "scopes": ["train"], "key": "k1"}], "two entries have the same key"),
        ([{"name": "a", "scopes": ["train"], "key": k} for k in ("k1", "k2")], "two entries have the same name"),
        ([3], "Invalid 'auth.keys[0]'"),
    ],
)
def test_entries_that_are_refused(entries: list[Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        auth_config(*entries)
    assert says in str(caught.value)
    assert "k1" not in str(caught.value)


def test_keys_from_the_users_file_and_from_the_environment(
    start_server: Callable[..., LiveServer], tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.yaml").write_text(
        "auth:\n  keys:\n"
        '    - {name: ci, key: "it\'s:[a]{key},", scopes: [train]}\n'
        f"    - {{name: app, sha256: {hashlib.sha256(b'of-the-app').hexdigest()}, scopes: [infer], tenant: shop}}\n"
        "    - ${oc.env:OF_THE_OPERATOR}\n"
    )
    server = start_server(env={"OF_THE_OPERATOR": "from-the-environment"})
    for secret, status in [("it's:[a]{key},", 200), ("from-the-environment", 200), ("of-the-app", 403), ("x", 401)]:
        headers = {"authorization": f"Bearer {secret}"}
        assert call(server.url, "GET", "/v1/files", headers=headers).status == status


def test_arbor_key_makes_a_key_and_its_entry() -> None:
    command = [sys.executable, "-m", "arbor_core", "key"]
    made = [subprocess.run(command, capture_output=True, text=True) for _ in range(2)]
    assert all(done.returncode == 0 for done in made), made
    secrets = [done.stdout.split()[1] for done in made]
    assert len(set(secrets)) == 2
    assert hashlib.sha256(secrets[0].encode()).hexdigest() in made[0].stdout
    assert len(secrets[0]) > 40
    auth_config(secrets[0])


# --- what a key may use -----------------------------------------------------------------------------------------------


def test_a_bucket_lets_the_rate_through_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(auth.time, "monotonic", lambda: now)
    bucket = auth.Bucket(4)
    assert [bucket.take() for _ in range(5)] == [0, 0, 0, 0, 0.25]
    now += 0.25
    assert [bucket.take(), bucket.take()] == [0, 0.25]
    now += 1000
    assert sum(bucket.take() == 0 for _ in range(100)) == 4, "no more than one second's is saved"
    slow = auth.Bucket(0.1)
    assert [slow.take(), slow.take()] == [0, 10]


def test_requests_of_one_key_are_limited_and_not_those_of_another(start_server: Callable[..., LiveServer]) -> None:
    server = start_server("auth.keys=[one,two]", "limits.requests_per_second=0.01")
    one, two = {"authorization": "Bearer one"}, {"authorization": "Bearer two"}
    assert call(server.url, "GET", "/v1/files", headers=one).status == 200
    refused = call(server.url, "POST", CHAT, b"x" * 1000, one)
    assert refused.error(429, "rate_limit_exceeded")["type"] == "rate_limit_error"
    assert 90 <= int(refused.headers["retry-after"]) <= 100
    assert call(server.url, "GET", "/v1/files", headers=two).status == 200
    for _ in range(5):
        call(server.url, "GET", "/v1/files", headers={"authorization": "Bearer x"}).error(401, "invalid_api_key")
        assert call(server.url, "GET", "/health").status == 200


def test_completions_at_a_time_are_limited(start_server: Callable[..., LiveServer]) -> None:
    server = start_server("auth.keys=[one,two]", "limits.inference_requests=1")
    one, two = server.new_client("one"), server.new_client("two")
    asked: dict[str, Any] = {**ASKED, "max_tokens": 400}
    long = [{"role": "user", "content": "[mock: token_seconds=1] " + "word " * 100}]
    stream = one.chat.completions.create(**{**asked, "messages": long}, stream=True)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError) as caught:
        one.chat.completions.create(**{**asked, "max_tokens": 1})
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.response.headers["retry-after"] == "1"
    assert one.files.list().data == [], "other requests are not completions"
    assert two.chat.completions.create(**{**asked, "max_tokens": 1}).choices
    stream.close()
    patient = server.new_client("one", max_retries=5)
    assert patient.chat.completions.create(**{**asked, "max_tokens": 1}).choices, "a place is free again"
    wrong = {"model": "nobody/has", "messages": []}
    for _ in range(3):
        assert call(server.url, "POST", CHAT, wrong, {"authorization": "Bearer one"}).status in (400, 404)
    assert one.chat.completions.create(**{**asked, "max_tokens": 1}).choices, "what is refused holds no place"
