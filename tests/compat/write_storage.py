"""Writes `storage.tar.xz` and `expected.json`: what servers of commit 10927f4 leave on a disk. See README.md.

It drives two servers over HTTP until their jobs are in every state, kills them and packs their storage directories.
Then it starts the same servers on them again, lets what had not ended come to its end, and notes what became of it, for
the test to compare with. What an undisturbed run gives is said by other jobs with the same seed and file, and by
`arbor replay`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from compat.calls import (  # noqa: E402
    ARCHIVE,
    EXPECTED,
    GRPO,
    JOBS,
    NAMES,
    answer,
    begin_upload,
    here,
    options,
    post,
    replayed,
    shown,
    standing,
    state,
    steps,
    wait_for,
)
from compat.make_jobs import Jobs, handled, make_mock, make_real, send_text  # noqa: E402
from live import LiveServer, launch  # noqa: E402

ROOT = Path("/tmp/arbor-compat")
"""Where it is written. This path is all over the archive; no test needs it."""
PYTHON = ROOT / "venv" / "bin" / "python"
FOR_YEARS = "limits.upload_seconds=1000000000"
"""So that the upload in parts can still be completed when a test opens it."""
SCRATCH = ("engines", "run", "lock", "worker.log", "arbor.db-shm")
"""What a storage directory holds for nobody but processes that live, and what people read."""


def main() -> None:
    """Write both files anew."""
    if Path(sys.executable) != PYTHON:  # HEAD notes its interpreter's path too: let it be a neutral one
        shutil.rmtree(ROOT, ignore_errors=True)
        PYTHON.parent.parent.parent.mkdir(parents=True)
        PYTHON.parent.parent.symlink_to(sys.prefix)
        os.execv(PYTHON, [str(PYTHON), __file__])
    small_model(ROOT / "models" / "tiny")
    jobs = {name: written(name) for name in NAMES}
    pack()
    written_with = {"commit": "10927f4", "root": str(ROOT), **here()}
    expected = {"written": written_with, **{name: finished(name, jobs[name]) for name in NAMES}}
    EXPECTED.write_text(json.dumps(expected, indent=1) + "\n")


def small_model(folder: Path) -> None:
    """The tiny model's tokenizer on one narrow layer: some 7,000 parameters."""
    import torch
    from arbor_sft.tiny import tokenizer
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokens = tokenizer(256)
    config = Qwen2Config(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)


@contextmanager
def serving(name: str) -> Iterator[LiveServer]:
    """A server on the storage directory of this name, which ends whatever comes."""
    chosen = options(name, ROOT)
    server = launch(ROOT / name, *chosen.pop("overrides"), FOR_YEARS, **chosen)
    try:
        yield server
    finally:
        server.stop()


def written(name: str) -> dict[str, Any]:
    """Fill a storage directory, and kill all that works in it; returns what there is."""
    with serving(name) as server:
        try:
            jobs = {"mock": make_mock, "real": make_real}[name](server)
            found = {
                "upload": begin_upload(server),
                "training_file": jobs.file,
                "unrewarded": jobs.unrewarded,
                "answers": {model: answer(server, model) for model in results(jobs)},
                "files": [file.id for file in server.client.files.list()],
                "models": [model.id for model in server.client.models.list()],
                "jobs": {job: described(server, job_id) for job, job_id in jobs.ids.items()},
            }
            answers = {job_id: shown(server, job_id) for job_id in jobs.ids.values()}
        finally:
            processes = list(working(server.storage))
            server.stop(signal.SIGKILL)
            for process in processes:
                kill(process)
    (ROOT / name / "shown.json").write_text(json.dumps(answers))
    return found


def working(storage: Path) -> Iterator[int]:
    """The keepers, workers and engines of a server."""
    for path in (*storage.glob("jobs/*/attempts/*/keeper"), *storage.glob("engines/*/process")):
        process = int(path.read_text().partition(":")[0])
        children = Path(f"/proc/{process}/task/{process}/children")
        if children.exists() and str(storage).encode() in Path(f"/proc/{process}/cmdline").read_bytes():
            yield from (process, *map(int, children.read_text().split()))


def results(jobs: Jobs) -> list[str]:
    """What can be chatted with: results, a checkpoint of theirs, and one that has a name."""
    made = [name for name in ("succeeded", "lora", "full", "grpo_succeeded") if name in jobs.ids]
    learner = jobs.ids["grpo_succeeded"]
    return [*map(jobs.model, made), f"{jobs.model(made[0])}:ckpt-step-2", learner, f"{learner}:best"]


def kill(process: int) -> None:
    """SIGKILL, and wait for the end of it."""
    stat = Path(f"/proc/{process}/stat")
    if stat.exists():
        os.kill(process, signal.SIGKILL)
        wait_for(lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX")


def described(server: LiveServer, job_id: str) -> dict[str, Any]:
    """A job in short."""
    seen = shown(server, job_id)
    found = {
        "id": job_id,
        "state": seen["job"]["status"],
        "model": seen["job"]["fine_tuned_model"],
        "checkpoints": [checkpoint["fine_tuned_model_checkpoint"] for checkpoint in seen["checkpoints"]],
        "steps": steps(seen["events"]),
    }
    if "grpo" in str(seen["job"]["method"]):
        found["grpo"] = standing(server, job_id)
    return found


def pack() -> None:
    """Both storage directories as they are now, the model, and what the servers told of their jobs."""

    def neutral(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return None if Path(entry.name).name in SCRATCH else entry

    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
        archive.add(ROOT / "models", "models", filter=neutral)
        for name in NAMES:
            for part in ("data", "shown.json"):
                archive.add(ROOT / name / part, f"{name}/{part}", filter=neutral)


def finished(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Let all jobs come to their ends on the next server, and see that they are those of undisturbed runs."""
    with serving(name) as server:
        ids = {job: one["id"] for job, one in found["jobs"].items()}
        for job in ("paused", "grpo_paused"):
            post(server, f"{JOBS}/{ids[job]}/resume")
        if name == "mock":
            wait_for(lambda: state(server, ids["grpo_killed"]) == "succeeded")
            send_text(server, ids["grpo_queued"], "first")
            handled(server, ids["grpo_queued"], 1)
            post(server, f"{GRPO}/terminate", job_id=ids["grpo_queued"])
        handled(server, ids["grpo_paused"], 4)
        post(server, f"{GRPO}/terminate", job_id=ids["grpo_paused"])
        full = found["jobs"].get("full", {}).get("model")
        again = Jobs(server, name)
        for job in ("paused", "killed", "queued"):
            server.wait(ids[job], "succeeded")
            twin = again.submit(job, full if job == "queued" else None)
            server.wait(twin, "succeeded")
            same = [steps(shown(server, one)["events"]) for one in (ids[job], twin)]
            assert same[0] == same[1], (job, same)
        for one in found["jobs"].values():
            end = described(server, one["id"])
            one["after"] = {key: end[key] for key in ("state", "model", "checkpoints", "steps")}
    for job, one in found["jobs"].items():
        if one["after"]["state"] == "succeeded":
            print(name, job, replayed(one["id"], ROOT / name / "data"), flush=True)
    return found


if __name__ == "__main__":
    main()
