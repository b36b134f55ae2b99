"""`cache_base_pictures`: what the base model draws for evaluations is drawn once for all runs."""

from pathlib import Path

import pytest
import torch

from .helpers import make_trainer
from .tiny import tiny_sd3

SETTINGS = {"cache_base_pictures": True, "max_steps": 1, "num_inference_steps": 2, "per_device_eval_batch_size": 2}
PROMPTS = ["a red circle", "a blue square", "a green cross"]


def evaluated(folder: Path, trainer: str = "ACFlowTrainer", **settings):
    """The metrics of an evaluation, and how often the base model was called."""
    torch.manual_seed(0)
    t = make_trainer(trainer, folder, tiny_sd3(), **(SETTINGS | settings))
    calls, aside = [], t.model.merged_adapter.layers[0]
    t.model.transformer.register_forward_pre_hook(lambda *_: calls.append(aside.disable_adapters))
    metrics = t.evaluate(PROMPTS)
    return {name: value for name, value in metrics.items() if "base" in name}, sum(calls)


@pytest.mark.parametrize("trainer", ["ACFlowTrainer", "TAFSGRPOTrainer"])
def test_a_second_run_draws_nothing_of_the_base_again(tmp_path, assets, trainer):
    first, calls = evaluated(tmp_path / "first", trainer)
    second, fewer = evaluated(tmp_path / "second", trainer)
    fresh, all_calls = evaluated(tmp_path / "third", trainer, cache_base_pictures=False)
    assert first == second == fresh
    assert fewer < calls < all_calls  # the sheet shows rows that were drawn
    # What is left are the base velocities of `velocity_distance`, at every step of two batches.
    assert fewer == 2 * SETTINGS["num_inference_steps"]
    files = list(assets.rglob("*.safetensors"))
    files[0].write_bytes(b"damaged")
    assert evaluated(tmp_path / "fourth", trainer)[0] == first


@pytest.mark.parametrize(
    "changed",
    [{"seed": 7}, {"guidance_scale": 3.0}, {"eval_num_inference_steps": 3}, {"per_device_eval_batch_size": 1}],
)
def test_another_evaluation_is_drawn_anew(tmp_path, assets, changed):
    evaluated(tmp_path / "first")
    known = len(list(assets.rglob("*.safetensors")))
    kept, _ = evaluated(tmp_path / "second", **changed)
    assert len(list(assets.rglob("*.safetensors"))) > known
    fresh, _ = evaluated(tmp_path / "third", **(changed | {"cache_base_pictures": False}))
    assert kept == fresh


def test_a_run_that_was_evaluated_before_its_checkpoint_is_resumed(tmp_path, assets):
    """While the base model draws, the adapter takes no gradient; it belongs to the base model as little as ever."""
    settings = SETTINGS | {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.05, "max_steps": 2}
    t = make_trainer("ACFlowTrainer", tmp_path / "run", tiny_sd3(), **settings)
    t.evaluate(PROMPTS)
    t.train()
    t.evaluate(PROMPTS)
    known = len(list(assets.rglob("*.safetensors")))
    t = make_trainer("ACFlowTrainer", tmp_path / "run", tiny_sd3(), **settings)
    assert t.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1")).global_step == 2
    t.evaluate(PROMPTS)
    assert len(list(assets.rglob("*.safetensors"))) == known
