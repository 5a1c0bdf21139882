"""`make bench`: runs every measurement, compares it with its aim, and writes `bench/results.json`.

    python bench/run.py [NAME ...]
    ARBOR_TEST_DEVICE=cuda python bench/run.py grpo_learning grpo_step sft_throughput weights

With a GPU the models are larger where that matters, and the figures go to `bench/results-gpu.json`.

Figures are ratios of things taken in one run, because the machine is shared; a time stands alone only where the aim is
a time.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ON_GPU = os.environ.get("ARBOR_TEST_DEVICE") == "cuda"
RESULTS = HERE / ("results-gpu.json" if ON_GPU else "results.json")

# What is measured -> [(path in its JSON, "at least" or "at most", aim)]
AIMS: dict[str, list[tuple[str, str, float]]] = {
    "first_step": [("warm_ratio", "at most", 0.2), ("cold_ratio", "at most", 1.1)],
    "sft_throughput": [("sft_equal.ratio", "at least", 0.97), ("sft_lognormal.ratio", "at least", 1.5)],
    "grpo_step": [
        ("grpo_step.ratio", "at most", 0.7),
        ("grpo_step.apart", "at most", 1e-4),
        ("grpo_step.publish_share", "at most", 0.05),
    ],
    "grpo_groups": [("groups_per_second", "at least", 200)],
    "grpo_learning": [("ratio", "at most", 1.0), ("overhead", "at most", 0.1)],
    "weights": [("weights.tiny_lora.of_a_step", "at most", 0.05), ("weights.tiny_full.of_a_step", "at most", 0.05)],
    "grpo_seeds": [("worst_after", "at least", 0.9), ("slowest_seconds", "at most", 360)],
    "serving": [("plain_32.ratio", "at least", 0.9), ("plain_64.ratio", "at least", 0.9)],
    "proxy": [("proxy.plain.added_ms", "at most", 3.0)],
    "server": [
        ("ready_seconds", "at most", 1.5),
        ("help_seconds", "at most", 1.0),
        ("idle_mb", "at most", 120),
        ("upload_added_mb", "at most", 50),
        ("upload_speed_ratio", "at least", 0.5),
    ],
    "simulation": [
        ("quiet.retrieve.p99_ms", "at most", 20),
        ("quiet.create.p99_ms", "at most", 50),
        ("rate.starts_per_second", "at least", 50),
        ("database_growth", "at most", 1.1),
    ],
    "checking": [
        ("mb_per_second.small", "at least", 40),
        ("mb_per_second.talk", "at least", 200),
        ("mb_per_second.quoted", "at least", 200),
        ("with_template.small", "at least", 40),
        ("with_template.talk", "at least", 200),
        ("memory_mb", "at most", 5),
    ],
    "conversations": [
        ("talk.seconds", "at most", 120),
        ("trace.seconds", "at most", 150),
        ("talk.twice", "at most", 2.5),
        ("trace.twice", "at most", 2.5),
    ],
    "engine_batching": [],
}
OPTIONS = {"simulation": ["--full"]}
"""The aims are for 20,000 jobs and 1,000 devices."""
GPU_OPTIONS = {
    "grpo_step": ["--shape", "0.4B", "--prompt", "256", "--completion", "128", "--steps", "8"],
    "sft_throughput": ["--shape", "0.4B"],
    "weights": ["--shapes", "tiny,0.4B"],
}


def main() -> int:
    wanted = sys.argv[1:] or list(AIMS)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    missed = 0
    for name in wanted:
        print(f"== {name}", flush=True)
        figures = measure(name)
        results[name] = {"figures": figures, "taken": time.strftime("%Y-%m-%d"), "machine": machine()}
        for path, how, aim in AIMS[name]:
            value = found(figures, path)
            met = value >= aim if how == "at least" else value <= aim
            missed += not met
            print(f"{'ok    ' if met else 'MISSED'} {path}: {value:g} ({how} {aim:g})", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    return 1 if missed else 0


def measure(name: str) -> dict[str, Any]:
    """The JSON on the last line that a script prints."""
    done = subprocess.run(
        [sys.executable, HERE / f"{name}.py", *(OPTIONS | (GPU_OPTIONS if ON_GPU else {})).get(name, [])],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def found(figures: Any, path: str) -> float:
    for part in path.split("."):
        figures = figures[part]
    return float(figures)


def machine() -> str:
    found = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return ", ".join([found, *gpus()])


def gpus() -> list[str]:
    """The GPU that was used, if one was."""
    if not ON_GPU:
        return []
    import torch

    return [torch.cuda.get_device_name(0)]


if __name__ == "__main__":
    sys.exit(main())
