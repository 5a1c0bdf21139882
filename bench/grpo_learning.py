"""GRPO through a server against TRL's `GRPOTrainer` that samples for itself: time to the same reward.

    python bench/grpo_learning.py [--steps 120] [--seed 0] [--dir DIR]

The task is examples/demo_grpo.py's, from one checkpoint of supervised fine-tuning, with the same groups (16 words, 8
answers each), the same words in the same order, the same hyperparameters. Three runs, one after the other: `trl`, TRL
alone in its process; `ahead`, arbor-serve with the embedded engine and max_staleness 1; `strict`, with 0. Loading and
starting are not counted. `ratio`: time until the reward (mean of 20 steps) reaches what all three reach, against TRL's.

`overhead` is of `strict`, where nothing overlaps: the share of a step in which neither the client waits for its
completions nor the trainer computes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
from proxy import serving

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from demo_grpo import ANSWERS, GROUPS, metrics, question, reward, starting_point
from letters import words

from arbor_core.testing import device

SHARED: dict[str, Any] = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "beta": 0.0,
    "epsilon": 0.2,
    "loss_type": "dapo",
    "scale_rewards": "group",
    "num_generations": ANSWERS,
    "temperature": 1.0,
}
TOKENS = 12
SMOOTH = 20
Curve = list[tuple[float, float]]
"""Seconds since the beginning, and mean reward, of each step."""


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--steps", type=int, default=120)
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--dir", type=Path, help="work here, from models/start if it is there, and leave everything")
    parse.add_argument("--trl", type=Path, help=argparse.SUPPRESS)
    given = parse.parse_args()
    if given.trl:
        print(json.dumps(trl_alone(given.trl, given.steps, given.seed)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.dir or Path(scratch)
        prepare(folder, given.seed)
        command = [sys.executable, __file__, "--trl", str(folder / "models" / "start")]
        command += ["--steps", str(given.steps), "--seed", str(given.seed)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        curves: dict[str, Curve] = {"trl": json.loads(done.stdout.splitlines()[-1])}
        print("trl:", brief(curves["trl"]), flush=True)
        curves["ahead"], _ = through_server(folder, given.steps, given.seed, 1)
        print("ahead:", brief(curves["ahead"]), flush=True)
        curves["strict"], overhead = through_server(folder, given.steps, given.seed, 0)
    print(json.dumps({**compared(curves), "overhead": overhead}))


def brief(curve: Curve) -> str:
    """Of a run that is done, should there be no time for the others."""
    return ", ".join(f"{reward:.3f} after {at:.1f} s" for at, reward in curve[SMOOTH - 1 :: SMOOTH])


def prepare(folder: Path, seed: int) -> None:
    """The checkpoint that all runs start from: `models/start`."""
    if (folder / "models" / "start").is_dir():
        return
    (folder / "models").mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "arbor_core", "tiny-model", folder / "models" / "tiny"], check=True)
    storage = folder / "prepared"
    with serving(storage, f"models.dirs=['{folder / 'models'}']", mock=False) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused")
        name = starting_point(client, folder, seed)
    step = name.rpartition("-")[2]
    (found,) = storage.glob(f"**/checkpoints/{step}-*")
    states = shutil.ignore_patterns("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    draft = shutil.copytree(found, folder / "start", ignore=states)
    draft.rename(folder / "models" / "start")


# --- TRL alone --------------------------------------------------------------------------------------------------------


def trl_alone(model: Path, steps: int, seed: int) -> Curve:
    """TRL's own trainer, as its documentation has it, on this machine's GPU or CPU."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tasks = list(itertools.islice(tasks_of(seed), steps * GROUPS))
    curve: Curve = []

    def graded(prompts: Any, completions: Any, word: list[str], **_: Any) -> list[float]:
        return [reward(one, said[0]["content"]) for one, said in zip(word, completions, strict=True)]

    class Clock(TrainerCallback):
        began = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "reward" in logs:
                curve.append((time.monotonic() - self.began, logs["reward"]))

    rows = GROUPS * ANSWERS
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=rows,
        max_steps=steps,
        max_completion_length=TOKENS,
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=device().kind == "cpu",
        bf16=device().kind == "cuda",
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=seed,
        **SHARED,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=[graded],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": question(word), "word": word} for word in tasks]),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        callbacks=[Clock()],
    )
    trainer.train()
    return curve


# --- through a server -------------------------------------------------------------------------------------------------


