"""The best checkpoint: by which metrics it may be chosen, and that it is what a run ends with."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback

from flowrl_trainers import AdjointMatchingConfig
from flowrl_trainers.rewards import differentiable

from .helpers import adjoint_matching, make_trainer, redness
from .tiny import tiny_sd3


@pytest.mark.parametrize("metric", [
    None, "eval_loss", "reward/taste", "eval_diversity", "checker_accuracy", "eval_base_velocity_distance",
    "base_reward/taste",
])  # fmt: skip
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


def test_a_row_of_a_sampler_that_evaluations_lack_is_refused_before_training(tmp_path):
    settings = dict(
        eval_dataset=Dataset.from_dict({"prompt": ["a cat"]}), save_strategy="steps", save_steps=1, log_images=0,
        eval_strategy="steps", eval_steps=1, max_steps=1, metric_for_best_model="eval_ode_reward/redness",
    )  # fmt: skip
    t = make_trainer("ACFlowTrainer", tmp_path / "none", **settings)
    with pytest.raises(ValueError, match="`metric_for_best_model` is 'eval_ode_reward/redness', which evaluations do"):
        t.train()
    assert t.state.global_step == 0
    t = make_trainer("TAFSGRPOTrainer", tmp_path / "one", **settings)
    t.train()
    assert t.state.best_model_checkpoint.endswith("checkpoint-1")


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


def test_the_best_of_those_that_were_saved_is_loaded(tmp_path, tiny_pipeline):
    """The best evaluation, the first, has no checkpoint, nor has the third."""
    scores = {0: 0.0, 1: 3.0, 2: 1.0, 3: 2.0, 4: 0.0, 5: -1.0, 6: 0.5}

    def scored(images, prompts, trainer_state, **columns):
        return [scores[trainer_state.global_step]] * len(images)

    t = adjoint_matching(
        tmp_path, tiny_pipeline, eval_dataset=["a cat"], save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=1, max_steps=6, load_best_model_at_end=True, metric_for_best_model="reward/scored",
        greater_is_better=True, eval_reward_funcs=scored, log_images=0, save_total_limit=2,
    )  # fmt: skip
    t.train()
    assert t.state.best_global_step == 1
    assert t.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert t.step_of_weights == 2
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]


def test_a_judge_that_said_nothing_once_does_not_stop_a_resumed_run(tmp_path):
    """Its mean is NaN, for which the checkpoint's file has null; and a checkpoint that was cut off is not the best."""
    scores = {0: 0.0, 1: None, 2: 1.0, 3: 0.5, 4: 0.1}

    def judge(images, prompts, trainer_state, **columns):
        return [scores[trainer_state.global_step]] * len(images)

    settings = {
        "eval_dataset": ["a cat"], "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps",
        "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "reward/judge",
        "greater_is_better": True, "eval_reward_funcs": judge, "log_images": 0,
    }  # fmt: skip
    adjoint_matching(tmp_path, tiny_sd3(), max_steps=1, **settings).train()
    t = adjoint_matching(tmp_path, tiny_sd3(), max_steps=4, **settings)
    write = t._write_checkpoint

    def cut_off(folder, model, trial):
        write(folder, model, trial)
        if folder.name == "checkpoint-2":
            (folder / "manifest.json").unlink()

    t._write_checkpoint = cut_off
    t.train(resume_from_checkpoint=True)
    assert t.state.best_global_step == 2
    assert t.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    assert t.step_of_weights == 3


def test_the_card_names_the_update_of_the_best_checkpoint(tmp_path, tiny_pipeline, capsys):
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
    capsys.readouterr()
    t.evaluate()
    assert "Held-out prompts after 2 updates" in capsys.readouterr().out
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["step"] == t.state.log_history[-1]["step"] == 2
    assert [row["step"] for row in logged if "train_runtime" in row] == [4]
    assert t.run_folder.sheet.name == "step-000002.png"
    assert last.read_bytes() == of_the_last  # not of the weights as they are now


