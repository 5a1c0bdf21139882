"""Fine-tune a model and talk to it, all through the `openai` package: `make demo`, or `python examples/demo.py`.

The task is to write a made-up word backwards. The base model is made on the spot: one million parameters with random
weights, so it knows nothing at first. Examples are split by a checksum of the word (see letters.py): no word that is
tested was trained on, and learning words by heart does not help. Under two minutes on two cores, no network, no GPU.

Everything is written below demo-out/, which is removed at the start.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
from letters import COUNTS, Split, rows
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from plot import draw
from tqdm import tqdm

OUT = Path(__file__).resolve().parent.parent / "demo-out"
BIN = Path(sys.executable).parent
SEED = 0
STEPS = 200
# All weights (no adapter): a model with random weights has everything to learn.
HYPERPARAMETERS = {
    "max_steps": STEPS,
    "batch_size": 64,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "lora": None,
    "eval_steps": 10,
    "checkpoint_steps": 50,
}
BEFORE_BELOW, AFTER_ABOVE = 0.1, 0.8


def main() -> int:
    """The whole story, in order. Returns the exit status."""
    began = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "models").mkdir(parents=True)
    with serving(OUT, "sft") as process:
        files = prepare()
        client = openai.OpenAI(base_url=f"{address(process, OUT)}/v1", api_key="unused", timeout=120)
        print("Models:", ", ".join(model.id for model in client.models.list()))

        tests = rows("test", COUNTS["test"], SEED)
        scores = {0: exact_match(client, "tiny", tests, "the base model")}
        job = train(client, files)
        for checkpoint in reversed(list(client.fine_tuning.jobs.checkpoints.list(job.id))):
            name, step = checkpoint.fine_tuned_model_checkpoint, checkpoint.step_number
            if step < STEPS:  # the last one is the model itself
                scores[step] = exact_match(client, name, tests, name)
        model = str(job.fine_tuned_model)
        after = scores[STEPS] = exact_match(client, model, tests, model)
        chat(client, model, tests)
        table = save_results(client, job)
    draw(table, scores, OUT / "learning.png")
    print(f"\nHeld-out exact match: {scores[0]:.2f} before, {after:.2f} after ({len(tests)} words)")
    print(f"Metrics of every step: {shown(table)}\nLearning curve:        {shown(OUT / 'learning.png')}")
    print(f"Took {time.monotonic() - began:.0f} s")
    return verdict(scores[0], after)


@contextmanager
def serving(out: Path, trainer: str) -> Iterator[subprocess.Popen[str]]:
    """`arbor-serve` with storage of its own on a free port, and the base model `tiny`; ended at the end of the block,
    whatever happens.

    `+trainer=sft` warms its libraries up at once, while the model and the data are being made.
    """
    command = [BIN / "arbor-serve", "port=0", f"storage={out / 'storage'}", f"models.dirs=[{out / 'models'}]"]
    environment = {**os.environ, "ARBOR_HOME": str(out / "home")}  # whatever ~/.arbor/config.yaml says
    with (out / "server.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "models.allow=[]", f"+trainer={trainer}"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
    try:
        subprocess.run([BIN / "arbor", "tiny-model", out / "models" / "tiny"], check=True, stdout=subprocess.DEVNULL)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def address(process: subprocess.Popen[str], out: Path) -> str:
    """Where the server listens: it says so when it is ready."""
    assert process.stdout
    line = process.stdout.readline()
    if not line.startswith("arbor: listening on "):
        raise SystemExit(f"The server did not start: {(out / 'server.log').read_text()}")
    print(line.strip())
    return line.split()[-1]


def prepare() -> dict[Split, Path]:
    """Write the three splits."""
    files: dict[Split, Path] = {}
    for split, count in COUNTS.items():
        files[split] = OUT / f"{split}.jsonl"
        files[split].write_text("".join(json.dumps(row) + "\n" for row in rows(split, count, SEED)))
    print(f"Examples: {COUNTS['train']:,} to train, {COUNTS['valid']} to validate, {COUNTS['test']} to test;")
    print("          no word is in two of them. One of them:", files["train"].open().readline().strip())
    return files


def train(client: openai.OpenAI, files: dict[Split, Path]) -> FineTuningJob:
    """Upload, create the job, follow it to its end."""
    training, validation = (client.files.create(file=files[split], purpose="fine-tune") for split in ("train", "valid"))
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training.id,
        validation_file=validation.id,
        suffix="letters",
        seed=SEED,
        method={"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS}},  # type: ignore[typeddict-item]
    )
    job = follow(client, job, STEPS)
    if job.status != "succeeded":
        raise SystemExit(f"The job {job.status}: {job.error}")
    return job


def follow(client: openai.OpenAI, job: FineTuningJob, steps: int) -> FineTuningJob:
    """Show the job's events as they come: messages as lines, metrics as a bar."""
    seen: set[str] = set()
    with tqdm(total=steps, unit="step", mininterval=1) as bar:
        while True:
            ended = job.finished_at is not None  # asked before the events: none of them is missed
            for event in new_events(client, job.id, seen):
                if event.type == "metrics":
                    data = dict(event.data)  # type: ignore[call-overload]
                    bar.update(data["step"] - bar.n)
                    bar.set_postfix(loss=f"{data['train_loss']:.3f}", refresh=False)
                else:
                    bar.write(f"  {event.message}", file=sys.stdout)
            if ended:
                return job
            time.sleep(0.5)
            job = client.fine_tuning.jobs.retrieve(job.id)


