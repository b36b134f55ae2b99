"""Rewards cannot harm each other, the pictures or the loop; whatever is wrong with one is said with its name."""

import asyncio
import functools
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor

from flowrl_trainers.rewards import FunctionReward, as_rewards
from flowrl_trainers.sampling.draws import ImageKey
from flowrl_trainers.sampling.prompt_groups import Example
from flowrl_trainers.sampling.reward_watch import RewardWatch
from flowrl_trainers.sampling.scoring import call_rewards

from .helpers import CAPTIONS, adjoint_matching, make_trainer, redness

EXAMPLES = [Example(ImageKey(i, 0, 0), prompt, {"tags": [prompt]}) for i, prompt in enumerate(["a cat", "a dog"])]


def pictures() -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


# ---- copies ------------------------------------------------------------------------------------------------------


def vandal(images, prompts, tags, **columns):
    images.mul_(255).round_()
    prompts.clear()
    tags[0].append("spoiled")
    return [0.0, 0.0]


def test_what_a_reward_writes_into_its_arguments_nobody_else_sees():
    seen = {}

    def witness(images, prompts, tags, **columns):
        seen.update(images=images.clone(), prompts=list(prompts), tags=tags)
        return [1.0, 2.0]

    images = pictures()
    scores = call_rewards(as_rewards([vandal, witness]), images, EXAMPLES)
    assert torch.equal(images, pictures())
    assert torch.equal(seen["images"], pictures())
    assert seen["prompts"] == ["a cat", "a dog"]
    assert seen["tags"] == [["a cat"], ["a dog"]]
    assert EXAMPLES[0].columns == {"tags": ["a cat"]}
    assert scores.tolist() == [[0.0, 1.0], [0.0, 2.0]]


def test_an_evaluation_measures_the_true_pictures_beside_a_reward_that_changes_its_own(tmp_path, tiny_pipeline):
    """Edge density and diversity as without the vandal; they went from 0.20 to 0.99 and from 0.17 to 44."""
    held_out = Dataset.from_dict({"prompt": ["a cat"] * 2, "tags": [["a"]] * 2})
    t = adjoint_matching(tmp_path, tiny_pipeline, eval_dataset=held_out, log_images=0)
    expected = t.evaluate()
    t.eval_rewards.append(FunctionReward(vandal))
    t.comparison.evaluator.rewards.append(FunctionReward(vandal))
    t.comparison.base_rows.clear()
    found = t.evaluate()
    for name in ("eval_edge_density", "eval_diversity", "eval_reward/redness"):
        assert found[name] == expected[name]


def test_a_differentiable_reward_may_change_its_copy_in_place():
    def scaled(images, prompts, **columns):
        return images.mul_(2).mean(dim=(1, 2, 3))

    images = pictures().requires_grad_()
    call_rewards([FunctionReward(scaled, differentiable=True)], images, EXAMPLES).sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 2 / images[0].numel()))


# ---- what is returned --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("returned", "sentence"), [
    (({"score": 1.0}), r"returned a dict \(\{'score': 1.0\}\) for 2 images"),
    (([1.0, 2.0], {"info": 1}), r"returned a list \(\[1.0, 2.0\]\) as score 0 for 2 images"),
    ([[1.0], [2.0]], r"returned a list \(\[1.0\]\) as score 0 for 2 images"),
    (torch.zeros(2, 1), r"returned scores of shape \(2, 1\) for 2 images"),
    (np.zeros((2, 1)), "returned a ndarray .* as score 0 for 2 images"),
    (["0.5", "0.7"], r"returned a str \('0.5'\) as score 0 for 2 images"),
    ("ab", r"returned a str \('ab'\) for 2 images"),
    (0.5, r"returned a float \(0.5\) for 2 images"),
    ([1.0, 1j], r"returned a complex \(1j\) as score 1 for 2 images"),
    ([1.0], r"returned scores of shape \(1,\) for 2 images"),
])  # fmt: skip
def test_what_is_not_one_score_per_image_is_answered_with_the_reward_s_name(returned, sentence):
    odd = FunctionReward(lambda images, prompts, **columns: returned, name="odd")
    with pytest.raises(ValueError, match=f"^Reward 'odd' {sentence}: return one score per image.$"):
        call_rewards([odd], pictures(), EXAMPLES)


@pytest.mark.parametrize("returned", [
    [1, 2], (1.0, 2.0), np.array([1, 2]), torch.tensor([1, 2]), [np.float32(1), torch.tensor(2.0)], iter([1.0, 2.0]),
])  # fmt: skip
def test_numbers_of_every_kind_are_scores(returned):
    reward = FunctionReward(lambda images, prompts, **columns: returned, name="plain")
    assert call_rewards([reward], pictures(), EXAMPLES).tolist() == [[1.0], [2.0]]


def test_a_number_beyond_float_is_a_score_that_is_not_finite():
    reward = FunctionReward(lambda images, prompts, **columns: [10**400, None], name="huge")
    first, second = call_rewards([reward], pictures(), EXAMPLES)[:, 0]
    assert first == torch.inf
    assert second.isnan()


# ---- errors ------------------------------------------------------------------------------------------------------


def test_an_error_of_a_reward_bears_its_name_and_the_prompts():
    def broken(images, prompts, **columns):
        raise OSError("no space left")

    async def late(images, prompts, **columns):
        await asyncio.sleep(0)
        raise OSError("no answer")

    for reward, text in ((broken, "no space left"), (late, "no answer")):
        with pytest.raises(OSError, match=text) as caught:
            call_rewards([FunctionReward(reward)], pictures(), EXAMPLES)
        (note,) = caught.value.__notes__
        assert note == f"Reward {reward.__name__!r} failed on the prompts ['a cat', 'a dog']."


