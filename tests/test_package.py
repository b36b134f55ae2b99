"""The wheel, in an environment of its own."""

import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent

SCRIPT = """
import sys, time
start = time.perf_counter()
import flowrl_trainers
assert time.perf_counter() - start < 1, "importing the package alone must be quick"
assert "torch" not in sys.modules
from flowrl_trainers import AdjointMatchingConfig, AdjointMatchingTrainer, FlowPipeline, FlowRLConfig, FlowRLTrainer
from flowrl_trainers.rewards import CLIPScore, Reward, differentiable
from flowrl_trainers.shapes import load_pipeline, prompts
assert flowrl_trainers.__version__
assert flowrl_trainers.__file__.startswith(sys.prefix), flowrl_trainers.__file__
image = load_pipeline()("a red circle", num_inference_steps=1, max_sequence_length=8).images[0]
print("drawn", image.size)
"""


def test_the_versions_of_python_are_the_same_ones_everywhere():
    """Badge, classifiers and the workflow that tries them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    claimed = [c.rsplit(" ", 1)[1] for c in project["classifiers"] if "Python :: 3." in c]
    (matrix,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["all"]["strategy"][
        "matrix"
    ].values()
    assert matrix == claimed
    assert f"![Python {' | '.join(claimed)}]" in (ROOT / "README.md").read_text()


def test_every_dependency_has_a_floor():
    printed = subprocess.run([sys.executable, ROOT / ".ci" / "floors.py"], capture_output=True, text=True, check=True)
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    floors = printed.stdout.splitlines()
    assert len(floors) > len(dependencies)
    assert all(floor.count("==") == 1 and ">" not in floor for floor in floors)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_weights_types_and_licence_and_is_small(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert (
        len([n for n in names if n.startswith("flowrl_trainers/shapes/weights/") and n.endswith(".safetensors")]) == 3
    )
    assert "flowrl_trainers/py.typed" in names
    assert any(n.endswith("LICENSE") for n in names)
    assert all(n.startswith("flowrl_trainers") for n in names)
    assert wheel.stat().st_size < 20e6


def test_the_wheel_works_in_a_fresh_environment(wheel, tmp_path):
    """The environment sees this one's libraries, but not the checkout: its own site-packages come first."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True, capture_output=True
    )
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")}))
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    result = subprocess.run([python, "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "drawn (32, 32)" in result.stdout
    shown = subprocess.run(
        [tmp_path / "env" / "bin" / "flowrl", "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert shown.returncode == 0
    assert "demo" in shown.stdout


def test_what_is_published_passes_the_check_of_the_index(wheel):
    """Description, licence and metadata of the wheel; those of the source archive are the same file."""
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", wheel], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
