"""The wheels: built, installed in an environment outside the checkout, and used there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import openai
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = [ROOT, *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]
BLOCKED = ["torch", "transformers", "trl", "peft", "accelerate", "datasets", "arbor_sft", "arbor_transformers"]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, *map(str, PACKAGES)], check=True, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def outside(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with our wheels; third-party packages are those of this environment, our checkout is not there."""
    folder = tmp_path_factory.mktemp("outside")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, *map(str, wheels.glob("*.whl"))], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    # A plain path in a .pth file: the .pth files over there (our editable installs) are not followed.
    (Path(site.stdout.strip()) / "zz_third_party.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(outside: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "ARBOR_HOME": str(outside / "home"), **env}
    variables.pop("PYTHONPATH", None)
    return subprocess.run(
        [str(outside / "venv" / "bin" / command[0]), *command[1:]],
        capture_output=True,
        text=True,
        env=variables,
        cwd=outside,
        timeout=120,
    )


def test_every_wheel_carries_its_configuration(wheels):
    names = {path.name.partition("-")[0]: zipfile.ZipFile(path).namelist() for path in wheels.glob("*.whl")}
    assert {"arbor_core", "arbor_sft", "arbor_mock", "arbor_transformers"} <= names.keys()
    assert "arbor_core/conf/serve.yaml" in names["arbor_core"]
    assert any(name.startswith("arbor_core/server/static/") for name in names["arbor_core"])
    assert "arbor_sft/conf/trainer/sft.yaml" in names["arbor_sft"]
    assert "arbor_mock/conf/trainer/mock.yaml" in names["arbor_mock"]
    assert "arbor_transformers/conf/backend/transformers.yaml" in names["arbor_transformers"]
    assert not any("tests/" in name for files in names.values() for name in files)


def test_the_installed_commands_find_the_plugins_and_their_yaml(outside):
    listed = run(outside, "arbor", "plugins")
    for word in ("trainer sft", "trainer mock", "inference backend transformers", "scheduler fifo"):
        assert word in listed.stdout, listed.stderr
    where = run(outside, "python", "-c", "import arbor_core; print(arbor_core.__file__)").stdout
    assert str(outside) in where
    shown = run(outside, "arbor-serve", "+trainer=sft", "trainer.learning_rate=3e-4", "--cfg", "job")
    assert "learning_rate: 0.0003" in shown.stdout, shown.stderr


def test_a_minimal_install_serves_without_any_ml_library(outside, chat_rows):
    """arbor-core and arbor-mock, everything else hidden."""
    (outside / "blocked").mkdir()
    (outside / "blocked" / "sitecustomize.py").write_text(
        f"import sys\nfor name in {BLOCKED!r}:\n    sys.modules[name] = None\n"
    )
    env = {**os.environ, "ARBOR_HOME": str(outside / "home"), "ARBOR_MOCK_GPU": "1"}
    env["PYTHONPATH"] = str(outside / "blocked")
    command = [outside / "venv" / "bin" / "arbor-serve", "port=0", f"storage={outside / 'storage'}"]
    command.append("plugins.disabled=[sft,grpo,transformers]")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=outside) as process:
        try:
            url = process.stdout.readline().split()[-1]
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused")
            raw = b"".join(json.dumps(row).encode() + b"\n" for row in chat_rows)
            file = client.files.create(file=("rows.jsonl", raw), purpose="fine-tune")
            job = client.fine_tuning.jobs.create(model="mock/tiny", training_file=file.id)
            while job.status not in ("succeeded", "failed"):
                job = client.fine_tuning.jobs.retrieve(job.id)
            assert job.status == "succeeded", job.error
            said = client.chat.completions.create(
                model=job.fine_tuned_model, messages=[{"role": "user", "content": "hello"}]
            )
            assert said.choices[0].message.content
            known = "no trainer called 'nonsense'; installed: mock, mock_commands, mock_grpo"
            with pytest.raises(openai.BadRequestError, match=known):
                client.fine_tuning.jobs.create(model="mock/tiny", training_file=file.id, method={"type": "nonsense"})
        finally:
            process.terminate()
            process.wait()