def test_the_note_says_after_how_many_updates(tmp_path, tiny_pipeline):
    calls = []

    def breaks(images, prompts, **columns):
        calls.append(1)
        if len(calls) > 2:
            raise OSError("the judge is gone")
        return redness(images=images, prompts=prompts)

    t = adjoint_matching(tmp_path, tiny_pipeline, reward=FunctionReward(breaks, differentiable=True), max_steps=5)
    with pytest.raises(OSError, match="the judge is gone") as caught:
        t.train()
    assert "Reward 'breaks' failed after 1 updates on the prompts" in caught.value.__notes__[0]


def test_asynchronous_rewards_keep_one_loop():
    """A client that was made in one call can be used in the next."""
    loops = []

    async def remote(images, prompts, **columns):
        loops.append(asyncio.get_running_loop())
        return [0.0, 0.0]

    for _ in range(3):
        call_rewards([FunctionReward(remote)], pictures(), EXAMPLES)
    assert len(set(loops)) == 1


# ---- columns and names -------------------------------------------------------------------------------------------


def with_answer(images, prompts, answer, **columns):
    return images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("name", ["ACFlowTrainer", "TAFSGRPOTrainer"])
def test_a_column_that_a_reward_needs_is_asked_for_before_training(tmp_path, name):
    with pytest.raises(
        ValueError,
        match=r"Reward 'with_answer' needs the column 'answer', which `train_dataset` lacks \(it has 'prompt'\)",
    ):
        make_trainer(name, tmp_path, reward=with_answer)
    full = Dataset.from_dict({"prompt": CAPTIONS, "answer": ["yes"] * len(CAPTIONS)})
    t = make_trainer(name, tmp_path, reward=with_answer, dataset=full)
    with pytest.raises(ValueError, match="'answer', which `eval_dataset` lacks"):
        t.evaluate(Dataset.from_dict({"prompt": ["a cat"]}))


def test_a_column_may_not_be_called_self(tmp_path, tiny_pipeline):
    rows = Dataset.from_dict({"prompt": CAPTIONS, "self": [1] * len(CAPTIONS)})
    with pytest.raises(ValueError, match="`train_dataset` has a column 'self'"):
        adjoint_matching(tmp_path, tiny_pipeline, dataset=rows)


def test_rewards_without_a_name_get_one():
    def scaled(scale, images, prompts, **columns):
        return images.mean(dim=(1, 2, 3)) * scale

    partials = [functools.partial(scaled, 1.0), functools.partial(scaled, 2.0)]
    with pytest.raises(
        ValueError,
        match="2 rewards called 'partial': give each its own name, by a dictionary from names to rewards or by",
    ):
        as_rewards(partials)
    assert [r.name for r in as_rewards(dict(zip(("one", "two"), partials, strict=True)))] == ["one", "two"]
    assert [r.name for r in as_rewards([FunctionReward(p, name=n) for p, n in zip(partials, "ab", strict=True)])] == [
        "a",
        "b",
    ]
    original = FunctionReward(partials[0])
    assert as_rewards({"other": original})[0].name == "other"
    assert original.name == "partial"


# ---- what is odd about a run's rewards ---------------------------------------------------------------------------


def test_odd_rewards_are_warned_of_once():
    watch = RewardWatch(
        as_rewards({name: (lambda images, prompts, **columns: None) for name in ("good", "silent", "flat", "huge")}),
        judged=False,
    )
    groups = torch.tensor([3, 3, 7, 7])
    columns = [[0.1, 0.4, 0.2, 0.2], [math.nan] * 4, [1.0, 1.0, 2.0, 2.0], [1.0, 2e6, 3.0, 4.0]]
    said = [watch.observe(torch.tensor(columns).T, groups) for _ in range(12)]
    assert said[0] == [
        "Reward 'silent' has given no score so far: is it meant for these prompts?",
        "Reward 'huge' gave a score of 2e+06: divide it, as rounding grows with it.",
    ]
    assert said[9] == [
        "Reward 'flat' was the same for all pictures of each prompt for 10 rollouts: it teaches nothing."
    ]
    assert not any(said[1:9] + said[10:])
    assert not watch.observe(torch.full((4, 4), math.nan), groups)  # for the others spoke before


def test_one_picture_per_prompt_has_nothing_to_differ_from():
    watch = RewardWatch(as_rewards({"single": lambda images, prompts, **columns: None}), judged=True)
    assert not any(watch.observe(torch.ones(4, 1), torch.arange(4)) for _ in range(12))


@pytest.mark.parametrize("score", [None, 1.0])
def test_ac_flow_does_not_move_where_no_picture_earns_more_than_another(tmp_path, caplog, score):
    """Weights that are all equal would imitate every picture, flaws included."""

    def the_same(images, prompts, **columns):
        return [score] * len(prompts)

    t = make_trainer("ACFlowTrainer", tmp_path, reward=the_same, critic_warmup_max_steps=0, learning_rate=0.1)
    before = [p.detach().clone() for p in t.trained_parameters()]
    t.train()
    assert all(torch.equal(a, b) for a, b in zip(before, t.trained_parameters(), strict=True))
    assert ("Reward 'the_same' has given no score so far" in caplog.text) == (score is None)


def test_the_others_are_trained_on_where_one_reward_says_nothing(tmp_path):
    def says_nothing(images, prompts, **columns):
        return [None] * len(prompts)

    settings = {"critic_warmup_max_steps": 0, "learning_rate": 0.1}
    both = make_trainer("ACFlowTrainer", tmp_path, reward=[redness, says_nothing], **settings)
    alone = make_trainer("ACFlowTrainer", tmp_path, **settings)
    for t in (both, alone):
        t.train()
    for a, b in zip(both.trained_parameters(), alone.trained_parameters(), strict=True):
        assert torch.equal(a, b)
