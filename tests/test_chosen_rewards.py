"""`rewards_column`: each prompt names the rewards that apply to it, so that one run mixes tasks."""

import math

import pytest
import torch
from datasets import Dataset

from flowrl_trainers import FlowPipeline
from flowrl_trainers.rewards import as_rewards, chosen_by, differentiable, groupwise
from flowrl_trainers.sampling.scoring import Scorer, call_rewards

from .helpers import make_trainer
from .reward_servers import examples, noise
from .runs import assert_same, fork_two, run
from .tiny import tiny_sd3

NOTHING = {"trainer_state": None, "log_metric": lambda name, value: None}


@differentiable
def redness(images, prompts, **columns):
    red, green, blue = images.unbind(dim=1)
    return (red - (green + blue) / 2).mean(dim=(1, 2))


@differentiable
def brightness(images, prompts, **columns):
    return images.mean(dim=(1, 2, 3))


def test_a_reward_is_shown_the_pictures_that_name_it():
    seen, noted = {}, {}

    def first(images, prompts, answer, log_extra, **columns):
        seen["first"] = (prompts, answer)
        log_extra("answers", answer)
        return images.mean(dim=(1, 2, 3))

    async def second(images, prompts, **columns):
        seen["second"] = (prompts, columns["answer"])
        return [2.0] * len(images)

    def third(images, prompts, **columns):
        raise AssertionError("no prompt names it")

    images, names = noise(4), [["first"], ["first", "second"], ["second"], None]
    asked = examples(list("abcd"), answer=[0, 1, 2, 3], tasks=names)
    rewards = chosen_by(as_rewards([first, second, third]), "tasks")
    scores = call_rewards(rewards, images[:3], asked[:3], **NOTHING, log_extra=noted.__setitem__)
    assert seen == {"first": (["a", "b"], [0, 1]), "second": (["b", "c"], [1, 2])}
    assert noted == {"answers": [0, 1, None]}
    mean = images.mean(dim=(1, 2, 3))
    nan = torch.nan
    expected = torch.tensor([[mean[0], nan, nan], [mean[1], 2, nan], [nan, 2, nan]])
    torch.testing.assert_close(scores, expected, equal_nan=True)
    both = call_rewards(rewards[:2], images, asked, **NOTHING, log_extra=noted.__setitem__)
    assert both[3].tolist() == [pytest.approx(float(mean[3])), 2]  # None is for all
    assert chosen_by(rewards, None) is rewards


def test_an_error_names_the_prompts_that_the_reward_was_shown():
    async def failing(images, prompts, **columns):
        raise KeyError("gone")

    asked = examples(["a", "b"], tasks=[["failing"], ["redness"]])
    rewards = chosen_by(as_rewards([failing, redness]), "tasks")
    with pytest.raises(KeyError) as found:
        call_rewards(rewards, noise(2), asked, **NOTHING, log_extra=lambda name, values: None)
    assert found.value.__notes__ == ["Reward 'failing' failed on the prompts ['a']."]


def test_a_gradient_comes_from_the_chosen_rewards_alone():
    """Each picture's gradient is that of its own reward; of a picture without one, zero."""
    flow = FlowPipeline.from_pipeline(tiny_sd3())
    latents = flow.initial_latents(3, torch.Generator().manual_seed(0))
    asked = examples(["a"] * 3, tasks=[["redness"], ["brightness"], []])
    context = NOTHING | {"log_extra": lambda name, values: None}

    def scored(rewards, rows):
        weights = torch.ones(len(rewards))
        scorer = Scorer(flow, rewards, weights, lambda: context, batch_size=1)
        return scorer.score_with_gradient(latents[rows], [asked[i] for i in rows])

    scores, gradient = scored(chosen_by(as_rewards([redness, brightness]), "tasks"), [0, 1, 2])
    assert scores.isnan().tolist() == [[False, True], [True, False], [True, True]]
    for row, reward in enumerate((redness, brightness)):
        alone, of_it = scored([reward], [row])
        torch.testing.assert_close(scores[row, row], alone[0, 0])
        torch.testing.assert_close(gradient[row], of_it[0])
    assert gradient[2].abs().max() == 0


@pytest.mark.parametrize(("column", "sentence"), [
    ({}, "^`rewards_column` is 'tasks', a column that `train_dataset` lacks: add it."),
    ({"tasks": [["redness"], ["orc"]]}, r"^Row 1 of `train_dataset` has \['orc'\] in its column 'tasks': list one or more of"),
    ({"tasks": [["redness"], []]}, r"^Row 1 of `train_dataset` has \[\] in its column 'tasks': list one or more of redness"),
    ({"tasks": ["redness", "redness"]}, "^Row 0 of `train_dataset` has 'redness' in its column 'tasks'"),
])  # fmt: skip
def test_wrong_choices_are_refused(tmp_path, tiny_pipeline, column, sentence):
    rows = Dataset.from_dict({"prompt": ["a cat", "a dog"]} | column)
    with pytest.raises(ValueError, match=sentence):
        make_trainer("ACFlowTrainer", tmp_path, tiny_pipeline, redness, rows, rewards_column="tasks")


def test_held_out_rows_may_choose_a_groupwise_reward_which_evaluations_leave_out(tmp_path, tiny_pipeline):
    @groupwise
    def apart(images, prompts, **columns):
        return [0.0] * len(images)

    rows = Dataset.from_dict({"prompt": ["a cat", "a dog"], "tasks": [["apart"], ["redness", "apart"]]})
    train = Dataset.from_dict({"prompt": ["a", "b"], "tasks": [None, None]})
    t = make_trainer(
        "ACFlowTrainer", tmp_path, tiny_pipeline, [redness, apart], train, rows, rewards_column="tasks",
        num_generations=2,
    )  # fmt: skip
    assert "eval_reward/redness" in t.evaluate()


def test_two_processes_choose_as_one(tmp_path):
    """The same scores, bit by bit, and None (NaN) for the same pictures; and the same weights after the update."""
    config = {
        "per_device_train_batch_size": 1, "num_generations": 2, "max_steps": 1, "save_strategy": "no", "optim": "sgd",
        "learning_rate": 1.0, "rewards_column": "tasks", "lora_dropout": 0.0,
    }  # fmt: skip
    one = run(tmp_path / "one", "DiffusionNFTTrainer", config | {"gradient_accumulation_steps": 4})
    assert one.returncode == 0, one.stderr
    shared = config | {"gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    for process in fork_two(tmp_path / "two", "DiffusionNFTTrainer", shared):
        assert process.returncode == 0, process.stderr
    alone = torch.load(tmp_path / "one" / "scores_0.pt")
    parts = [torch.load(tmp_path / "two" / f"scores_{rank}.pt") for rank in (0, 1)]
    assert_same(alone[0].nan_to_num(-9.0), torch.cat([part[0] for part in parts]).nan_to_num(-9.0))
    found = torch.cat([part.isnan() for part in alone])
    assert found.any()
    assert not found.all(dim=1).any()
    results = [torch.load(tmp_path / name / "result.pt") for name in ("one", "two")]
    for name, weight in results[0]["weights"].items():
        torch.testing.assert_close(results[1]["weights"][name], weight, atol=2e-6, rtol=1e-5)
    assert any(math.isfinite(row["reward/darkness"]) for row in results[0]["history"] if "reward/darkness" in row)
