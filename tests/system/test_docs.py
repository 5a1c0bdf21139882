"""The documentation is true: generated parts are fresh, hooks are all there, links lead somewhere, the snippet runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from live import LiveServer

from arbor_core.testing import check_scheduler
from arbor_core.types import ErrorEvent, JobView, MetricsEvent

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)(?:#([^)\s]+))?\)")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.ml  # --help lists the installed trainers
def test_generated_parts_are_fresh(generate: ModuleType) -> None:
    stale = [page.name for page in generate.pages() if generate.fresh(page.read_text()) != page.read_text()]
    assert not stale, "make docs"


def test_every_fault_has_a_test_or_a_reason(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    page, held = (ROOT / "docs" / "faults.md").read_text(), generate.row_tests()
    assert generate.fresh(page) == page, "make docs"
    monkeypatch.setattr(generate, "row_tests", lambda: {**held, "999": ["a test"]})
    with pytest.raises(ValueError, match="999"):
        generate.fault_tables()
    monkeypatch.setattr(generate, "row_tests", lambda: {number: held[number] for number in held if number != "22"})
    with pytest.raises(ValueError, match="row 22 "):
        generate.fault_tables()


def test_rows_are_found_in_names_ids_and_constants(generate: ModuleType) -> None:
    source = """
CASES = [pytest.param(1, id="row-3-a"), pytest.param(2, id=f"row-4-{x}")]
MORE: list = [*CASES, pytest.param(3, id="arrow-5"), pytest.param(3, id="row-61")]

@pytest.mark.parametrize("case", MORE)
async def test_row_7_row_8_both(case): pass

@pytest.mark.parametrize("case", [1, 2], ids=["row-9", "free"])
def test_other(case): "row-10"

