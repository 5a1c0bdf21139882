"""New weights for an engine that runs, and what its answers say of the weights and the tokens."""

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from embedded import Running, World, make_model, make_tokenizer, start
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

TOKENIZER = make_tokenizer()
PROMPT = "the quick brown"


@pytest.fixture(scope="module")
def engine(world: World, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One of the module's own: its weights change."""
    running = start(world.model, tmp_path_factory.mktemp("updated"))
    yield running
    running.stop()


def trained(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    """The base after a large step."""
    model = AutoModelForCausalLM.from_pretrained(base, **config)
    torch.manual_seed(seed)
    for weight in model.parameters():
        weight.data += torch.randn_like(weight) * weight.std() * 0.5
    model.save_pretrained(folder)
    return folder


def greedy(folder: Path, count: int = 12) -> list[int]:
    """What transformers itself generates."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([TOKENIZER(PROMPT).input_ids])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=0
    )
    return list(output[0, ids.shape[1] :].tolist())


def update(engine: Running, folder: Path, version: int) -> None:
    engine.client.post("/update_weights", body={"path": str(folder), "version": version}, cast_to=dict[str, object])


def ask(engine: Running, count: int = 12, **more: Any) -> Any:
    extra = {"return_token_ids": True, **more.pop("extra", {})}
    return engine.client.completions.create(
        model="base", prompt=PROMPT, max_tokens=count, temperature=0, extra_body=extra, **more
    ).choices[0]


def test_the_engine_says_what_the_new_weights_say(engine: Running, world: World, tmp_path: Path) -> None:
    for version in (1, 2):
        folder = trained(world.model, tmp_path / str(version), version)
        assert greedy(folder) != greedy(world.model)
        update(engine, folder, version)
        said: Any = ask(engine)
        assert (said.token_ids, said.policy_version) == (greedy(folder), version)
    whole: Any = engine.client.completions.create(model="base", prompt=PROMPT, max_tokens=2).choices[0]
    assert not hasattr(whole, "policy_version"), "only asked for with the token ids"


async def test_row_132_what_runs_goes_on_and_names_the_oldest_weights(
    engine: Running, world: World, tmp_path: Path
) -> None:
    folders = [trained(world.model, tmp_path / str(seed), seed) for seed in (3, 4)]
    update(engine, folders[0], 3)
    async with engine.aclient as client:
        stream = await client.completions.create(
            model="base",
            prompt=PROMPT,
            max_tokens=400,
            temperature=0,
            stream=True,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        found: list[Any] = [(await anext(stream)).choices[0]]
        await asyncio.to_thread(update, engine, folders[1], 4)
        assert ask(engine).policy_version == 4
        found += [chunk.choices[0] async for chunk in stream]
    assert {choice.policy_version for choice in found} == {3}
    tokens = [token for choice in found for token in choice.token_ids]
    assert len(tokens) == 400
    assert tokens[:2] == greedy(folders[0], 2)


def test_weights_of_another_model_are_refused_and_change_nothing(engine: Running, world: World, tmp_path: Path) -> None:
    before = ask(engine)
    tensors = load_file(world.model / "model.safetensors")
    name = next(key for key in tensors if "q_proj" in key)
    wrong = {
        "other shapes": {**tensors, name: torch.zeros(3, 3)},
        "a tensor too many": {**tensors, "nothing.weight": torch.zeros(1)},
        "one too few": {key: value for key, value in tensors.items() if key != name},
        "none": {},
    }
    for reason, content in wrong.items():
        folder = tmp_path / reason.replace(" ", "-")
        folder.mkdir()
        if content:
            save_file(content, folder / "model.safetensors")
        with pytest.raises(openai.BadRequestError, match="lack|holds"):
            update(engine, folder, 9)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "model.safetensors").write_bytes((world.model / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(openai.BadRequestError, match="cannot read"):
        update(engine, cut, 9)
    after = ask(engine)
    assert (after.token_ids, after.policy_version) == (before.token_ids, before.policy_version)


def test_tied_weights_are_in_the_files_once(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", tie_word_embeddings=True)
    folder = trained(base, tmp_path / "new", 5)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    engine = start(base, tmp_path / "engine")
    try:
        update(engine, folder, 1)
        assert ask(engine).token_ids == greedy(folder)
    finally:
        engine.stop()


def test_a_policy_brings_its_own_end_of_turn(engine: Running, world: World, tmp_path: Path) -> None:
    folder = trained(world.model, tmp_path / "ending", 6)
    end = greedy(folder)[3]
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, end]
    model.save_pretrained(folder)
    update(engine, folder, 7)
    said = ask(engine)
    first = greedy(folder).index(end)
    assert (said.token_ids, said.finish_reason) == (greedy(folder)[: first + 1], "stop"), "the end itself is a token"


def test_tokens_of_a_stop_string_are_reported(engine: Running) -> None:
    whole = ask(engine, 8, extra={"ignore_eos": True})
    stop = whole.text[2:4]
    cut = ask(engine, 8, stop=stop, extra={"ignore_eos": True})
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert stop in TOKENIZER.decode(cut.token_ids)
