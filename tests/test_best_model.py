"""The best checkpoint: by which metrics it may be chosen, and that it is what a run ends with."""

import json
import shutil

import pytest
import torch
from datasets import Dataset

from flowrl_trainers import AdjointMatchingConfig
from flowrl_trainers.rewards import differentiable

from .helpers import adjoint_matching, redness
from .tiny import tiny_sd3


@pytest.mark.parametrize("metric", [None, "eval_loss", "reward/taste", "eval_diversity"])
def test_a_best_checkpoint_by_a_metric_that_no_evaluation_has_is_refused(tmp_path, tiny_pipeline, metric):
    with pytest.raises(
        ValueError,
        match=r"`metric_for_best_model` is '.*', which evaluations do not have, or not each of them: "
        r"choose reward/redness",
    ):
        adjoint_matching(
            tmp_path, tiny_pipeline, eval_dataset=Dataset.from_dict({"prompt": ["a cat"]}), save_strategy="steps",
            save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
            metric_for_best_model=metric,
        )  # fmt: skip


def test_the_best_of_a_reward_that_is_lowered_is_the_lowest(tmp_path, tiny_pipeline):
    settings = dict(
        eval_dataset=Dataset.from_dict({"prompt": ["a cat"]}), save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="reward/redness",
        reward_weights=[-1.0],
    )  # fmt: skip
    with pytest.raises(
        ValueError, match="`greater_is_better` is True for 'redness', which a weight of -1 lowers: set it to False"
    ):
        adjoint_matching(tmp_path, tiny_pipeline, **settings)
    with pytest.raises(ValueError, match="which a weight of -1 lowers"):  # of TAFS-GRPO's further row
        adjoint_matching(tmp_path, tiny_pipeline, **(settings | {"metric_for_best_model": "eval_ode_reward/redness"}))
    adjoint_matching(tmp_path, tiny_pipeline, greater_is_better=False, **settings)


def test_a_larger_reward_is_better_whatever_it_is_called(tmp_path):
    for metric, greater in (
        ("eval_reward/gloss", True),
        ("reward/redness", True),
        ("eval_clarity", True),
        ("eval_gloss", False),
    ):
        config = AdjointMatchingConfig(
            output_dir=str(tmp_path), metric_for_best_model=metric, use_cpu=True, report_to="none"
        )
        assert config.greater_is_better is greater


@pytest.mark.parametrize("metric", ["eval_colour_entropy", "velocity_distance", "reward/redness"])
def test_a_best_checkpoint_may_be_by_whatever_an_evaluation_returns(tmp_path, tiny_pipeline, metric):
    t = adjoint_matching(
        tmp_path, tiny_pipeline, eval_dataset=Dataset.from_dict({"prompt": ["a cat"]}), save_strategy="steps",
        save_steps=1, eval_strategy="steps", eval_steps=1, max_steps=1, load_best_model_at_end=True,
        metric_for_best_model=metric,
    )  # fmt: skip
    t.train()
    assert t.state.best_model_checkpoint.endswith("checkpoint-1")


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path, tiny_pipeline):
    settings = dict(
        eval_dataset=Dataset.from_dict({"prompt": ["a red circle"] * 2}), save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, max_steps=3, load_best_model_at_end=True,
        metric_for_best_model="eval_reward/redness", learning_rate=0.1,
    )  # fmt: skip
    t = adjoint_matching(tmp_path, tiny_pipeline, **settings)
    t.train()
    best = max((r for r in t.state.log_history if "eval_reward/redness" in r), key=lambda r: r["eval_reward/redness"])
    assert t.state.best_model_checkpoint.endswith(f"checkpoint-{best['step']}")
    # What is told of the model is what the best evaluation found.
    assert t.rows["tuned"]["reward/redness"] == best["eval_reward/redness"]
    t.save_model()
    card = (tmp_path / "README.md").read_text()
    assert f"| `updates` | {best['step']} |" in card
    assert f"(samples/step-{best['step']:06d}.png)" in card
    tuned, rows = [p.detach().clone() for p in t.trained_parameters()], t.rows
    again = t.evaluate()
    assert again["eval_reward/redness"] == pytest.approx(best["eval_reward/redness"], abs=1e-6)

    sheet = json.loads((tmp_path / "samples" / "step-000001.json").read_text())
    assert sheet["prompts"] == ["a red circle"]

    # A finished run that is resumed ends with the same model, wherever it was moved.
    (tmp_path / "moved").mkdir()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        checkpoint.rename(tmp_path / "moved" / checkpoint.name)
    resumed = adjoint_matching(tmp_path / "moved", tiny_sd3(), **settings)
    assert resumed.train(resume_from_checkpoint=True).global_step == 3
    assert all(torch.equal(a, b) for a, b in zip(tuned, resumed.trained_parameters(), strict=True))
    assert resumed.rows == rows
    shutil.copytree(tmp_path / "moved" / "checkpoint-3", tmp_path / "backup" / "checkpoint-3")  # of the last alone
    state = json.loads((tmp_path / "backup" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best['step']}")
    (tmp_path / "moved" / f"checkpoint-{best['step']}").rename(tmp_path / f"checkpoint-{best['step']}")
    resumed = adjoint_matching(tmp_path / "elsewhere", tiny_sd3(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "backup" / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(tuned, resumed.trained_parameters(), strict=True))
    shutil.rmtree(tmp_path / f"checkpoint-{best['step']}")
    assert (
        adjoint_matching(tmp_path / "moved", tiny_sd3(), **settings).train(resume_from_checkpoint=True).global_step
        == 3
    )


def test_the_card_names_the_update_of_the_best_checkpoint(tmp_path, tiny_pipeline):
    """The best evaluation may have no checkpoint: then the best that has one is loaded."""
    scores = {0: 0.0, 1: 0.0, 2: 1.0, 3: 2.0, 4: -1.0}

    @differentiable
    def scored(images, prompts, log_metric, trainer_state, **columns):
        log_metric("score", scores[trainer_state.global_step])
        return redness(images=images, prompts=prompts)

    t = adjoint_matching(
        tmp_path, tiny_pipeline, eval_dataset=Dataset.from_dict({"prompt": ["a cat"]}), save_strategy="steps",
        reward=scored, save_steps=2, eval_strategy="steps", eval_steps=1, max_steps=4, load_best_model_at_end=True,
        metric_for_best_model="eval_score", greater_is_better=True,
    )  # fmt: skip
    t.train()
    assert t.state.best_global_step == 3
    assert t.rows["tuned"]["score"] == 1.0
    t.save_model()
    assert "| `updates` | 2 |" in (tmp_path / "README.md").read_text()
    last = tmp_path / "samples" / "step-000004.json"
    of_the_last = last.read_bytes()
    t.evaluate()
    assert t.run_folder.sheet.name == "step-000002.png"
    assert last.read_bytes() == of_the_last  # not of the weights as they are now
