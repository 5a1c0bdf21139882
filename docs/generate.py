"""Writes the generated parts of the documentation: `make docs`. With --check it only says which are stale, and exits 1.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`; NAME is a key of PARTS.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from arbor_core import hookspecs

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PART = re.compile(r"(<!-- generated: (?P<name>[^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
LINE = re.compile(r"(?P<indent> *)(?P<key>\w+):(?: (?P<value>.+))?")
SERVE_ONLY = ("defaults", "hydra")
"""Blocks of serve.yaml that are Hydra's own."""


def help_text() -> str:
    """What `arbor-serve --help` prints, without a configuration of one's own."""
    with tempfile.TemporaryDirectory() as home:
        variables = {name: value for name, value in os.environ.items() if name not in ("ARBOR_HOME", "ARBOR_MOCK_GPU")}
        command = [sys.executable, "-m", "arbor_core", "serve", "--help"]
        ran = subprocess.run(command, env={**variables, "ARBOR_HOME": home}, check=True, capture_output=True, text=True)
    shown = re.sub(r"\n{3,}", "\n\n", ran.stdout.strip())
    return f"```text\n{shown}\n```\n"


def hooks() -> dict[str, Callable[..., object]]:
    """Every hook by name, in the order of the file."""
    return {name: function for name, function in vars(hookspecs).items() if name.startswith("arbor_")}


def signature(name: str) -> str:
    """A hook with its exact arguments."""
    return f"{name}({', '.join(inspect.signature(hooks()[name]).parameters)})"


def hook_table() -> str:
    """Name, what it returns, what it is for."""
    rows = ["| hook | returns | |", "|---|---|---|"]
    for name, function in hooks().items():
        returns = str(inspect.signature(function).return_annotation)
        rows.append(f"| `{signature(name)}` | `{returns}` | {' '.join((function.__doc__ or '').split())} |")
    return "\n".join(rows) + "\n"


def key_table(path: Path) -> str:
    """Every key of a YAML file with its default and the comment above it."""
    rows = ["| key | default | |", "|---|---|---|"]
    for key, default, comment in keys(path.read_text().splitlines()):
        if key.partition(".")[0] not in SERVE_ONLY and (default or comment):
            shown = f"`{default}`" if default else ""
            rows.append(f"| `{key}` | {shown} | {comment} |".replace("  |", " |"))
    return "\n".join(rows) + "\n"


