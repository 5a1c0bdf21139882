"""A program that has a server in itself, as a notebook has: `python notebook.py FOLDER foreign|untouched`.

Its main thread has an event loop that goes on; the server works in another thread, twice, one after the other. Prints
as JSON what was answered, and how the process was before and afterwards.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp  # noqa: F401 - what the first completion would import
import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.version import VersionBase
from omegaconf import OmegaConf

from arbor_core import ArborError, open_system, serve_settings

TASKS = "/proc/self/task"
PATIENCE = 60.0
ROW = {"messages": [{"role": "user", "content": "color?"}, {"role": "assistant", "content": "green"}]}


def state() -> dict[str, Any]:
    """All that a server could leave behind in this process."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    umask = os.umask(0)
    os.umask(umask)
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "tasks": len(os.listdir(TASKS)),
        "children": children,
        "descriptors": descriptors(),
        "signals": {str(number): id(signal.getsignal(number)) for number in signal.valid_signals()},
        "environment": dict(os.environ),
        "temporary": sorted(os.listdir(tempfile.gettempdir())),
        "frozen": gc.get_freeze_count(),
        "place": [os.getcwd(), umask],
        "hydra": [
            id(GlobalHydra.instance().hydra),
            str(VersionBase.instance().version_base),
            sorted(str(plugin) for plugin in Plugins.instance().discover(SearchPathPlugin)),
            sorted(name for name in ("hydra", "now", "python_version") if OmegaConf.has_resolver(name)),
        ],
    }


def descriptors() -> dict[str, int]:
    """Open descriptors by what they are of."""
    found: Counter[str] = Counter()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(link)
        except FileNotFoundError:  # of this listing
            continue
        found[target.partition(":")[0]] += 1
    return dict(found)


async def work(folder: Path) -> dict[str, Any]:
    """What somebody does with a server."""
    settings = serve_settings(f"storage={folder}/storage", "allocator=mock", "inference=mock", "+trainer=mock")
    async with open_system(settings).running() as arbor:
        try:
            open_system(settings)
            second = "opened"
        except ArborError as error:
            second = str(error)
        rows = b"".join(json.dumps(ROW).encode() + b"\n" for _ in range(12))
        file = await arbor.file_service.create(rows, "rows.jsonl")
        job = await arbor.job_service.create({"model": "mock/tiny", "training_file": file.id})
        job = await arbor.job_service.wait(job.id)
        request = {"model": job.fine_tuned_model, "messages": ROW["messages"][:1], "max_tokens": 8}
        answer = await arbor.completion_service.chat(request)
        deltas = [event["choices"][0]["delta"] async for event in arbor.completion_service.stream_chat(request)]
        return {
            "status": job.status,
            "answer": answer["choices"][0]["message"]["content"],
            "streamed": "".join(delta.get("content") or "" for delta in deltas),
            "second": second,
            "files": [one.filename for one in (await arbor.file_service.list_files()).data],
            "models": [one.id for one in arbor.model_service.list_models().data],
            "model": job.fine_tuned_model,
            "pid": os.getpid(),
        }


async def notebook(folder: Path) -> None:
    """The main thread."""
    before, results = state(), []
    for _ in range(2):
        thread = threading.Thread(target=lambda: results.append(asyncio.run(work(folder))), name="cell")
        thread.start()
        while thread.is_alive():
            await asyncio.sleep(0.02)
        thread.join()
    deadline = time.monotonic() + PATIENCE
    while len(os.listdir(TASKS)) > before["tasks"] and time.monotonic() < deadline:
        await asyncio.sleep(0.02)  # a thread that was joined is the kernel's for a moment longer
    after = state()
    if GlobalHydra.instance().is_initialized():
        after["composed"] = OmegaConf.to_container(hydra.compose("serve"))
    print(json.dumps({"before": before, "after": after, "results": results}))


def main() -> None:
    folder = Path(sys.argv[1])
    if sys.argv[2] == "foreign":
        (folder / "foreign" / "launcher").mkdir(parents=True)
        (folder / "foreign" / "serve.yaml").write_text("defaults: [launcher: mine, _self_]\nport: nowhere\n")
        (folder / "foreign" / "launcher" / "mine.yaml").write_text("rocket: true\n")
        hydra.initialize_config_dir(str(folder / "foreign"), version_base="1.2")
    asyncio.run(notebook(folder))


if __name__ == "__main__":
    main()
