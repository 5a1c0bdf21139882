"""How long a user waits for the first training step: `trl sft` from a cold shell against a job on a running server.

Same model, data, batch size and threads. Warm: the template has imported the libraries. Cold: `start=cold`.
Prints seconds and ratios as JSON on its last line. Aims: warm at most 0.2 of `trl sft`, cold at most 1.1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Say {n}."},
            {"role": "assistant", "content": f"{n} it is, as you asked."},
        ]
    }
    for n in range(256)
]
BATCH = 8
THREADS = str(os.cpu_count() or 1)
ENV = {**os.environ, "OMP_NUM_THREADS": THREADS, "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = root / "models" / "tiny"
        subprocess.run([sys.executable, "-m", "arbor_core", "tiny-model", str(model)], check=True, capture_output=True)
        (root / "data").mkdir()
        (root / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        trl = min(trl_seconds(root, model) for _ in range(2))
        cold = min(arbor_seconds(root, "start=cold", warm=False) for _ in range(2))
        warm = min(arbor_seconds(root, "+trainer=sft", warm=True) for _ in range(2))
    print(
        json.dumps(
            {
                "trl_sft_seconds": round(trl, 2),
                "cold_seconds": round(cold, 2),
                "warm_seconds": round(warm, 2),
                "cold_ratio": round(cold / trl, 3),
                "warm_ratio": round(warm / trl, 3),
            }
        )
    )


def trl_seconds(root: Path, model: Path) -> float:
    """From the shell's command to the end of the first step."""
    out = root / "trl-out"
    command = [
        str(Path(sys.executable).parent / "trl"),
        *("sft", "--model_name_or_path", str(model), "--dataset_name", str(root / "data"), "--output_dir", str(out)),
        *("--per_device_train_batch_size", str(BATCH), "--max_steps", "2", "--logging_steps", "1", "--use_cpu", "True"),
        *("--bf16", "False", "--report_to", "none", "--save_strategy", "no", "--gradient_checkpointing", "False"),
    ]
    began = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**ENV, "PYTHONUNBUFFERED": "1"}
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "'loss'" in line or '"loss"' in line:
                seconds = time.monotonic() - began
                process.terminate()
                return seconds
    raise RuntimeError(f"trl sft reported no loss: {''.join(said)[-2000:]}")


def arbor_seconds(root: Path, *overrides: str, warm: bool) -> float:
    """From `POST /v1/fine_tuning/jobs` until the first metrics event can be read."""
    with served(root, *overrides) as client:
        file = client.files.create(file=root / "data" / "train.jsonl", purpose="fine-tune")
        if warm:
            first_step(client, file.id)
        return first_step(client, file.id)


def first_step(client: openai.OpenAI, file_id: str) -> float:
    began = time.monotonic()
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file_id,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"batch_size": BATCH, "n_epochs": 1, "max_steps": 2, "lora": None}},  # type: ignore[typeddict-unknown-key]
        },
    )
    seconds = None
    while True:
        if seconds is None and any(e.type == "metrics" for e in client.fine_tuning.jobs.list_events(job.id).data):
            seconds = time.monotonic() - began
        if (now := client.fine_tuning.jobs.retrieve(job.id)).status in ("succeeded", "failed"):
            if seconds is None:
                raise RuntimeError(f"the job ended without a step: {now.error}")
            return seconds
        time.sleep(0.01)


@contextmanager
def served(root: Path, *overrides: str) -> Iterator[openai.OpenAI]:
    """A client of an `arbor-serve` of our own."""
    storage = tempfile.mkdtemp(dir=root)
    command = [sys.executable, "-m", "arbor_core", "serve", "port=0", f"storage={storage}"]
    with subprocess.Popen(
        [*command, f"models.dirs=[{root / 'models'}]", *overrides], stdout=subprocess.PIPE, text=True, env=ENV
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        try:
            yield openai.OpenAI(base_url=f"{url}/v1", api_key="unused")
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
