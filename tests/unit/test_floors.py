"""The floors of the house: a module imports from its own floor or from below, and nothing imports itself by a detour.

Imports inside of functions and those for types count as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import gptoss_export.engines
import gptoss_export.exporter
import gptoss_export.validators

PACKAGE = "gptoss_export."
FLOORS = (
    ("exporter",),
    ("engines",),
    ("validators",),
    ("exporter.planning", "exporter.output", "exporter.trust", "exporter.measure", "exporter.shared_stages"),
    ("exporter.pipeline",),
    ("exporter.cli", "exporter.commands", "exporter.__main__"),
)
"""From the ground up; the longest name that fits a module says where it is."""

GROUND = (
    "artifact", "checkpoint", "clock", "errors", "graph", "inside", "interrupt", "model", "ops", "origin", "progress",
    "stopwatch", "weights",
)  # fmt: skip


def modules() -> Mapping[str, Path]:
    found: dict[str, Path] = {}
    for top in (gptoss_export.exporter, gptoss_export.engines, gptoss_export.validators):
        root = Path(str(top.__file__)).parent
        for path in root.rglob("*.py"):
            parts = (root.name, *path.relative_to(root).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith(PACKAGE):
                whole = name.removeprefix(PACKAGE)
                yield whole if whole in known else whole.rpartition(".")[0]


def floor(module: str) -> int:
    fits = [(name, n) for n, names in enumerate(FLOORS) for name in names if f"{module}.".startswith(f"{name}.")]
    return max(fits)[1]


def test_there_are_modules_on_every_floor() -> None:
    assert {floor(name) for name in modules()} == set(range(len(FLOORS)))
    assert floor("exporter.planning.plan") == 3 and floor("exporter.plans") == 0


def test_what_has_no_place_of_its_own_is_on_the_ground() -> None:
    ground = {name.split(".")[1] for name in modules() if floor(name) == 0 and "." in name}
    assert ground == set(GROUND)


def test_imports_point_down() -> None:
    known = modules()
    up = [(name, to) for name, path in known.items() for to in imported(path, known) if floor(to) > floor(name)]
    assert not up


def test_nothing_imports_itself_by_a_detour() -> None:
    known = modules()
    edges = {name: set(imported(path, known)) - {name} for name, path in known.items()}
    assert sum(map(len, edges.values())) > len(known)
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None
