"""What is asked of a server, over HTTP only, by the script that wrote the old storage and by the test that opens it."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from http_calls import MULTIPART, call, form
from live import LiveServer

ARCHIVE = Path(__file__).with_name("storage.tar.xz")
EXPECTED = Path(__file__).with_name("expected.json")
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")
JOBS = "/v1/fine_tuning/jobs"
GRPO = "/v1/fine_tuning/grpo"
NAMES = ("mock", "real")
"""The storages in the archive: one that needs no deep-learning library, one of real trainers."""
TEXT = b"One text\nin two parts.\n"
CUT = 9
"""Where `TEXT` is cut into its two parts; only the first was sent."""


def options(name: str, root: Path) -> dict[str, Any]:
    """How `live.launch` starts the server of a storage, whose archive lies unpacked at `root`: with what whoever moves
    a storage directory gives a server too, and with as many devices to train on as when it was written."""
    if name == "mock":
        return {"overrides": ["gpu.train=[0,1]", "threads=1"], "mock": True}
    return {"overrides": ["gpu.train=[0]", "threads=1", f"models.dirs=[{root / 'models'}]"], "mock": False}


def wait_for(condition: Callable[[], Any], seconds: float = 180, pause: float = 0.02) -> Any:
    """The first thing a condition says that counts as true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)
    return found


def get(server: LiveServer, path: str) -> dict[str, Any]:
    answer = call(server.url, "GET", path)
    assert answer.status == 200, answer.body
    return dict(answer.json)


def post(server: LiveServer, path: str, **body: Any) -> dict[str, Any]:
    answer = call(server.url, "POST", path, body)
    assert answer.status == 200, answer.body
    return dict(answer.json)


def state(server: LiveServer, job_id: str) -> str:
    return str(get(server, f"{JOBS}/{job_id}")["status"])


def learns(server: LiveServer) -> bool:
    """Whether the server has GRPO's routes: they come with a plugin."""
    return f"{GRPO}/status" in get(server, "/schema/openapi.json")["paths"]


def standing(server: LiveServer, job_id: str) -> dict[str, Any]:
    """How a job that learns from rollouts stands, without the batch ids that are offered now."""
    found = post(server, f"{GRPO}/status", job_id=job_id)
    del found["pending_batch_ids"]
    return found


def shown(server: LiveServer, job_id: str) -> dict[str, Any]:
    """All that a server tells of a job; events and checkpoints oldest first."""
    path = f"{JOBS}/{job_id}"
    events = get(server, f"{path}/events?limit=1000&superseded=true")
    for event in events["data"]:
        event.pop("superseded", None)  # a step that was made again after it was shown
    checkpoints = get(server, f"{path}/checkpoints?limit=1000")
    assert not events["has_more"]
    return {"job": get(server, path), "events": events["data"][::-1], "checkpoints": checkpoints["data"][::-1]}


def steps(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Each step as the newest attempt that made it reported it: its digest, or its loss where there are no digests."""
    found = [event["data"] for event in events if event["type"] == "metrics"]
    return {str(data["step"]): data.get("digest", data["train_loss"]) for data in found}


def begin_upload(server: LiveServer) -> dict[str, str]:
    """Begin an upload in parts and send the first one."""
    body = {"bytes": len(TEXT), "filename": "parts.txt", "mime_type": "text/plain", "purpose": "user_data"}
    upload = post(server, "/v1/uploads", **body)["id"]
    return {"upload": upload, "part": send_part(server, upload, TEXT[:CUT])}


def send_part(server: LiveServer, upload: str, content: bytes) -> str:
    answer = call(server.url, "POST", f"/v1/uploads/{upload}/parts", form(("data", content, "upload")), MULTIPART)
    assert answer.status == 200, answer.body
    return str(answer.json["id"])


def chat(server: LiveServer, model: str, **more: Any) -> Any:
    """A completion of a model, over the stock client."""
    messages = [{"role": "user", "content": "one two three"}]
    return server.client.chat.completions.create(model=model, messages=messages, max_tokens=8, **more)  # type: ignore[call-overload]


def answer(server: LiveServer, model: str) -> str:
    """The likeliest completion of a model."""
    return str(chat(server, model, temperature=0).choices[0].message.content)


def item(reward: float, text: str) -> dict[str, Any]:
    """One completion of a group, as text."""
    answer = {"role": "assistant", "content": text}
    return {"messages": [{"role": "user", "content": "say it"}], "completion": answer, "reward": reward}


def replayed(job_id: str, storage: Path) -> str:
    """What `arbor replay` says of a job at the end; it fails where a step comes out otherwise."""
    command = [str(Path(sys.executable).with_name("arbor")), "replay", job_id, "--storage", str(storage)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


def here() -> dict[str, Any]:
    """What a real trainer's numbers depend on, beside what is in a job's directory."""
    try:
        libraries = {library: version(library) for library in LIBRARIES}
    except PackageNotFoundError:
        libraries = {}
    words = set(Path("/proc/cpuinfo").read_text().split())
    return {
        "machine": platform.machine(),
        "vendor": next((word for word in ("GenuineIntel", "AuthenticAMD") if word in words), ""),
        "instructions": next((word for word in ("avx512f", "avx2") if word in words), ""),
        "threads": 1,
        "gpu": Path("/dev/nvidiactl").exists(),
        **libraries,
    }
