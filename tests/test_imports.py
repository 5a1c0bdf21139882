"""What importing costs, and that no two modules need each other."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("aiohttp", "hydra", "litestar", "omegaconf", "torch", "transformers", "uvicorn")
LIGHT = (
    "arbor_core",
    "arbor_core.types",
    "arbor_core.hookspecs",
    "arbor_core.plugins",
    "arbor_core.config.settings",
    "arbor_core.config.api_keys",
    "arbor_core.config.convert",
    "arbor_core.application.requests",
    "arbor_core.application.submission",
    "arbor_core.application.objects",
    "arbor_core.application.idempotency",
    "arbor_core.application.job_service",
    "arbor_core.jobs.records",
    "arbor_core.jobs.repository",
    "arbor_core.jobdir.documents",
    "arbor_core.rollouts.session",
    "arbor_core.server.schemas",
    "arbor_core.http",
    "arbor_core.worker.run",
    "arbor_core.testing",
)
"""What plugins, workers, notebooks and commands import: structs and everything that works without a server."""


@pytest.mark.parametrize("module", LIGHT)
def test_importing_a_light_module_imports_nothing_heavy(module: str) -> None:
    importlib.import_module(module)  # that it exists, told from what it costs
    code = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == [], f"importing {module} imports {done.stdout}"


def test_a_server_that_serves_no_model_does_not_load_the_client_of_engines() -> None:
    code = "import sys, arbor_core.server.app, arbor_core.application.system; print('aiohttp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False"]


def packages() -> dict[str, Path]:
    """The core and every plugin of this repository, by the name of its package."""
    folders = [ROOT / "arbor_core", *sorted(ROOT.glob("plugins/*/arbor_*"))]
    return {folder.name: folder for folder in folders if (folder / "__init__.py").is_file()}


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for name, folder in packages().items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((name, *(part for part in parts if part != "__init__")))] = path
    return found


def imports(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules of ours that a module imports: at its top, inside functions and for type checkers alike.

    `from package import name` imports the module `package.name` if there is one, else `package`.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = [full if (full := f"{base}.{alias.name}") in known else base for alias in node.names]
        else:
            continue
        yield from (target for target in targets if target in known)


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules in which each one reaches every other: the strongly connected components (Tarjan, 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in order:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], order[other])
        if low[module] == order[module]:
            members = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(members) > 1 or module in graph[module]:
                found.append(sorted(members))

    for module in sorted(graph):
        if module not in order:
            visit(module)
    return found


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": set()}) == [["a", "b", "c"]]
    assert circles({"a": {"a"}, "b": set()}) == [["a"]]


def test_no_modules_import_each_other() -> None:
    known = modules()
    assert len(known) > 100
    graph = {name: set(imports(name, path, known)) - {name} for name, path in known.items()}
    found = circles(graph)
    shown = ["; ".join(f"{one} -> {', '.join(sorted(graph[one] & set(circle)))}" for one in circle) for circle in found]
    assert not found, "modules that import each other, directly or in a circle:\n" + "\n".join(shown)
