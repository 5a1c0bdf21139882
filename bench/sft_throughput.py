"""Tokens per second of `arbor-sft` against a plain TRL script, on the same model, data and machine, in one run.

    python bench/sft_throughput.py [--steps 12] [--rounds 3] [--threads 2] [--shape tiny]

Two kinds of rows: all of one length, where the trainers should do the same work (same settings, at least 0.97 of TRL),
and log-normal lengths from 20 to 1,000 tokens (our defaults, at least 1.5 times). Both sides take the same rows in each
optimizer step and start from the same weights, so their losses must agree.

Only tokens that are not padding count. The time is that of the steps, from the end of the first; rounds alternate
between the two sides. `ratio` compares the best round of each, because a machine that others use too only ever makes a
round slower; `cpu_ratio` compares tokens per second of processor time, the median of the rounds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

for name, value in {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(name, value)

import shapes
import torch
from arbor_sft import SftConfig as ArborConfig
from arbor_sft import plan
from arbor_sft.rows import load
from arbor_sft.train import train
from arbor_trl.chat import ChatFormat
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from arbor_core.config.convert import load_yaml, merged, typed
from arbor_core.jobdir.documents import JobDocument, write_order
from arbor_core.storage.codec import encode
from arbor_core.testing import device
from arbor_core.types import AttemptOrder, Placement
from arbor_core.worker.file_run import FileWorkerRun
from arbor_core.worker.run import open_run

BATCH = 16
RATE = 1e-3
SEED = 1


def write_rows(path: Path, kind: str, count: int) -> Path:
    """Chat rows; the tiny model's tokens are bytes, its template adds 9."""
    draw = random.Random(0)
    lines = []
    for _ in range(count):
        length = 200 if kind == "equal" else int(min(1000, max(20, draw.lognormvariate(5.0, 1.0))))
        letters = "".join(draw.choices("abcdefgh ", k=length - 9))
        cut = len(letters) // 3
        messages = [{"role": "user", "content": letters[:cut]}, {"role": "assistant", "content": letters[cut:]}]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines))
    return path


@dataclass
class Run:
    """When each step ended (seconds of the clock and of the processor), and its loss."""

    ends: list[tuple[float, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self, loss: float) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))
        self.losses.append(loss)

    def speeds(self, tokens: int) -> tuple[float, float]:
        (wall, cpu), (last_wall, last_cpu) = self.ends[0], self.ends[-1]
        return tokens / (last_wall - wall), tokens / (last_cpu - cpu)


class Watch(TrainerCallback):  # type: ignore[misc]
    def __init__(self, run: Run) -> None:
        self.run = run

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.run.step(logs["loss"])


def plain(model: Path, rows: Path, folder: Path, steps: int) -> Run:
    """What a user of TRL would write, given tokens with labels. The rows are laid out in the order of our plan."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    samples = load(rows, ChatFormat(tokenizer), 2048, "truncate", "training_file").kept
    order = [row for step in schedule([len(s.ids) for s in samples], steps).steps for part in step for row in part]
    run = Run()
    trainer = SFTTrainer(
        model=str(model),
        args=SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_length=None,
            gradient_checkpointing=False,
            bf16=device().kind == "cuda",
            use_cpu=device().kind == "cpu",
            model_init_kwargs={"dtype": "float32"},
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            seed=SEED,
        ),
        train_dataset=Dataset.from_list([{"input_ids": samples[r].ids, "labels": samples[r].labels} for r in order]),
        processing_class=tokenizer,
        callbacks=[Watch(run)],
    )
    trainer.train()
    return run


def schedule(lengths: list[int], steps: int) -> plan.Plan:
    """The plan that the job below makes."""
    budget = plan.Budget(1 << 30, 0)
    sizes: dict[str, Any] = {
        "batch_size": BATCH,
        "epochs": 1,
        "max_steps": steps,
        "seed": SEED,
        "micro_batch_size": None,
    }
    return plan.make(lengths, layout="padded", budget=budget, **sizes)


def ours(model: Path, rows: Path, folder: Path, steps: int, threads: int) -> Run:
    """A job as a worker runs it, with our defaults but for what defines the optimisation."""
    same = {"lora": None, "batch_size": BATCH, "n_epochs": 1, "max_steps": steps, "learning_rate": RATE}
    same |= {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    config = merged(load_yaml(Path(str(files("arbor_sft") / "conf/trainer/sft.yaml"))), same)
    typed(config, ArborConfig, "config")
    attempt = folder / "attempts" / "1"
    attempt.mkdir(parents=True)
    document = JobDocument(
        storage="storage_bench",
        job_id="ftjob-bench",
        trainer="sft",
        config=config,
        model=None,
        model_name="tiny",
        training_file=str(rows),
        seed=SEED,
        created_at=time.time(),
        threads=threads,
    )
    (folder / "job.json").write_bytes(encode(document))
    names = {"entry": "arbor_sft.train:train", "config_type": "arbor_sft:SftConfig"}
    order = AttemptOrder(attempt, (), {}, sys.executable, base=str(model), **names)
    write_order(order, Placement((device(),), threads))
    job, run = open_run(attempt, FileWorkerRun), Run()
    report = job.metrics

    def metrics(step: int, total_steps: int, digest: str | None = None, /, **values: float) -> None:
        report(step, total_steps, digest, **values)
        run.step(values["train_loss"])

    job.metrics = metrics  # type: ignore[method-assign]
    train(job)
    return run


def compare(kind: str, steps: int, rounds: int, threads: int, folder: Path) -> dict[str, float]:
    model = folder / "base"
    rows = write_rows(folder / f"{kind}.jsonl", kind, BATCH * steps)
    samples = load(rows, ChatFormat(AutoTokenizer.from_pretrained(model)), 2048, "truncate", "training_file")
    made = schedule(samples.lengths, steps)
    tokens = sum(samples.lengths[row] for step in made.steps[1:] for part in step for row in part)
    runs: dict[str, list[Run]] = {"plain": [], "ours": []}
    for number in range(rounds):
        for name in ("plain", "ours") if number % 2 == 0 else ("ours", "plain"):
            place = folder / f"{kind}-{name}-{number}"
            run = plain(model, rows, place, steps) if name == "plain" else ours(model, rows, place, steps, threads)
            runs[name].append(run)
            wall, cpu = run.speeds(tokens)
            print(f"{kind:10}{name:6}{wall:8.0f} tokens/s {cpu:8.0f} per CPU second, final loss {run.losses[-1]:.6f}")
    speeds = {name: [run.speeds(tokens) for run in found] for name, found in runs.items()}
    best = {name: max(wall for wall, _ in found) for name, found in speeds.items()}
    cpu = statistics.median(a / b for (_, a), (_, b) in zip(speeds["ours"], speeds["plain"], strict=True))
    mine, theirs = runs["ours"][-1].losses, runs["plain"][-1].losses
    return {
        "ratio": round(best["ours"] / best["plain"], 3),
        "cpu_ratio": round(cpu, 3),
        "ours_tokens_per_s": round(best["ours"]),
        "plain_tokens_per_s": round(best["plain"]),
        "ours_final_loss": mine[-1],
        "plain_final_loss": theirs[-1],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(mine, theirs, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", default="tiny", help="of bench/shapes.py")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shapes.make(folder / "base", given.shape)
        results = {
            f"sft_{kind}": compare(kind, given.steps, given.rounds, given.threads, folder)
            for kind in ("equal", "lognormal")
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
