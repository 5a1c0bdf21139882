"""Completions a second through `arbor-serve` against the engine's own port: the embedded engine, the tiny model.

    python bench/serving.py

32 and 64 requests at once, 64 tokens each, plain and streamed, both ways in turn. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path

from proxy import serving, throughputs

from arbor_core.cli.main import tiny_model


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        models, storage = Path(folder) / "models", Path(folder) / "storage"
        tiny_model(models / "tiny")
        with serving(storage, f"models.dirs=['{models}']", mock=False) as url:
            results = asyncio.run(throughputs(url, storage, "tiny"))
    for key, value in results.items():
        print(f"{key:10} {value}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
