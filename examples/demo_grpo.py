"""Reinforcement learning driven by a client, all through the `openai` package: `make demo-grpo`.

The task is that of demo.py: write a made-up word backwards. Of its supervised fine-tuning an early checkpoint is taken,
where the model is right about one time in three; from there it learns from rewards alone. The trainer never samples:
this script asks the model for answers through the chat API, grades them, and sends the rewards. The server looks up
what was sampled, token by token, and trains on exactly that, while the next answers are being sampled from the newest
policy.

    python examples/demo_grpo.py [--seed 0] [--steps 250] [--lead 1]

Two minutes on two cores, no network, no GPU. Everything is written below demo-out/grpo/.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextlib
import json
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import openai
from demo import HYPERPARAMETERS, address, exact_match, follow, serving
from letters import COUNTS, rows, words
from plot import draw_rewards
from tqdm import tqdm

OUT = Path(__file__).resolve().parent.parent / "demo-out" / "grpo"
SFT = {**HYPERPARAMETERS, "checkpoint_steps": 2, "eval_steps": None}
START_ABOVE = 0.3
"""Where reinforcement begins: at a checkpoint that is right so often, and the one before it is not."""
LEARNED_BELOW = 0.1
"""Supervised learning need not go on with such a loss."""
GROUPS, ANSWERS = 16, 8
"""Words of a step, and answers to each of them."""
GRPO: dict[str, Any] = {
    "num_generations": ANSWERS,
    "groups_per_step": GROUPS,
    "learning_rate": 2e-4,
    "lora": None,
    "scale_rewards": "group",
}
EVALUATE_EVERY = 50
AFTER_ABOVE = 0.9


def main() -> int:
    """The whole story, in order. Returns the exit status."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--steps", type=int, default=250)
    parse.add_argument("--rate", type=float, default=GRPO["learning_rate"], help="learning rate")
    parse.add_argument("--lead", type=int, default=1, help="max_staleness: 0 is strictly on policy")
    parse.add_argument("--out", type=Path, default=OUT)
    given = parse.parse_args()
    began = time.monotonic()
    shutil.rmtree(given.out, ignore_errors=True)
    (given.out / "models").mkdir(parents=True)
    with serving(given.out, "grpo") as process:
        base_url = f"{address(process, given.out)}/v1"
        client = openai.OpenAI(base_url=base_url, api_key="unused", timeout=120)
        tests = rows("test", 256, given.seed)
        start = starting_point(client, given.out, given.seed)
        scores = {0: exact_match(client, start, tests, "where reinforcement begins")}
        config = {**GRPO, "max_staleness": given.lead, "learning_rate": given.rate}
        job = client.post(
            "/fine_tuning/jobs",
            body={"model": start, "seed": given.seed, "method": {"type": "grpo", "grpo": {"hyperparameters": config}}},
            cast_to=openai.types.fine_tuning.FineTuningJob,
        )
        scores |= asyncio.run(reinforce(base_url, job.id, given.seed, given.steps))
        client.post("/fine_tuning/grpo/terminate", body={"job_id": job.id}, cast_to=object)
        follow(client, client.fine_tuning.jobs.retrieve(job.id), given.steps)
        after = scores[given.steps] = exact_match(client, job.id, tests, "after reinforcement")
        steps = metrics(client, job.id)
    seconds = time.monotonic() - began
    draw_rewards(steps, scores, given.out / "reinforcement.png")
    (given.out / "steps.json").write_text(json.dumps({"steps": steps, "scores": scores, "seconds": seconds}))
    print(f"\nHeld-out exact match: {scores[0]:.2f} before, {after:.2f} after ({len(tests)} words); {seconds:.0f} s")
    return 0 if after > AFTER_ABOVE > START_ABOVE else 1


def starting_point(client: openai.OpenAI, out: Path, seed: int) -> str:
    """A checkpoint of demo.py's job that is only just right often enough to learn from its own answers. Accuracy rises
    with the steps by and large, so that few of them have to be tried."""
    path = out / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows("train", COUNTS["train"], seed)))
    file = client.files.create(file=path, purpose="fine-tune")
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": SFT}}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, seed=seed, method=method)
    print(f"Supervised fine-tuning: {job.id}")
    while client.fine_tuning.jobs.retrieve(job.id).finished_at is None:
        losses = [step["train_loss"] for step in metrics(client, job.id)]
        if losses and losses[-1] < LEARNED_BELOW:
            with contextlib.suppress(openai.BadRequestError):  # it has just ended
                client.fine_tuning.jobs.cancel(job.id)
        time.sleep(0.5)
    checkpoints = sorted(client.fine_tuning.jobs.checkpoints.list(job.id), key=lambda one: one.step_number)
    names = {one.fine_tuned_model_checkpoint: f"step {one.step_number} (validation)" for one in checkpoints}
    checks = rows("valid", 128, seed)
    found = bisect.bisect_left(
        list(names), START_ABOVE, key=lambda name: exact_match(client, name, checks, names[name])
    )
    if found == len(names):
        raise SystemExit(f"No checkpoint of {job.id} was right in {START_ABOVE:.0%} of the words")
    return list(names)[found]


