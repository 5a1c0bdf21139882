"""Whether examples/demo_grpo.py learns whatever the seed: three of them, one after the other.

    python bench/grpo_seeds.py [SEED ...]

`before` and `after`: share of held-out words that come out right. The last line is JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo_grpo.py"


def main() -> None:
    runs = {seed: run(seed) for seed in sys.argv[1:] or ("0", "1", "2")}
    for seed, figures in runs.items():
        print(f"seed {seed}: {figures}")
    print(
        json.dumps(
            {
                "runs": runs,
                "worst_after": min(figures["after"] for figures in runs.values()),
                "slowest_seconds": max(figures["seconds"] for figures in runs.values()),
            }
        )
    )


def run(seed: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        subprocess.run([sys.executable, DEMO, "--seed", seed, "--out", out], stdout=sys.stderr, check=False)
        told = json.loads((out / "steps.json").read_text())
    scores = {int(step): score for step, score in told["scores"].items()}
    return {"before": scores[0], "after": scores[max(scores)], "seconds": round(told["seconds"], 1)}


if __name__ == "__main__":
    main()
