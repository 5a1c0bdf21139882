"""How long a policy takes from the trainer's memory until it answers: LoRA and full weights, a tiny model and 100 MB.

    python bench/weights.py [--versions 20] [--shapes tiny,100MB]

A real worker publishes real weights; a real dispatcher takes its events and the embedded engine loads them, all on this
machine. `save` is writing the files, `told` from there until the server loads (event, commit), `load` until new
completions come from them; `memcpy` is one copy of the same bytes in memory. Medians. `of_a_step` compares the tiny
model's with a step of it, sampling and training, as bench/grpo_learning.py has measured it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from run import RESULTS

from arbor_core.types import RolloutConfig

Rows = dict[str, dict[str, float]]


class Settings(RolloutConfig, frozen=True, kw_only=True):
    """What the server reads of the worker's configuration: whether all weights are trained."""

    lora: int | None


def train(run: Any) -> None:
    """The worker: publishes what lies in `update` beside the model, as often as the bench asks for it."""
    from safetensors.torch import load_file, save_file

    update = Path(run.model) / "update"
    weights = next(update.glob("*.safetensors"))
    place = "cuda" if any(device.kind == "cuda" for device in run.devices) else "cpu"
    tensors = {name: tensor.to(place, copy=True) for name, tensor in load_file(weights).items()}
    version = 0
    while run.desired() == "run":
        asked = json.loads((update / "asked").read_text() or "0") if (update / "asked").exists() else 0
        if asked == version:
            time.sleep(0.005)
            continue
        version = asked
        began = time.time()
        with run.publish(version, version) as folder:
            for config in update.glob("*.json"):
                shutil.copy(config, folder)
            save_file(tensors, folder / weights.name)
        (update / f"saved-{version}").write_text(json.dumps([began, time.time()]))


def make(folder: Path, shape: str, full: bool) -> int:
    """A base model, and what its trainer publishes; returns the bytes of that."""
    import shapes
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    shapes.make(folder, shape)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if not full:
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    model.save_pretrained(folder / "update")
    (folder / "update" / "README.md").unlink(missing_ok=True)
    return next((folder / "update").glob("*.safetensors")).stat().st_size


def step_seconds() -> float:
    """A step of the tiny model on policy: 128 short completions, and the training on them."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if "grpo_learning" not in results:
        raise SystemExit("bench/results.json has no step to compare with: python bench/run.py grpo_learning")
    return float(results["grpo_learning"]["figures"]["step_seconds"]["strict"])


def memcpy_seconds(size: int) -> float:
    """One copy of so many bytes."""
    import torch

    source = torch.ones(size, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


async def measure(model: Path, storage: Path, full: bool, versions: int) -> dict[str, float]:
    """Medians of the parts of an update, in milliseconds."""
    from weights import Settings  # the worker imports it from there, too

    from arbor_core import plugins
    from arbor_core.application.system import open_system
    from arbor_core.config.compose import serve_settings
    from arbor_core.jobs.records import JobSpec, NewJob

    settings = serve_settings(f"storage={storage}", f"models.dirs=[{model.parent}]", "threads=1")
    system = open_system(settings, plugins.load([]), None)
    worker = dataclasses.replace(
        system.trainers["mock_grpo"].trainer,
        config=Settings,
        entry="weights:train",
        preload=("weights", "torch", "safetensors.torch"),
    )
    known = {**system.dispatcher.trainers, "mock_grpo": worker}
    system.dispatcher.trainers = system.dispatcher.checking.trainers = known
    values = {**system.trainers["mock_grpo"].values, "lora": None if full else 16}
    values = {name: values[name] for name in Settings.__struct_fields__}
    spec = JobSpec("mock_grpo", "grpo", values, "base", str(model), 0, input="rollouts", trains_adapter=not full)
    async with system.running():
        job = await system.jobs.create(NewJob("me", "", None, None, {}, spec))
        system.dispatcher.wake()
        async with system.engines.using(system.models.resolve(job.id, "me")):
            rows = [await one(system, job.id, model / "update", number) for number in range(1, versions + 1)]
        await system.jobs.set_desired(job.id, "cancel")
        system.dispatcher.wake(job.id)
        while (found := system.jobs.get(job.id)) and found.status != "cancelled":  # noqa: ASYNC110 - a status is a row
            await asyncio.sleep(0.02)
    warm = rows[2:]
    return {part: round(1000 * statistics.median(row[part] for row in warm), 2) for part in warm[0]}


async def one(system: Any, job_id: str, update: Path, version: int) -> dict[str, float]:
    """Ask for a version, and see when it was begun, saved, heard of and loaded."""
    heard: dict[str, float] = {}
    refresh = system.weight_sync.refresh

    async def timed(policy: Any) -> None:
        heard["began"] = time.time()
        await refresh(policy)
        heard["ended"] = time.time()

    system.weight_sync.refresh = timed
    draft = update / "asking"
    draft.write_text(str(version))
    draft.rename(update / "asked")
    while "ended" not in heard or not (update / f"saved-{version}").exists():
        await asyncio.sleep(0.002)
        found = system.jobs.get(job_id)
        assert found.error is None, found.error
    system.weight_sync.refresh = refresh
    assert system.models.resolve(job_id, "me").version == version
    began, saved = json.loads((update / f"saved-{version}").read_text())
    return {
        "save_ms": saved - began,
        "told_ms": heard["began"] - saved,
        "load_ms": heard["ended"] - heard["began"],
        "total_ms": heard["ended"] - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=20, help="how many are published")
    parser.add_argument("--shapes", default="tiny,100MB", help="of bench/shapes.py")
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).parent)]))
    results: Rows = {}
    shapes = given.shapes.split(",")
    step = step_seconds() if "tiny" in shapes else 0.0
    for size in shapes:
        for full in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                count = make(Path(folder) / "models" / "base", size, full)
                base, storage = Path(folder) / "models" / "base", Path(folder) / "data"
                found = asyncio.run(measure(base, storage, full, given.versions))
            found |= {"bytes": count, "memcpy_ms": round(1000 * memcpy_seconds(count), 3)}
            if size == "tiny":
                found["of_a_step"] = round(found["total_ms"] / 1000 / step, 4)
            results[f"{size}_{'full' if full else 'lora'}"] = found
            print(f"{size} {'full' if full else 'lora'}: {found}", flush=True)
    print(json.dumps({"weights": results}))


if __name__ == "__main__":
    main()
