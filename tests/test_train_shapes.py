"""The script that made the shipped weights, run in a small way."""

import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from flowrl_trainers.shapes import load_pipeline
from flowrl_trainers.shapes.models import WEIGHTS

from . import forked

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "train_shapes.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_shapes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_words_are_swapped_as_often_as_asked_and_within_their_pairs(script):
    """4,000 draws of a caption with two such words: five standard errors of a share of 0.4 are 0.04."""
    caption = "a blue triangle and a red circle"
    generator, number = torch.Generator().manual_seed(0), script.NUMBERS[caption]
    drawn = [script.CAPTIONS[n] for n in script.swap_words(torch.full((4000,), number), 0.4, generator).tolist()]
    assert set(drawn) == {
        f"a {colour} {shape} and a red circle" for colour in ("blue", "purple") for shape in ("triangle", "cross")
    }
    for word in ("purple", "cross"):
        assert sum(word in text for text in drawn) / 4000 == pytest.approx(0.4, abs=0.04)
    every = torch.arange(len(script.CAPTIONS))
    assert torch.equal(script.swap_words(every, 0.0, generator), every)
    swapped = [
        (script.CAPTIONS[a], script.CAPTIONS[b])
        for a, b in enumerate(script.swap_words(every, 1.0, generator).tolist())
    ]
    assert ("a red triangle", "a red cross") in swapped
    assert ("a purple cross and a blue square", "a blue triangle and a purple square") in swapped
    assert ("a red circle", "a red circle") in swapped


def test_a_swap_that_would_name_an_object_twice_is_not_made(script):
    number = script.NUMBERS["a red triangle and a red cross"]
    generator = torch.Generator().manual_seed(0)
    drawn = {script.CAPTIONS[n] for n in script.swap_words(torch.full((200,), number), 0.5, generator).tolist()}
    assert drawn == {"a red triangle and a red cross", "a red cross and a red triangle"}


def test_scenes_are_in_reading_order_and_the_checker_accepts_them(script):
    pictures, numbers = script.draw_pictures(300, np.random.default_rng(0), script.arranged_scene)
    assert all(script.check(pictures / 255, [script.CAPTIONS[n] for n in numbers]))
    rng = np.random.default_rng(1)
    scenes = [script.arranged_scene([("red", "circle"), ("blue", "square")], rng) for _ in range(200)]
    steps = np.array([[second.x - first.x, second.y - first.y] for first, second in scenes])
    beside, above = steps[:, 0] > 12, steps[:, 1] > 12
    assert (beside ^ above).all()
    assert 60 < beside.sum() < 140


def train(folder: Path, scale: str) -> str:
    result = forked.script(SCRIPT, "--out", folder, "--scale", scale, "--threads", "1")
    assert result.returncode == 0, result.stderr
    return (folder / "train_shapes.log").read_text()


@pytest.mark.slow
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
    first, second, third = (
        list(load_pipeline(tmp_path / name).transformer.parameters()) for name in ("first", "second", "third")
    )
    assert all(torch.equal(p, q) and torch.equal(p, r) for p, q, r in zip(first, second, third, strict=True))