async def reinforce(base_url: str, job_id: str, seed: int, steps: int) -> dict[int, float]:
    """Sample, grade and reward until so many steps are made; returns the accuracies measured meanwhile.

    A credit (`pending_batch_ids`) is a group that the trainer can use: each is taken by a task of its own.
    """
    client = openai.AsyncOpenAI(base_url=base_url, api_key="unused", timeout=120)
    draw = random.Random(seed)
    train, checks = words("train", 16_000, seed), rows("test", 128, seed)
    scores: dict[int, float] = {}
    taken: set[int] = set()
    groups: set[asyncio.Task[None]] = set()
    with tqdm(total=steps, unit="step", mininterval=1) as bar:
        while True:
            body = {"job_id": job_id, "wait": 5, "known": sorted(taken)[-256:]}
            status: Any = await client.post("/fine_tuning/grpo/status", body=body, cast_to=object)
            if status["status"] in ("failed", "cancelled", "succeeded"):
                raise SystemExit(f"The job {status['status']}: {status.get('error')}")
            version = status["policy_version"]
            bar.update(version - bar.n)
            if version >= steps:
                break
            due = version // EVALUATE_EVERY * EVALUATE_EVERY
            if due and due not in scores:
                scores[due] = await accuracy(client, job_id, checks)
                bar.write(f"  step {due}: held-out exact match {scores[due]:.2f}")
            for batch in status["pending_batch_ids"]:
                if batch not in taken:
                    taken.add(batch)
                    task = asyncio.create_task(group(client, job_id, batch, draw.choice(train)))
                    groups.add(task)
                    task.add_done_callback(groups.discard)
    await asyncio.gather(*groups, return_exceptions=True)
    await client.close()
    return scores


async def group(client: openai.AsyncOpenAI, job_id: str, batch: int, word: str) -> None:
    """Ask for several answers to one word, grade them, send the rewards."""
    answer = await client.chat.completions.create(
        model=job_id, messages=question(word), n=ANSWERS, temperature=1, max_tokens=12
    )
    rewards = [
        {"completion_id": answer.id, "index": choice.index, "reward": reward(word, choice.message.content or "")}
        for choice in answer.choices
    ]
    body = {"job_id": job_id, "batch_id": batch, "rewards": rewards}
    await client.post("/fine_tuning/grpo/rewards", body=body, cast_to=object)


def reward(word: str, answer: str) -> float:
    """1 for the word backwards; else half the share of the places that are right, and a quarter for the right length:
    without it the model settles for leaving out the last letter of long words, and never tries anything else."""
    wanted = word[::-1]
    if answer == wanted:
        return 1.0
    right = sum(a == b for a, b in zip(wanted, answer, strict=False)) / max(len(wanted), len(answer))
    return 0.5 * right + 0.25 * (len(answer) == len(wanted))


def question(word: str) -> Any:
    return [{"role": "user", "content": f"reverse: {word}"}]


async def accuracy(client: openai.AsyncOpenAI, model: str, checks: list[dict[str, Any]]) -> float:
    """Share of held-out words that come out right at temperature 0."""

    async def right(row: dict[str, Any]) -> bool:
        asked, expected = row["messages"]
        answer = await client.chat.completions.create(model=model, messages=[asked], temperature=0, max_tokens=12)
        return answer.choices[0].message.content == expected["content"]

    return sum(await asyncio.gather(*map(right, checks))) / len(checks)


def metrics(client: openai.OpenAI, job_id: str) -> list[dict[str, Any]]:
    """What the job reported of each step, oldest first."""
    events = client.fine_tuning.jobs.list_events(job_id, limit=100)
    return [dict(event.data) for event in events if event.type == "metrics"][::-1]  # type: ignore[call-overload]


if __name__ == "__main__":
    sys.exit(main())
