"""The plugin as the core sees it: names, options, and a process that starts or says why not."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import arbor_transformers
import msgspec
import pytest
import yaml
from arbor_transformers.generation.prompts import Prompts
from arbor_transformers.model.loading import load, make_batch
from arbor_transformers.model.lora import AdapterRows
from embedded import OPTIONS, World, launch, make_tokenizer, options
from safetensors.torch import load_file, save_file

from arbor_core import ArborError
from arbor_core.engine import ApiError, EngineSpec, Weights
from arbor_core.testing import device


def test_options_and_yaml_have_the_same_keys() -> None:
    values = yaml.safe_load(OPTIONS.read_text())
    assert set(values) == set(arbor_transformers.Options.__struct_fields__)
    msgspec.convert(values, arbor_transformers.Options)


@pytest.mark.parametrize("change", [{"max_batch": 0}, {"dtype": "int8"}, {"surprise": 1}, {"max_waiting": -1}])
def test_wrong_options_are_refused(change: dict[str, Any]) -> None:
    backend = arbor_transformers.arbor_inference_backends()["transformers"]()
    with pytest.raises(msgspec.ValidationError, match=next(iter(change))):
        msgspec.convert(options(**change), backend.options)


def test_the_plugin_is_light() -> None:
    heavy = "{'torch', 'transformers', 'aiohttp'} & set(sys.modules)"
    code = f"import sys, arbor_transformers; arbor_transformers.arbor_inference_backends(); sys.exit(len({heavy}))"
    result = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


async def test_the_core_starts_loads_and_stops_an_engine(world: World, tmp_path: Path) -> None:
    backend = arbor_transformers.arbor_inference_backends()["transformers"]()
    spec = EngineSpec("base", str(world.model), tmp_path, (device(),), 1, "t", options())
    engine = await backend.start(spec)
    try:
        assert await engine.health()
        await engine.load_weights(Weights("new", str(world.adapters["small"])))
        await engine.unload("new")
        with pytest.raises(ArborError, match="not loaded"):
            await engine.unload("new")
    finally:
        await engine.stop()
    assert not await engine.health()


def serve(path: Path, chosen: arbor_transformers.Options) -> None:
    loaded = load(str(path), device(), chosen)
    make_batch(loaded, AdapterRows(loaded.model), chosen)


def broken_models(world: World, folder: Path) -> dict[str, Path]:
    """Directories that hold no model that can be served."""

    def copied(name: str) -> Path:
        return Path(shutil.copytree(world.model, folder / name))

    torn, empty, pickled, partial, poisoned, remote = (
        copied(name) for name in ("torn", "empty", "pickled", "partial", "poisoned", "remote")
    )
    data = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(data[: len(data) // 2])
    shutil.rmtree(empty)
    empty.mkdir()
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    tensors = load_file(partial / "model.safetensors")
    fewer = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name}
    save_file(fewer, partial / "model.safetensors", metadata={"format": "pt"})
    nan = {name: tensor * float("nan") for name, tensor in tensors.items()}
    save_file(nan, poisoned / "model.safetensors", metadata={"format": "pt"})
    config = msgspec.json.decode((remote / "config.json").read_bytes())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (remote / "config.json").write_bytes(msgspec.json.encode(config))
    (remote / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    paths = (torn, empty, pickled, partial, poisoned, remote, folder / "nowhere")
    return {path.name: path for path in paths}


def test_a_model_that_cannot_be_served_is_refused_with_its_path(world: World, tmp_path: Path) -> None:
    chosen = arbor_transformers.Options(**options())
    for name, path in broken_models(world, tmp_path).items():
        with pytest.raises(ArborError) as refused:
            serve(path, chosen)
        assert str(path) in str(refused.value) or "diverged" in str(refused.value), name
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists(), "code that came with a model was run"


async def test_the_process_says_why_in_one_line_and_exits_with_3(world: World, tmp_path: Path) -> None:
    backend = arbor_transformers.arbor_inference_backends()["transformers"]()
    torn = broken_models(world, tmp_path)["torn"]
    spec = EngineSpec("base", str(torn), tmp_path / "a", (device(),), 1, "", options())
    process = launch(torn, tmp_path / "b")
    with pytest.raises(ArborError, match=f"cannot load a model from {torn}"):
        await backend.start(spec)
    assert process.wait(120) == 3
    assert (tmp_path / "b" / "engine.log").read_text().count("\n") == 1


def test_a_model_without_a_chat_template_is_named_so() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    prompts = Prompts(tokenizer, len(tokenizer))
    with pytest.raises(ApiError, match="no chat template"):
        prompts.chat([{"role": "user", "content": "x"}], None, {})
    assert prompts.text("x") == tuple(tokenizer("x").input_ids)