STOPPED = {
    "learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
    "load_best_model_at_end": True, "metric_for_best_model": "reward/redness", "max_steps": 9, "log_images": 0,
}  # fmt: skip


def stopped(folder, patience: int, **settings):
    """With a learning rate of 0, no evaluation is better than the first."""
    callback = EarlyStoppingCallback(patience)
    return adjoint_matching(
        folder, tiny_sd3(), eval_dataset=["a red circle"], callbacks=[callback], **(STOPPED | settings)
    )


def test_patience_goes_on_counting_where_the_checkpoint_was(tmp_path, caplog):
    whole = stopped(tmp_path / "whole", patience=2)
    assert whole.train().global_step == 3
    stopped(tmp_path / "parts", patience=2, max_steps=2).train()
    assert stopped(tmp_path / "parts", patience=2).train(resume_from_checkpoint=True).global_step == 3
    again = stopped(tmp_path / "whole", patience=2)
    assert again.train(resume_from_checkpoint=True).global_step == 3
    assert "nothing is left to train: 2 evaluations brought nothing better" in caplog.text
    longer = stopped(tmp_path / "whole", patience=3)
    assert longer.train(resume_from_checkpoint=True).global_step == 4


def test_patience_may_be_added_to_a_resumed_run(tmp_path):
    settings = {"eval_dataset": ["a red circle"]} | STOPPED
    adjoint_matching(tmp_path, tiny_sd3(), **settings | {"max_steps": 1}).train()
    assert stopped(tmp_path, patience=1, max_steps=4).train(resume_from_checkpoint=True).global_step == 2


def test_the_best_of_another_number_is_forgotten(tmp_path, caplog):
    """Edge densities and rewards are not compared."""
    settings = {"max_steps": 1, "metric_for_best_model": "colour_entropy"}
    stopped(tmp_path, patience=9, **settings).train()
    t = stopped(tmp_path, patience=9, max_steps=3)
    t.train(resume_from_checkpoint=True)
    assert "The best number so far is not of `metric_for_best_model` (reward/redness)" in caplog.text
    assert t.state.best_metric == pytest.approx(t.rows["tuned"]["reward/redness"])
    assert t.state.best_global_step == 2


def test_what_a_learning_rate_follows_may_not_change(tmp_path):
    follows = {
        "learning_rate": 0.01, "lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"mode": "max"},
        "max_steps": 1,
    }  # fmt: skip
    stopped(tmp_path, patience=9, **follows).train()
    t = stopped(tmp_path, patience=9, **(follows | {"max_steps": 2, "eval_num_inference_steps": 3}))
    with pytest.raises(ValueError, match="was saved with eval_num_inference_steps None, but this run has 3"):
        t.train(resume_from_checkpoint=True)


def test_a_checkpoint_has_valid_json_where_a_judge_says_nothing(tmp_path):
    """Its mean is NaN, for which JSON has null; a resumed run goes on, and draws its curve."""

    def silent(images, prompts, **columns):
        return [None if "cat" in prompt else 0.5 for prompt in prompts]

    settings = dict(
        reward=silent, dataset=["a red circle", "a blue cross"], eval_dataset=["a cat"], log_images=0,
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    make_trainer("ACFlowTrainer", tmp_path, max_steps=2, **settings).train()
    text = (tmp_path / "checkpoint-2" / "trainer_state.json").read_text()
    rows = json.loads(text, parse_constant=pytest.fail)["log_history"]
    assert [row["eval_reward/silent"] for row in rows if "eval_reward/silent" in row] == [None, None]
    t = make_trainer("ACFlowTrainer", tmp_path, max_steps=4, **settings)
    t.train(resume_from_checkpoint=True)
    t.save_model()
    assert (tmp_path / "reward_curve.png").stat().st_size > 5000
    done = make_trainer("ACFlowTrainer", tmp_path, max_steps=4, **settings)
    (tmp_path / "reward_curve.png").unlink()
    done.train(resume_from_checkpoint=True)  # nothing is left, so that all rows are those of the file
    done.save_model()
    assert (tmp_path / "reward_curve.png").stat().st_size > 5000
