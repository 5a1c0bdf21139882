"""A step of `arbor-grpo` against one of TRL's own `GRPOTrainer` on the same ready batches, in one process.

    python bench/grpo_step.py [--steps 30] [--rounds 3] [--threads 2] [--full]
    ARBOR_TEST_DEVICE=cuda python bench/grpo_step.py --shape 0.4B --prompt 256 --completion 128

A step is 16 prompts of about 60 tokens with 8 completions of 8 to 24 tokens each, on the tiny model. TRL gets its batch
as tensors, so nothing is generated on either side; ours reads, checks and pads its groups inside the step. The time is
that from a step's begin to the end of its optimizer, the first step left out. Rounds alternate. `ratio` compares the
best rounds, because a machine that others use too only ever makes a round slower; `cpu_ratio` compares processor time,
the median of the rounds. Both sides begin with the same weights: `apart` is the largest difference after the last step.
`publish_share` is the time of publishing the weights as a share of the step. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

for name, value in {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(name, value)

import numpy as np
import shapes
import torch
from arbor_grpo.train import arguments, compose, no_reward
from arbor_grpo.training.micro_batches import Batch, tensors
from arbor_grpo.training.rows import with_advantages
from arbor_grpo.training.trainer import GroupTrainer
from arbor_trl.model import adapter, load_model, load_tokenizer
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging
from trl.trainer.grpo_trainer import GRPOTrainer

from arbor_core.testing import JobDirectory
from arbor_core.types import Group, Rollout
from arbor_core.worker.rollout_run import RolloutWorkerRun
from arbor_core.worker.run import open_run

PROMPTS, SIZE = 16, 8
RATE = 1e-4


def group(dice: random.Random, prompt_tokens: int, completion_tokens: int) -> Group:
    """Lengths of the prompt vary by a tenth, those of completions from a third of the longest on."""
    letters = range(97, 123)
    length = dice.randrange(prompt_tokens * 9 // 10, prompt_tokens * 11 // 10)
    prompt = np.array(dice.choices(letters, k=length), dtype="<i4").tobytes()
    rollouts = []
    for number in range(SIZE):
        completion = dice.choices(letters, k=dice.randrange(completion_tokens // 3, completion_tokens + 1))
        logps = np.array([-5.6 - dice.random() / 10 for _ in completion], dtype="<f4")
        words = np.array(completion, dtype="<i4").tobytes()
        made = Rollout(
            trajectory=number, reward=dice.random(), prompt=prompt, completion=words, logprobs=logps.tobytes()
        )
        rollouts.append(made)
    return Group(rollouts=tuple(rollouts), version=0)


def finish() -> None:
    """Wait for what a GPU has still to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Clock(TrainerCallback):
    """Wall and processor seconds of each step."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        finish()
        self.began = time.perf_counter(), time.process_time()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        finish()
        self.wall.append(time.perf_counter() - self.began[0])
        self.cpu.append(time.process_time() - self.began[1])

    def seconds(self) -> tuple[float, float]:
        """Mean of a step, without the first."""
        return statistics.fmean(self.wall[1:]), statistics.fmean(self.cpu[1:])


class Ready(GRPOTrainer):
    """TRL's trainer with batches that are there already."""

    batches: list[Batch]

    def _generate_and_score_completions(self, inputs: Any) -> Batch:
        return self.batches.pop(0)


def open_job(folder: Path, model: Path, groups: list[Group], options: argparse.Namespace) -> RolloutWorkerRun[Any]:
    keys: dict[str, Any] = {
        "groups_per_step": PROMPTS,
        "num_generations": SIZE,
        "max_steps": options.steps,
        "max_staleness": 64,
        "learning_rate": RATE,
        **({"lora": None} if options.full else {}),
    }
    job = JobDirectory(folder, "grpo", [], str(model), keys)
    job.send(*groups)
    return open_run(job.prepare(), RolloutWorkerRun)


def ours(run: RolloutWorkerRun[Any]) -> tuple[Clock, GroupTrainer, float]:
    set_seed(run.seed)
    session = compose(run)
    trainer = session.trainer
    clock = Clock()
    trainer.add_callback(clock)
    published: list[float] = []
    publish = session.publish

    def timed() -> None:
        began = time.perf_counter()
        publish()
        published.append(time.perf_counter() - began)

    session.publish = timed  # type: ignore[method-assign]
    trainer.train()
    return clock, trainer, statistics.median(published)


def theirs(run: RolloutWorkerRun[Any], groups: list[Group], steps: int) -> tuple[Clock, GRPOTrainer]:
    set_seed(run.seed)
    reader = compose(run).reader  # not trained: it reads the groups
    set_seed(run.seed)
    args = arguments(run, reader.longest)
    args.per_device_train_batch_size = args.generation_batch_size = PROMPTS * SIZE
    clock = Clock()
    trainer = Ready(
        model=load_model(run),
        args=args,
        reward_funcs=no_reward,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * PROMPTS}),
        processing_class=load_tokenizer(run),
        peft_config=adapter(run.config.lora) if run.config.lora else None,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.batches = []
    for step in range(steps):
        readings = [reader.read(each) for each in groups[step * PROMPTS : (step + 1) * PROMPTS]]
        batch = tensors(
            with_advantages(readings, run.config)[0], trainer._tokenizer.pad_token_id, trainer.accelerator.device
        )
        batch["old_per_token_logps"] = batch["sampling_per_token_logps"]
        trainer.batches.append(batch)
    trainer.train()
    return clock, trainer


def apart(a: Any, b: Any) -> float:
    """Largest difference of two models' trained weights."""
    mine, other = (dict(model.named_parameters()) for model in (a, b))
    trained = [name for name, parameter in mine.items() if parameter.requires_grad]
    return max(float((mine[name] - other[name]).detach().abs().max()) for name in trained)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", default="tiny", help="of bench/shapes.py")
    parser.add_argument("--prompt", type=int, default=60, help="tokens of a prompt, about")
    parser.add_argument("--completion", type=int, default=24, help="tokens of the longest completion")
    parser.add_argument("--full", action="store_true", help="all weights instead of an adapter")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    dice = random.Random(0)
    groups = [group(dice, options.prompt, options.completion) for _ in range(options.steps * PROMPTS)]
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shapes.make(root / "base", options.shape)
        for number in range(options.rounds):
            clock, mine, publish = ours(open_job(root / f"ours-{number}", root / "base", groups, options))
            found["ours"].append(clock.seconds())
            clock, other = theirs(
                open_job(root / f"trl-{number}", root / "base", groups, options), groups, options.steps
            )
            found["trl"].append(clock.seconds())
            print(number, {side: f"{rounds[-1][0] * 1e3:.1f} ms" for side, rounds in found.items()}, flush=True)
    best = {side: min(wall for wall, _ in rounds) for side, rounds in found.items()}
    cpu = {side: statistics.median(cpu for _, cpu in rounds) for side, rounds in found.items()}
    result = {
        "ours_ms": best["ours"] * 1e3,
        "trl_ms": best["trl"] * 1e3,
        "ratio": best["ours"] / best["trl"],
        "cpu_ratio": cpu["ours"] / cpu["trl"],
        "apart": apart(mine.policy, other.model),
        "publish_ms": publish * 1e3,
        "publish_share": publish / best["ours"],
        "parts": len(mine.parts),
    }
    print(json.dumps({"grpo_step_full" if options.full else "grpo_step": result}))


if __name__ == "__main__":
    main()
