"""The plan of the house: imports point one way, and what travels between methods and rooms has a name.

cli -> trainers -> {run_folder, cost} -> sampling -> {pipelines, rewards, networks, metrics} -> {flow, shapes, sit}

`suggestions.py` stands outside: a command that is misspelt is answered before anything is imported.
"""

import ast
import inspect
import re
from pathlib import Path

import pytest
from transformers import Trainer

import flowrl_trainers

ROOT = Path(flowrl_trainers.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
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
    "cost": BOTTOM | MODELS | {"sampling"},
    "trainers": BOTTOM | MODELS | {"sampling", "run_folder", "cost", "suggestions"},
    "cli": BOTTOM | MODELS | {"sampling", "run_folder", "cost", "trainers", "suggestions"},
    "suggestions": set(),
    "__init__": {"trainers", "pipelines"},
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


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


def test_every_room_has_its_place():
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} == set(ALLOWED) - {
        "__init__",
        "suggestions",
    }


@pytest.mark.parametrize("path", FILES, ids=name_of)
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
                assert node.module.split(".")[0] in {
                    "torch", "typing", "collections", "dataclasses", "abc", "itertools",
                }  # fmt: skip


NAMED_BY_OTHERS = {
    "trained_tensors", "tensors", "state_dict",  # by the modules
    "stored",  # by the family; see `Conditioning`
    "get",  # by who keeps them; see `KeptTensors`
    "row", "rows", "base_rows", "by_reward", "summary",  # by the rewards
}  # fmt: skip


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[-2] in ("trainers", "sampling")], ids=name_of)
def test_tensors_travel_in_records_and_not_under_string_keys(path):
    """But for what others name: modules, families and rewards."""
    assert not re.findall(r"\.tensors\[", path.read_text())
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            name, kind = node.name, ast.unparse(node.returns)
        elif isinstance(node, ast.AnnAssign):
            name, kind = ast.unparse(node.target).split(".")[-1], ast.unparse(node.annotation)
        else:
            continue
        assert "dict[str, Tensor]" not in kind or name in NAMED_BY_OTHERS, f"{name}: {kind}"


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[-2] == "trainers"], ids=name_of)
def test_no_trainer_declares_what_its_child_defines(path):
    """An annotation without a value narrows what Trainer itself has, or an earlier class of ours."""
    known = set(re.findall(r"self\.(\w+)\b[^=\n]*=", inspect.getsource(Trainer)))
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Trainer"):
            bare = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and n.value is None}
            assert bare <= known, f"{node.name} declares {bare - known}"


def test_trainers_hold_a_third_of_the_lines():
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    share = sum(count for path, count in lines.items() if path.parts[-2] == "trainers") / sum(lines.values())
    assert share < 0.36


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