def not_a_test_of_row_11(): pass
"""
    found = dict(generate.rows_of(generate.ast.parse(source)))
    assert found == {"test_row_7_row_8_both": {"3", "4", "61", "7", "8"}, "test_other": {"9"}}


def test_every_part_is_used(generate: ModuleType) -> None:
    used = {match["name"] for page in generate.pages() for match in generate.PART.finditer(page.read_text())}
    assert used == set(generate.PARTS)


def test_check_fails_on_a_stale_page(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- generated: hooks -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(generate, "pages", lambda: [page])
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 1
    assert "page.md is stale" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    assert generate.main() == 0
    assert "arbor_trainers()" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 0


def test_every_hook_is_documented(generate: ModuleType) -> None:
    text = (ROOT / "docs" / "plugins.md").read_text()
    for name in generate.hooks():
        assert f"| `{generate.signature(name)}` |" in text, f"{name} is not in the table with its exact arguments"
    for name in set(generate.hooks()) - {"arbor_trainers"}:  # the tutorial is about that one
        assert f"- **{name}**: " in text, f"{name} has no word on its contract"


def test_every_table_row_has_a_default_or_a_comment(generate: ModuleType) -> None:
    rows = list(
        generate.keys(["# A group.", "group:", "  # Of it,", "  #   one  this", "  key: 1  # no", "other: x | y"])
    )
    assert rows == [
        ("group", "", "A group."),
        ("group.key", "1  # no", "Of it,<br>`one`: this"),
        ("other", "x | y", ""),
    ]


def links() -> Iterator[tuple[Path, str, str]]:
    for page in PAGES:
        for target, anchor in LINK.findall(page.read_text()):
            yield page, target, anchor


@pytest.mark.parametrize(
    ("page", "target", "anchor"), [pytest.param(*link, id=f"{link[0].name}:{link[1]}") for link in links()]
)
def test_link_leads_somewhere(page: Path, target: str, anchor: str) -> None:
    path = (page.parent / target).resolve()
    assert path.exists()
    if anchor:
        titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]


def blocks(page: Path, language: str) -> list[str]:
    return blocks_of(page.read_text(), language)


def blocks_of(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_readme_snippet_runs(server: LiveServer, tmp_path: Path) -> None:
    (snippet,) = blocks(ROOT / "README.md", "python")
    (row,) = blocks(ROOT / "README.md", "json")
    (tmp_path / "data.jsonl").write_text(row * 10)
    assert "http://127.0.0.1:7453" in snippet
    snippet = snippet.replace("http://127.0.0.1:7453", server.url)
    ran = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, timeout=150)
    assert ran.returncode == 0, ran.stderr
    assert {"Good", "morning!"} & set(ran.stdout.split())


def test_a_server_in_a_program_of_ones_own(tmp_path: Path) -> None:
    (snippet,) = blocks(ROOT / "docs" / "python.md", "python")
    ran = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    status, answer = ran.stdout.splitlines()
    assert status == "succeeded" and answer and set(answer.split()) <= {"hi", "Good", "morning!"}
    assert (tmp_path / "arbor" / "arbor.db").exists()


def test_what_is_said_of_services_is_there() -> None:
    from arbor_core.application import system

    types = {name: value for name, value in vars(system).items() if isinstance(value, type)}
    table = re.findall(r"^\| `arbor\.(\w+)` \| (.*) \|$", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE)
    assert len(table) == 6
    for name, methods in table:
        service = types[system.Arbor.__annotations__[name]]
        for method in re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", methods)):
            assert callable(getattr(service, method)), f"{name}.{method}"


SHOWN_PARTS = {
    "An executor": ["arbor_mock/node_executor.py", "tests/test_node.py"],
    "A launcher": ["arbor_mock/__init__.py", "arbor_mock/config.py", "arbor_mock/conf/launcher/mock.yaml"],
}
"""Sections of docs/plugins.md, and the files of the mock plugin that hold what they show."""


@pytest.mark.parametrize("title", SHOWN_PARTS)
def test_a_part_is_shown_as_it_is_tested(title: str) -> None:
    page, mock = (ROOT / "docs" / "plugins.md").read_text(), ROOT / "plugins" / "arbor_mock"
    (section,) = (part for part in page.split("\n## ") if part.startswith(f"{title}\n"))
    shown = re.findall(r"^```\w+\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert len(shown) >= 2
    sources = [mock / name for name in SHOWN_PARTS[title]]
    for block in shown:
        assert any(block in path.read_text() for path in sources), block


def test_tutorial_shows_the_example_plugin() -> None:
    plugin, tutorial = (
        ROOT / "examples" / "plugin",
        (ROOT / "docs" / "plugins.md").read_text().partition("## The hooks")[0],
    )
    sources = "\n".join(path.read_text() for path in plugin.rglob("*.*") if path.suffix in (".py", ".yaml", ".toml"))
    shown = [block for language in ("toml", "yaml") for block in blocks_of(tutorial, language)]
    python = [block for block in blocks_of(tutorial, "python") if "..." not in block]
    shown += [
        block
        for block in python
        if any(word in block for word in ("Config", "services", "spec", "lora", "stop.desired"))
    ]
    assert len(shown) == 11
    for block in shown:
        assert flush(block) in flush(sources)


def flush(text: str) -> str:
    """Code without its indentation: a method is shown as a function."""
    return "\n".join(line.strip() for line in text.splitlines())


def test_the_observer_of_the_tutorial_runs(caplog: pytest.LogCaptureFixture) -> None:
    (shown,) = [block for block in blocks(ROOT / "docs" / "plugins.md", "python") if "def arbor_job_event" in block]
    module: dict[str, Any] = {"__name__": "observer"}
    exec(compile(shown, "docs/plugins.md", "exec"), module)
    job = JobView("ftjob-1", "mock", "m", "running")
    with caplog.at_level("INFO", "observer"):
        for step in (99, 100):
            module["arbor_job_event"](job, MetricsEvent(step=step, total_steps=200, values={"train_loss": 0.5}))
        module["arbor_job_event"](job, ErrorEvent("no rows", "error", code="invalid_training_file"))
    assert [record.getMessage() for record in caplog.records] == [
        "ftjob-1 (mock): step 100, loss 0.5",
        "ftjob-1 cannot go on (invalid_training_file): no rows",
    ]


def test_the_scheduler_of_the_page_conforms() -> None:
    (shown,) = [block for block in blocks(ROOT / "docs" / "plugins.md", "python") if "class SmallestFirst" in block]
    module: dict[str, Any] = {"__name__": "scheduler"}
    exec(compile(shown, "docs/plugins.md", "exec"), module)
    check_scheduler(module["SmallestFirst"])


def test_data_examples_are_accepted(server: LiveServer) -> None:
    from arbor_core.data.rows import check_chat_row

    for page in (ROOT / "README.md", ROOT / "docs" / "fine-tuning.md"):
        for block in blocks(page, "json"):
            check_chat_row(json.loads(block))


def test_trouble_is_answered_as_documented(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    """The codes of docs/api.md that a client of ours meets first."""
    import openai

    server = start_server("inference=mock", "allocator=mock", mock=False)
    file = server.upload(chat_rows)
    with pytest.raises(openai.BadRequestError) as refused:
        server.client.fine_tuning.jobs.create(model="mock/tiny", training_file=file, method={"type": "dpo"})
    assert "pip install arbor-dpo" in str(refused.value)
    with pytest.raises(openai.NotFoundError) as missing:
        server.client.embeddings.create(model="mock/tiny", input="text")
    assert missing.value.code == "unknown_url"
