"""The notebooks of `examples/notebooks/`: their cells run, their outputs are their own, and all bear one address."""

import json
import os
import re
import runpy
import subprocess
import venv
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch

from . import forked
from .tiny import tiny_sd3
from .tiny_rewards import write_clip

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
RUN = [path for path in NOTEBOOKS if path.stem != "stable_diffusion_3_5_t4"]
QUICK = ("your_own_reward",)  # the others are slow tests
REFRESH: dict[str, Any] = runpy.run_path(str(ROOT / "examples" / "refresh.py"))
SHORT = "max_steps, batch_size, eval_prompts = 2, {}, 2"
# Per update, as many as the notebook draws of a prompt; else 2.
PICTURES = {"ac_flow": 8, "diffusion_nft": 8, "tafs_grpo": 16}
T4 = "max_steps, size = 1, 32"


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_of(path: Path, parameters: str) -> str:
    """The cells as one script, without installation and login, and with other parameters."""
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert sum("parameters" in REFRESH["tags"](cell) for cell in cells) == 1
    kept = [cell for cell in cells if not {"install", "login"} & set(REFRESH["tags"](cell))]
    assert len(kept) >= 5
    return "\n".join(parameters if "parameters" in REFRESH["tags"](cell) else cell.source for cell in kept)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else [pytest.mark.slow]) for path in RUN],
)
def test_the_cells_of_a_notebook_run(tmp_path, path):
    code = code_of(path, SHORT.format(PICTURES.get(path.stem, 2)))
    (tmp_path / "cells.py").write_text(f"import matplotlib\n\nmatplotlib.use('agg')\n{code}\nassert points")
    done = forked.script(tmp_path / "cells.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (adapter,) = tmp_path.glob("*/pytorch_lora_weights.safetensors")
    assert json.loads((adapter.parent / "metrics.json").read_text())["tuned"]


def test_the_cells_for_a_t4_run_with_a_tiny_model(tmp_path):
    """In float32 on a CPU, which has no float16 training, and with tiny rewards in place of the published ones."""
    tiny_sd3().save_pretrained(tmp_path / "model")
    write_clip(tmp_path / "clip", seed=0)
    code = code_of(NOTEBOOKS[[path.stem for path in NOTEBOOKS].index("stable_diffusion_3_5_t4")], T4)
    for old, new in (
        ('"stabilityai/stable-diffusion-3.5-medium"', '"model"'),
        ("torch_dtype=torch.float16", "torch_dtype=torch.float32"),
        ("fp16=True", "use_cpu=True, max_sequence_length=8"),
        ("PickScore(dtype=torch.float16)", 'PickScore("clip", "clip")'),
        ("CLIPScore(dtype=torch.float16)", 'CLIPScore("clip")'),
        ("num_inference_steps=20,\n", "num_inference_steps=4,\n"),
        ('pipe.to("cuda")', 'pipe.to("cpu")'),
        ("height=size, width=size)", "height=size, width=size, max_sequence_length=8)"),
    ):
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    (tmp_path / "cells.py").write_text(code)
    done = forked.script(tmp_path / "cells.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sd3-5-t4" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_stored_outputs_come_from_the_cells_above_them(path):
    """And show pictures, in a small file, with nothing of the machine that made them."""
    notebook = read(path)
    assert notebook.metadata["executed_source"] == REFRESH["digest"](notebook), "run examples/refresh.py --execute"
    assert path.stat().st_size < 300_000
    text = path.read_text()
    assert text.count('"image/png"') >= 4  # base, sheet, curve, tuned
    assert not re.search(r"/tmp/|/root/|/home/|site-packages|Traceback", text)
    assert "reward/shapes" in text


def test_the_notebook_for_a_t4_says_that_nobody_has_run_it():
    notebook = read(ROOT / "examples" / "notebooks" / "stable_diffusion_3_5_t4.ipynb")
    assert "**Not run yet**" in notebook.cells[0].source
    assert not any(cell.outputs for cell in notebook.cells if cell.cell_type == "code")


def rows(notebook: Any) -> dict[str, dict[str, str]]:
    """The table of the last evaluation that the outputs show."""
    tables = [
        output["data"]["text/html"] for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
        if "updates</th>" in output.get("data", {}).get("text/html", "")
    ]  # fmt: skip
    names = re.findall(r"<th>(.*?)</th>", tables[-1])
    lines = [re.findall(r"<td>(.*?)</td>", row) for row in tables[-1].split("<tr>")[1:]]
    return {line[0]: dict(zip(names[1:], line[1:], strict=True)) for line in lines if line}


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_the_stored_run_gained(path):
    table = rows(read(path))
    name, least = ("reward/coverage", 0.01) if path.stem == "your_own_reward" else ("reward/shapes", 0.02)
    assert float(table["tuned"][name]) > float(table["base"][name]) + least
    assert float(table["tuned"]["checker_accuracy"]) > float(table["base"]["checker_accuracy"]) - 0.02


@pytest.mark.slow
@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_a_notebook_gains_at_full_length(tmp_path, path):
    notebook = read(path)
    REFRESH["execute"](notebook, tmp_path)
    REFRESH["tidy"](notebook)
    nbformat.write(notebook, tmp_path / path.name)
    test_the_stored_run_gained(tmp_path / path.name)


# ---- the address -----------------------------------------------------------------------------------------------------


def test_all_that_bear_the_address_bear_that_of_the_project():
    bearers = REFRESH["bearers"]()
    assert {*NOTEBOOKS, *(ROOT / "examples" / "scripts").glob("*.py"), ROOT / "docs" / "examples.md"} <= set(bearers)
    owner_and_name = REFRESH["repository"]().removeprefix("https://github.com/")
    for path in bearers:
        assert set(REFRESH["ADDRESS"].findall(path.read_text())) == {owner_and_name}, path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_a_badge_and_installs_first(path):
    cells = read(path).cells
    assert f"/blob/main/examples/notebooks/{path.name})" in cells[0].source
    assert f"/blob/main/examples/notebooks/{path.name})" in (ROOT / "docs" / "examples.md").read_text()
    first = next(cell for cell in cells if cell.cell_type == "code")
    assert REFRESH["tags"](first) == ["install"]
    assert first.source == read(NOTEBOOKS[0]).cells[1].source
    assert "torch" not in first.source


@pytest.mark.slow
def test_the_first_cell_installs_into_a_fresh_environment(tmp_path):
    """From a clone of this checkout in place of the address; the torch that is there stays."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    venv.create(tmp_path / "fresh", with_pip=True)
    python, pip = (tmp_path / "fresh" / "bin" / name for name in ("python", "pip"))
    version = torch.__version__.split("+")[0]
    subprocess.run([pip, "install", "--quiet", f"torch=={version}", "ipython", "matplotlib"], check=True)
    (record,) = (tmp_path / "fresh").glob("lib/*/site-packages/torch-*.dist-info/RECORD")
    before = record.stat()
    install = read(NOTEBOOKS[0]).cells[1].source.replace(REFRESH["repository"](), clone.as_uri())
    assert clone.as_uri() in install
    (tmp_path / "cells.ipy").write_text(install)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    subprocess.run([python, "-m", "IPython", tmp_path / "cells.ipy"], check=True, cwd=tmp_path, env=environment)
    assert (record.stat().st_ino, record.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    said = subprocess.run(
        [python, "-m", "flowrl_trainers.cli", "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert said.stdout.startswith("flowrl-trainers "), said.stderr