def keys(lines: list[str]) -> Iterator[tuple[str, str, str]]:
    """Key, default and comment, in the order of the file. A comment belongs to the key that follows it at once."""
    above: list[str] = []
    inside: list[str] = []
    for line in lines:
        if line.strip().startswith("#"):
            above.append(line.strip()[1:].removeprefix(" "))
            continue
        if match := LINE.fullmatch(line):
            inside = [*inside[: len(match["indent"]) // 2], match["key"]]
            yield ".".join(inside), match["value"] or "", prose(above)
        above = []


def prose(comment: list[str]) -> str:
    """A comment as the text of a table's cell: indented lines (alternatives) stay lines."""
    text = ""
    for line in comment:
        word, _, rest = line.strip().partition("  ")
        text += f"@`{word}`: {rest.strip()}" if line.startswith("  ") else f" {line}"
    return text.strip().replace("|", "\\|").replace("<", "&lt;").replace("@", "<br>")


def route_table() -> str:
    """Every route of the core, from the handlers themselves."""
    from arbor_core.server.app import ROUTE_MODULES

    found = [
        (path, min(handler.http_methods - {"OPTIONS"}), needs(handler.opt), handler.opt["summary"])
        for module in ROUTE_MODULES
        for handler in module.ROUTES
        for path in sorted(handler.paths)
        if "summary" in handler.opt
    ]
    rows = ["| method | path | key for | |", "|---|---|---|---|"]
    for path, method, scopes, summary in sorted(found, key=lambda row: (not row[0].startswith("/v1"), row)):
        rows.append(f"| {method} | `{re.sub(r':[a-z]+}', '}', path)}` | {scopes} | {summary} |")
    return "\n".join(rows) + "\n"


def needs(opt: dict[str, Any]) -> str:
    """What a route's key must be for."""
    return "-" if opt["public"] else " or ".join(opt["scopes"])


ROW = re.compile(r"(?<![a-z])row[-_](\d+)(?!\d)")
"""A row of the faults in a test's name or id."""


def fault_tables() -> str:
    """Each fault, what is answered, and the tests that hold it.

    Raises:
        ValueError: a fault has neither tests nor a reason, or tests are of a fault that is not in faults.toml.
    """
    tests, parts = row_tests(), []
    sections = tomllib.loads((DOCS / "faults.toml").read_text()).values()
    for section in sections:
        parts += [f"\n## {section['title']}\n", "| | fault | answer | held by |", "|---|---|---|---|"]
        for number, (fault, answer, *reason) in ((key, value) for key, value in section.items() if key != "title"):
            held = "<br>".join(filter(None, [*tests.pop(number, ()), *reason]))
            if not held:
                raise ValueError(f"row {number} of faults.toml has no test and no reason why: {fault}")
            parts.append(f"| {number} | {fault} | {answer} | {held} |".replace("|  |", "| |"))
    if tests:
        raise ValueError(f"faults.toml lacks rows that tests name: {sorted(tests)}")
    return "\n".join(parts).lstrip("\n") + "\n"


def row_tests() -> dict[str, list[str]]:
    """By the number of a row: each file whose tests hold it, with their names. Read from the sources, so that none of
    their libraries is needed."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in [*sorted(ROOT.glob("tests/**/test_*.py")), *sorted(ROOT.glob("plugins/*/tests/test_*.py"))]:
        names: dict[str, list[str]] = defaultdict(list)
        for name, numbers in rows_of(ast.parse(path.read_text())):
            for number in sorted(numbers):
                names[number].append(name.removeprefix("test_"))
        where = path.relative_to(ROOT).as_posix()
        for number, of_row in names.items():
            found[number].append(f"[{where}](../{where}): {', '.join(of_row)}")
    return found


def rows_of(module: ast.Module) -> Iterator[tuple[str, set[str]]]:
    """Each test of a file, and the rows that its name, its ids and the constants it is parametrised with stand for."""
    constants: dict[str, set[str]] = {}
    for node in module.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            constants |= {
                target.id: rows_in(node.value, constants) for target in targets if isinstance(target, ast.Name)
            }
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            told = (rows_in(decorator, constants) for decorator in node.decorator_list)
            yield node.name, set(ROW.findall(node.name)).union(*told)


def rows_in(expression: ast.expr, constants: dict[str, set[str]]) -> set[str]:
    """The rows that an expression's texts name, and those of the constants in it."""
    found: set[str] = set()
    for node in ast.walk(expression):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.update(ROW.findall(node.value))
        elif isinstance(node, ast.Name):
            found |= constants.get(node.id, set())
    return found


PARTS: dict[str, Callable[[], str]] = {
    "arbor-serve --help": help_text,
    "hooks": hook_table,
    "routes": route_table,
    "faults": fault_tables,
    "keys of serve": lambda: key_table(ROOT / "conf/serve.yaml"),
    "keys of sft": lambda: key_table(ROOT / "plugins/arbor_sft/arbor_sft/conf/trainer/sft.yaml"),
    "keys of mock": lambda: key_table(ROOT / "plugins/arbor_mock/arbor_mock/conf/trainer/mock.yaml"),
    "keys of mock_grpo": lambda: key_table(ROOT / "plugins/arbor_mock/arbor_mock/conf/trainer/mock_grpo.yaml"),
    "keys of grpo": lambda: key_table(ROOT / "plugins/arbor_grpo/arbor_grpo/conf/trainer/grpo.yaml"),
    "options of torchrun": lambda: key_table(ROOT / "conf/launcher/torchrun.yaml"),
    "options of transformers": lambda: key_table(
        ROOT / "plugins/arbor_transformers/arbor_transformers/conf/backend/transformers.yaml"
    ),
    "options of mock": lambda: key_table(ROOT / "plugins/arbor_mock/arbor_mock/conf/backend/mock.yaml"),
}


def fresh(text: str) -> str:
    """A document with its generated parts made anew.

    Raises:
        KeyError: a part that nobody generates.
    """
    return PART.sub(lambda match: f"{match[1]}{PARTS[match['name']]()}{match[3]}", text)


def pages() -> list[Path]:
    """Every page that may have generated parts."""
    return [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def main() -> int:
    check = sys.argv[1:] == ["--check"]
    stale = {page: new for page in pages() if (new := fresh(old := page.read_text())) != old}
    for page, new in stale.items():
        print(f"{page.relative_to(ROOT)} {'is stale: make docs' if check else 'written'}")
        if not check:
            page.write_text(new)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