def through_server(folder: Path, steps: int, seed: int, lead: int) -> tuple[Curve, float]:
    """The same through arbor-serve; also the share of a step that is neither sampling nor training."""
    storage = folder / f"lead-{lead}"
    with serving(storage, "+trainer=grpo", f"models.dirs=['{folder / 'models'}']", mock=False) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", timeout=300)
        client.chat.completions.create(model="start", messages=question("abc"), max_tokens=2)  # starts the engine
        config = {**SHARED, "lora": None, "groups_per_step": GROUPS, "max_staleness": lead, "max_steps": steps}
        body = {"model": "start", "seed": seed, "method": {"type": "grpo", "grpo": {"hyperparameters": config}}}
        job: Any = client.post("/fine_tuning/jobs", body=body, cast_to=object)
        ready(client, job["id"])
        spans = asyncio.run(driven(f"{url}/v1", job["id"], seed))
        reported = metrics(client, job["id"])
    times = list(itertools.accumulate(step["step_time"] for step in reported))
    curve = [(at, step["reward"]) for at, step in zip(times, reported, strict=True)]
    return curve, overhead(reported, spans) if lead == 0 else 0.0


def ready(client: openai.OpenAI, job_id: str) -> None:
    """Return when the trainer waits for its first group."""
    while not any("waiting for them" in event.message for event in client.fine_tuning.jobs.list_events(job_id)):
        time.sleep(0.05)


async def driven(base_url: str, job_id: str, seed: int) -> list[tuple[float, float]]:
    """Sample and reward until the job has made its steps; when the sampling of each group began and ended."""
    client = openai.AsyncOpenAI(base_url=base_url, api_key="unused", timeout=300)
    tasks, taken, spans = tasks_of(seed), set[int](), list[tuple[float, float]]()
    groups: set[asyncio.Task[None]] = set()
    while True:
        body = {"job_id": job_id, "wait": 10, "known": sorted(taken)[-256:]}
        status: Any = await client.post("/fine_tuning/grpo/status", body=body, cast_to=object)
        if status["status"] in ("failed", "cancelled", "succeeded"):
            break
        for batch in sorted(set(status["pending_batch_ids"]) - taken):
            taken.add(batch)
            task = asyncio.create_task(group(client, job_id, batch, next(tasks), spans))
            groups.add(task)
            task.add_done_callback(groups.discard)
    await asyncio.gather(*groups, return_exceptions=True)  # the last ones came after the last step
    await client.close()
    if status["status"] != "succeeded":
        raise SystemExit(f"the job {status['status']}: {status['error']}")
    return spans


async def group(client: openai.AsyncOpenAI, job_id: str, batch: int, word: str, spans: list[Any]) -> None:
    began = time.monotonic()
    answer = await client.chat.completions.create(
        model=job_id, messages=question(word), n=ANSWERS, temperature=1, max_tokens=TOKENS
    )
    spans.append((began, time.monotonic()))
    rewards = [
        {"completion_id": answer.id, "index": choice.index, "reward": reward(word, choice.message.content or "")}
        for choice in answer.choices
    ]
    await client.post(
        "/fine_tuning/grpo/rewards", body={"job_id": job_id, "batch_id": batch, "rewards": rewards}, cast_to=object
    )


def overhead(reported: Sequence[dict[str, Any]], spans: Sequence[tuple[float, float]]) -> float:
    """Median share of a step that is neither sampling nor training; the first two are left out."""
    ordered = sorted(spans)
    shares = []
    for number, step in list(enumerate(reported))[2:]:
        batch = ordered[number * GROUPS : (number + 1) * GROUPS]
        sampling = max(end for _, end in batch) - min(begin for begin, _ in batch)
        shares.append(1 - (sampling + step["train_time"]) / step["step_time"])
    return round(statistics.median(shares), 3)


# --- both -------------------------------------------------------------------------------------------------------------


def tasks_of(seed: int) -> Iterator[str]:
    """The words to ask for, in order."""
    return itertools.cycle(words("train", 4_000, seed))


def compared(curves: dict[str, Curve]) -> dict[str, Any]:
    """Time to the reward that every run has reached, of each, and against TRL's."""
    smooth = {name: smoothed([reward for _, reward in curve]) for name, curve in curves.items()}
    target = 0.98 * min(max(values) for values in smooth.values())
    seconds = {
        name: next(at for (at, _), value in zip(curve[SMOOTH - 1 :], smooth[name], strict=True) if value >= target)
        for name, curve in curves.items()
    }
    return {
        "target_reward": round(target, 3),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "ratio": round(seconds["ahead"] / seconds["trl"], 3),
        "ratio_strict": round(seconds["strict"] / seconds["trl"], 3),
        "step_seconds": {name: round(curve[-1][0] / len(curve), 3) for name, curve in curves.items()},
        "first_reward": {name: round(values[0], 3) for name, values in smooth.items()},
        "last_reward": {name: round(values[-1], 3) for name, values in smooth.items()},
    }


def smoothed(values: Sequence[float]) -> list[float]:
    """Means of `SMOOTH` values each."""
    return [statistics.fmean(values[at : at + SMOOTH]) for at in range(len(values) - SMOOTH + 1)]


if __name__ == "__main__":
    main()
