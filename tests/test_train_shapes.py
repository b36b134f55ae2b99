"""The script that made the shipped weights, run in a small way."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowrl_trainers.shapes import load_pipeline
from flowrl_trainers.shapes.models import WEIGHTS

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "train_shapes.py"


def train(folder: Path, scale: str) -> str:
    result = subprocess.run([sys.executable, SCRIPT, "--out", folder, "--scale", scale, "--threads", "1"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return (folder / "train_shapes.log").read_text()


def test_a_reduced_run_leaves_a_pipeline_of_the_shipped_layout(tmp_path):
    log = train(tmp_path, "0.001")
    for part in ("pictures", "autoencoder", "clip", "stock pipeline"):
        assert re.search(rf"^{part}.*minutes so far$", log, flags=re.M)
    written = {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()}
    beside = {Path("train_shapes.log"), Path("transformer_before_confusion.safetensors")}
    assert written - beside == {p.relative_to(WEIGHTS) for p in WEIGHTS.rglob("*") if p.is_file()}
    trained, shipped = load_pipeline(tmp_path), load_pipeline()
    configs = [{k: v for k, v in p.transformer.config.items() if k != "_name_or_path"} for p in (trained, shipped)]
    assert configs[0] == configs[1]
    for part in ("vae", "text_encoder"):
        shapes = [{n: p.shape for n, p in getattr(p, part).named_parameters()} for p in (trained, shipped)]
        assert shapes[0] == shapes[1]
    assert trained.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()
    assert trained.tokenizer.model_max_length == shipped.tokenizer.model_max_length


@pytest.mark.slow
def test_a_run_is_a_function_of_its_seed_also_where_it_was_cut_off(tmp_path):
    train(tmp_path / "first", "0.002")
    for part in ("vae", "clip"):  # what a run has left that was cut off in its last part
        shutil.copytree(tmp_path / "first" / part, tmp_path / "second" / part)
    shutil.copy(tmp_path / "first" / "transformer_before_confusion.safetensors", tmp_path / "second")
    train(tmp_path / "second", "0.002")
    train(tmp_path / "third", "0.002")
    first, second, third = (list(load_pipeline(tmp_path / name).transformer.parameters()) for name in ("first", "second", "third"))
    assert all(torch.equal(p, q) and torch.equal(p, r) for p, q, r in zip(first, second, third, strict=True))
