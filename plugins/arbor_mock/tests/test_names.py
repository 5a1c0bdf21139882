"""What the plugin brings, and that YAML and structs agree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import arbor_mock
import msgspec
import pytest
from arbor_mock.rows import check_row

from arbor_core import AllocatorSettings, Bundle, Claim, ConfigError
from arbor_core.config import convert

CONF = Path(arbor_mock.__file__).parent / "conf"


@pytest.mark.parametrize(
    ("yaml", "struct"),
    [
        ("trainer/mock.yaml", arbor_mock.MockConfig),
        ("trainer/mock_grpo.yaml", arbor_mock.MockGrpoConfig),
        ("backend/mock.yaml", arbor_mock.EngineOptions),
    ],
)
def test_yaml_and_struct_have_the_same_keys(yaml, struct):
    values = convert.load_yaml(CONF / yaml)
    assert list(values) == [field.name for field in msgspec.structs.fields(struct)]
    msgspec.convert(values, struct)


def test_the_trainer_stands_in_for_methods_only_when_asked(monkeypatch):
    monkeypatch.delenv("ARBOR_MOCK_GPU", raising=False)
    assert arbor_mock.arbor_trainers()["mock"].methods == ()
    monkeypatch.setenv("ARBOR_MOCK_GPU", "0")
    assert arbor_mock.arbor_trainers()["mock"].methods == ()
    monkeypatch.setenv("ARBOR_MOCK_GPU", "1")
    assert arbor_mock.arbor_trainers()["mock"].methods == ("supervised", "dpo", "reinforcement")


async def test_the_allocator_simulates_devices():
    allocator = arbor_mock.arbor_allocators()["mock"](AllocatorSettings(None, None))
    assert {pool: len(devices) for pool, devices in allocator.inventory().items()} == {"train": 4, "engine": 1}
    chosen = arbor_mock.arbor_allocators()["mock"](AllocatorSettings([5, 6], [2]))
    lease = await chosen.acquire(Claim("job", (Bundle("train", 2), Bundle("engine:mock/tiny"))))
    assert [device.id for device in lease.of("train")] == ["mock:5", "mock:6"]
    assert chosen.free() == {"train": 0, "engine": 0}


def test_an_unknown_engine_option_is_named():
    options = {**convert.load_yaml(CONF / "backend/mock.yaml"), "contxt": 5}
    with pytest.raises(ConfigError, match="'engine.contxt'. Did you mean 'context'?"):
        convert.typed(options, arbor_mock.MockBackend.options, where="engine")


def test_the_plugin_is_light():
    code = "import sys, arbor_mock; print([m for m in ('aiohttp', 'torch', 'litestar', 'hydra') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"input": {"messages": CHAT[:1]}, "preferred_output": CHAT[1:], "non_preferred_output": CHAT[1:]},
        {"messages": CHAT[:1], "answer": "ho"},
    ],
    ids=["supervised", "dpo", "reinforcement"],
)
def test_rows_of_every_method_pass(row):
    check_row(row)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": CHAT[:1]}, "no assistant message"),
        ({"prompt": "x"}, r"'messages' \(found: 'prompt'\)"),
        ({"preferred_output": CHAT[1:], "non_preferred_output": CHAT[1:]}, "'input.messages' must be a list"),
        ({"input": {"messages": CHAT[:1]}, "preferred_output": [], "non_preferred_output": CHAT}, "'preferred_output'"),
        ({"messages": [{"role": "wizard", "content": "x"}, CHAT[0]], "answer": 1}, r"messages\[0\].role"),
    ],
)
def test_rows_that_no_method_can_use_are_refused(row, said):
    with pytest.raises(ValueError, match=said):
        check_row(row)
