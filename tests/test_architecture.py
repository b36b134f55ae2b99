"""Imports point one way: cli -> trainers -> {pipelines, rewards, metrics, ...} -> flow."""

import ast
from pathlib import Path

import pytest

import flowrl_trainers

ROOT = Path(flowrl_trainers.__file__).parent
BOTTOM = {"flow", "shapes", "sit"}
MODELS = {"pipelines", "rewards", "networks", "metrics"}
ALLOWED = {
    "flow": set(),
    "shapes": set(),
    "sit": set(),
    "pipelines": {"flow", "sit"},
    "networks": {"flow"},
    "rewards": {"flow", "shapes"},
    "metrics": {"flow", "shapes"},
    "sampling": BOTTOM | MODELS,
    "run_folder": BOTTOM | MODELS | {"sampling"},
    "trainers": BOTTOM | MODELS | {"sampling", "run_folder"},
    "cli": BOTTOM | MODELS | {"sampling", "run_folder", "trainers"},
    "__init__": {"trainers", "pipelines"},
}


def rooms_imported_by(path: Path) -> set[str]:
    package = ("flowrl_trainers", *path.relative_to(ROOT).with_suffix("").parts)[:-1]
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            stem = ".".join(part for part in (base, node.module) if part)
            names = [f"{stem}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("flowrl_trainers.")}
    return rooms


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_the_rooms_below_it(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    wrong = {r for r in rooms_imported_by(path) if r in ALLOWED} - ALLOWED[room] - {room}
    assert not wrong, f"{path.name} of {room} imports {wrong}"


def test_flow_knows_torch_and_the_standard_library_alone():
    for path in (ROOT / "flow").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {a.name.split(".")[0] for a in node.names} <= {"torch", "math"}
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in {"torch", "typing", "collections"}


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("test_*.py")), ids=lambda p: p.name)
def test_a_test_module_imports_no_other(path):
    """What two of them need stands in a module of helpers, so that tests can be moved and renamed freely."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        assert not [name for name in names if any(part.startswith("test_") for part in name.split("."))]