def new_events(client: openai.OpenAI, job_id: str, seen: set[str]) -> list[FineTuningJobEvent]:
    """Events that were not seen yet, oldest first. The API lists the newest first, page by page."""
    found: list[FineTuningJobEvent] = []
    for event in client.fine_tuning.jobs.list_events(job_id, limit=50):
        if event.id in seen:
            break
        found.append(event)
    seen.update(event.id for event in found)
    return found[::-1]


def chat(client: openai.OpenAI, model: str, tests: list[dict]) -> None:
    """Ask the fine-tuned model about two words that it has never seen: plain, and streaming."""
    plain, streamed = (row["messages"][:1] for row in tests[:2])
    answer = client.chat.completions.create(model=model, messages=plain, temperature=0)
    print(f"\n{model}\n  {plain[0]['content']}  ->  {answer.choices[0].message.content}")
    print(f"  {streamed[0]['content']}  ->  ", end="")
    for chunk in client.chat.completions.create(model=model, messages=streamed, temperature=0, stream=True):
        print(chunk.choices[0].delta.content or "", end="|", flush=True)
    print("  (streamed)")


def exact_match(client: openai.OpenAI, model: str, tests: list[dict], what: str) -> float:
    """Share of the held-out words that the model reverses without a mistake, at temperature 0, 32 at a time."""

    def right(row: dict) -> bool:
        question, expected = row["messages"]
        answer = client.chat.completions.create(model=model, messages=[question], temperature=0, max_tokens=12)
        return answer.choices[0].message.content == expected["content"]

    with ThreadPoolExecutor(32) as pool:
        share = sum(pool.map(right, tests)) / len(tests)
    print(f"Held-out exact match of {what}: {share:.2f}")
    return share


def save_results(client: openai.OpenAI, job: FineTuningJob) -> Path:
    """Download the job's result file: one row a step."""
    table = OUT / "metrics.csv"
    table.write_bytes(client.files.content(job.result_files[0]).read())
    return table


def shown(path: Path) -> Path:
    """A path as one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def verdict(before: float, after: float) -> int:
    """Whether the model visibly learned."""
    if before > BEFORE_BELOW or after < AFTER_ABOVE:
        print(f"Expected at most {BEFORE_BELOW} before and at least {AFTER_ABOVE} after.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
