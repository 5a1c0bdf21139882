"""The completion ledger: what was sampled is found by its id or by its words, until it is too old."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import msgspec
import pytest

from arbor_core.rollouts.completion_ledger import FORMAT, Ledger, key_of, key_of_tools, packed_floats, packed_ids
from arbor_core.types import Completion

ASKED = [{"role": "user", "content": "say a"}]


def completion(number: int, said: str = "a", index: int = 0) -> Completion:
    return Completion(
        id=f"chatcmpl-{number}",
        index=index,
        version=number,
        prompt=packed_ids([1, 2, 3]),
        tokens=packed_ids([number, 9]),
        logprobs=packed_floats([-0.5, -1.25]),
        temperature=1.0,
        key=key_of(ASKED, said),
    )


def test_by_id_and_choice(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for index in (0, 1):
        ledger.add(completion(7, index=index))
    assert ledger.get("chatcmpl-7") == completion(7)
    assert ledger.get("chatcmpl-7", 1) == completion(7, index=1)
    assert ledger.get("chatcmpl-7", 2) is None
    assert ledger.get("chatcmpl-8") is None


def test_by_words_the_newest_that_is_not_spent(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for n in range(3):
        ledger.add(completion(n))
    ledger.add(completion(9, said="b"))
    key, taken = key_of(ASKED, "a"), set()
    for expected in (2, 1, 0):
        found = ledger.match(key, frozenset(taken))
        assert found
        assert found.version == expected
        taken.add((found.id, found.index))
    assert ledger.match(key, frozenset(taken)) is None
    ledger.spend(("chatcmpl-2", 0))
    assert ledger.match(key) == completion(1)
    assert ledger.match(key_of(ASKED, "c")) is None


def test_the_key_takes_parts_of_text_as_the_text_they_make() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "say "}, {"type": "text", "text": "a"}]}]
    assert key_of(parts, "a") == key_of(ASKED, "a")
    assert key_of(ASKED, "a") != key_of([{"role": "system", "content": "say a"}], "a")
    assert key_of([], None) == key_of([], "")


CALL = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "how is the weather?", "name": "ann"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call-1", "content": "sunny"},
]


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (0, {"name": "bob"}),
        (1, {"tool_calls": [CALL | {"function": {"name": "weather", "arguments": '{"city": "London"}'}}]}),
        (1, {"tool_calls": None}),
        (1, {"reasoning_content": "Let me see."}),
        (2, {"tool_call_id": "call-2"}),
    ],
)
def test_the_key_is_of_all_that_a_prompt_is_made_of(place: int, change: dict[str, Any]) -> None:
    other = [message | change if at == place else message for at, message in enumerate(TALK)]
    assert key_of(other, "Sunny.") != key_of(TALK, "Sunny.")
    assert key_of_tools([TOOL]) != key_of_tools([]) == b""


def test_the_key_is_not_of_how_it_is_written() -> None:
    said = [dict(reversed(message.items())) | {"refusal": None, "annotations": [], "weight": 1} for message in TALK]
    said[1]["content"] = ""
    assert key_of(said, "Sunny.") == key_of(TALK, "Sunny.")
    assert key_of_tools([dict(reversed(TOOL.items()))]) == key_of_tools([TOOL])
    assert key_of_tools([]) == key_of_tools(None)


def test_what_is_nested_too_deeply_has_no_key() -> None:
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    assert key_of([{"role": "user", "content": "x", "deep": deep}], "") == b""
    assert key_of_tools([{"type": "function", "function": {"name": "x", "parameters": {"deep": deep}}}]) == b""


def test_tools_that_differ_in_a_parameter() -> None:
    def tool(*names: str) -> dict[str, Any]:
        parameters = {"type": "object", "properties": {name: {"type": "number"} for name in names}}
        return {"type": "function", "function": {"name": "send", "parameters": parameters}}

    assert key_of_tools([tool("height", "weight")]) != key_of_tools([tool("height")])


def test_records_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    """They said only whether there were tools."""
    record = {**msgspec.to_builtins(completion(7), builtin_types=(bytes,)), "tools": True}
    payload = msgspec.msgpack.encode(record)
    (tmp_path / "0.log").write_bytes(FORMAT.header(payload) + payload)
    assert Ledger(tmp_path).get("chatcmpl-7") == completion(7)


def test_another_server_finds_what_was_written(tmp_path: Path) -> None:
    before = Ledger(tmp_path)
    for n in range(5):
        before.add(completion(n))
    before.close()
    with (tmp_path / "0.log").open("ab") as file:
        file.write(b"\x30\0\0\0torn")  # what a killed server leaves
    after = Ledger(tmp_path)
    assert [after.get(f"chatcmpl-{n}") for n in range(5)] == [completion(n) for n in range(5)]
    after.add(completion(5))
    again = Ledger(tmp_path)
    assert again.get("chatcmpl-5") == completion(5)


def test_zeros_that_a_power_failure_left_are_no_completions(tmp_path: Path) -> None:
    before = Ledger(tmp_path)
    before.add(completion(0))
    before.close()
    with (tmp_path / "0.log").open("ab") as file:
        file.write(bytes(4096))
    after = Ledger(tmp_path)
    after.add(completion(1))
    assert Ledger(tmp_path).get("chatcmpl-1") == completion(1)


def test_old_completions_go(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, segment_bytes=400, max_segments=3)
    for n in range(40):
        ledger.add(completion(n))
    ledger.spend(("chatcmpl-39", 0))
    assert len(list(tmp_path.glob("*.log"))) == 3
    assert ledger.get("chatcmpl-0") is None
    assert ledger.get("chatcmpl-39") == completion(39)
    known = len(ledger.places)
    assert 3 <= known < 40
    assert len(ledger.by_key[key_of(ASKED, "a")]) == known
    assert len(Ledger(tmp_path, segment_bytes=400, max_segments=3).places) == known


def test_what_is_forgotten_is_forgotten_whole(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, segment_bytes=400, max_segments=2)
    for n in range(40):
        ledger.add(completion(n, said="ab"[n % 2]))
        ledger.spend((f"chatcmpl-{n}", 0))
    again = Ledger(tmp_path, segment_bytes=400, max_segments=2)
    again.spend(*((f"chatcmpl-{n}", 0) for n in range(40)))
    for one in (ledger, again):
        assert one.spent == one.places.keys()
        assert {known for line in one.by_key.values() for known in line} == one.places.keys()
    for n in range(40, 80):
        ledger.add(completion(n, said="c"))
    assert list(ledger.by_key) == [key_of(ASKED, "c")]
    assert not ledger.spent


def test_a_full_disk_forgets_a_completion_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path)
    ledger.add(completion(0))

    class Full:
        def write(self, _: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def fileno(self) -> int:
            return file.fileno()

    file = ledger.log.file
    with monkeypatch.context() as patched:
        patched.setattr(ledger.log, "file", Full())
        ledger.add(completion(1))
    assert ledger.get("chatcmpl-1") is None
    ledger.add(completion(2))
    assert (ledger.get("chatcmpl-0"), ledger.get("chatcmpl-2")) == (completion(0), completion(2))
