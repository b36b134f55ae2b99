"""Groupwise rewards see all pictures of a prompt at once, whatever the micro-batches; a pair judge gives win rates."""

import math
from contextlib import nullcontext

import pytest
import torch

from flowrl_trainers.rewards import groupwise, pairwise
from flowrl_trainers.rewards.pairwise import pairs_of

from .helpers import constant, first_examples, make_trainer, redness


@groupwise
def apart(images, prompts, **columns):
    """The distance of each picture to the mean of its group."""
    return (images - images.mean(dim=0)).square().mean(dim=(1, 2, 3)).sqrt()


def shades(*levels):
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 4, 4)


@pytest.mark.parametrize("name", ["DiffusionNFTTrainer", "TAFSGRPOTrainer"])
def test_a_call_gets_all_pictures_of_one_prompt(tmp_path, monkeypatch, name):
    """Groups of two in micro-batches of one: every state is compared with its like, and other columns keep theirs."""
    groups, found = [], []

    @groupwise
    def watched(images, prompts, **columns):
        groups.append(prompts)
        return apart(images=images, prompts=prompts)

    rewards = [redness, watched, constant]
    t = make_trainer(name, tmp_path, reward=rewards, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    t.probe()
    assert groups == [["a red circle"] * 2]
    groups.clear()
    score = t.scorer.score
    monkeypatch.setattr(
        t.scorer, "score", lambda x, examples: found.append((x, examples, score(x, examples))) or found[-1][2]
    )
    t.make_rollout(first_examples(t))
    ((latents, examples, scores),) = found
    states = len(latents) // 4
    assert states == (2 if name == "TAFSGRPOTrainer" else 1)
    images = t.flow.images(latents)
    of_images = images.unflatten(0, (2, 2, states))  # prompt, image, state
    expected = (of_images - of_images.mean(dim=1, keepdim=True)).square().mean(dim=(3, 4, 5)).sqrt().flatten()
    torch.testing.assert_close(scores[:, 1], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(scores[:, 0], redness(images=images, prompts=[]), atol=1e-6, rtol=1e-5)
    assert not scores[:, 2].any()
    assert expected.min() > 1e-3
    prompts = list(dict.fromkeys(example.prompt for example in examples))
    assert groups == [[prompt] * 2 for prompt in prompts for _ in range(states)]


def test_uneven_groups_are_refused(tmp_path):
    t = make_trainer("ACFlowTrainer", tmp_path, reward=apart)
    examples = first_examples(t)[:3]
    with pytest.raises(
        ValueError,
        match=r"`examples` has 1 pictures of the prompt in row \d, but .* groups of 2 \(`num_generations`\)",
    ):
        t.scorer.score(t.initial_latents([e.key for e in examples]), examples)


def test_a_run_trains_on_ranks_alone_and_evaluations_leave_them_out(tmp_path):
    def brighter(images, others, prompts, log_metric, **columns):
        return (images.mean(dim=(1, 2, 3)) > others.mean(dim=(1, 2, 3))).float()

    t = make_trainer("DiffusionNFTTrainer", tmp_path, reward=pairwise(brighter), eval_dataset=["a red circle"] * 2)
    t.train()
    row = t.evaluate()
    assert t.state.log_history[0]["reward/brighter"] == 0.5  # of two pictures one wins
    assert t.state.log_history[0]["reward_std/brighter"] == 0.5
    assert not any("brighter" in name for name in row)
    assert row["eval_diversity"] > 0
    assert any(p.abs().max() > 0 for n, p in t.model.named_parameters() if "lora_B" in n)
    t.save_model()


# ---- pairs ---------------------------------------------------------------------------------------------------------


def brightness(images, others, prompts, **columns):
    """The first wins where it is brighter; equal pictures tie."""
    return [0.5 + 0.5 * (x - y).mean().sign() for x, y in zip(images, others, strict=True)]


def test_shares_of_all_pairs_are_ranks():
    """The picture with k darker ones of the other four wins k of its four comparisons; a tie counts half."""
    scores = pairwise(brightness)(images=shades(0.3, 0.1, 0.9, 0.5, 0.7), prompts=["a"] * 5)
    assert scores == [0.25, 0.0, 1.0, 0.5, 0.75]
    assert pairwise(brightness)(images=shades(0.1, 0.5, 0.5), prompts=["a"] * 3) == [0.0, 0.75, 0.75]


@pytest.mark.parametrize(
    ("count", "budget", "rounds"), [(5, None, 2), (6, None, 2.5), (6, 14, 2), (8, 8, 1), (2, None, 0.5), (2, 2, 0.5)]
)
def test_every_picture_is_compared_equally_often(count, budget, rounds):
    pairs = pairs_of(count, budget)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == rounds * count
    assert all(sum(i in pair for pair in pairs) == 2 * rounds for i in range(count))
    if budget is None:
        assert len(pairs) == count * (count - 1) / 2


def test_a_judge_may_be_asynchronous_abstain_and_read_columns():
    seen = {}

    async def wise(images, others, prompts, answer, **columns):
        seen.update(answer=answer, prompts=prompts)
        return [None if 3 in pair else float(pair[0] < pair[1]) for pair in pairs_of(4, 4)]

    reward = pairwise(wise, budget=4)
    scores = reward(images=shades(0.1, 0.2, 0.3, 0.4), prompts=["a"] * 4, answer=[1, 2, 3, 4])
    with pytest.raises(StopIteration) as stop:
        scores.send(None)
    assert stop.value.value == [1.0, 0.5, 0.0, None]  # pairs 0-1, 1-2, 2-3 and 3-0
    assert seen == {"answer": [1, 2, 3, 4], "prompts": ["a"] * 4}
    assert reward.needed_columns() == ["answer"]


def test_a_picture_that_is_not_finite_is_left_out_and_no_fault_of_the_judge():
    def brighter(images, others, prompts, **columns):
        return torch.sigmoid(images.mean(dim=(1, 2, 3)) - others.mean(dim=(1, 2, 3))).round()

    images = shades(0.1, 0.9, 0.5).clone()
    images[1, 0, 0, 0] = math.nan
    scores = pairwise(brighter)(images=images, prompts=["a"] * 3)
    assert (scores[0], scores[2]) == (0.0, 1.0)
    assert math.isnan(scores[1])
    images[0] = math.inf
    scores = pairwise(brighter)(images=images, prompts=["a"] * 3)  # none is left to compare with
    assert math.isnan(scores[0])
    assert scores[2] is None


@pytest.mark.parametrize(("answer", "sentence"), [
    ([0.5], "The judge 'wrong' returned 1 answers for 3 pairs: return one for each"),
    ([0.5, 3, 0.5], "The judge 'wrong' returned 3: return the probability that the first picture is the better one"),
    ([0.5, float("nan"), 0.5], "The judge 'wrong' returned nan: return the probability"),
    (None, "The judge 'wrong' returned None for 3 pairs: return a list of answers, one for each"),
    (0.5, r"The judge 'wrong' returned a float \(0.5\) for 3 pairs: return a list of answers"),
    (torch.full((3, 1), 0.5), r"The judge 'wrong' returned \[0.5\]: return the probability"),
    (["yes", "no", "yes"], "The judge 'wrong' returned 'yes': return the probability"),
    ([None, 0.5, True], None),
])  # fmt: skip
def test_wrong_answers_of_a_judge_are_refused(answer, sentence):
    def wrong(images, others, prompts, **columns):
        return answer

    with pytest.raises(ValueError, match=sentence) if sentence else nullcontext():
        pairwise(wrong)(images=shades(0.1, 0.2, 0.3), prompts=["a"] * 3)


def test_wrong_judges_are_refused():
    with pytest.raises(TypeError, match=r"`judge` \('pickscore'\) must be a function of `images, others, prompts"):
        pairwise("pickscore")
    with pytest.raises(ValueError, match=r"`budget` \(1\) must be at least 2, or None for all pairs"):
        pairwise(brightness, budget=1)
    with pytest.raises(ValueError, match=r"`budget` \(3\) must be at least 4, the pictures of a prompt"):
        pairwise(brightness, budget=3)(images=shades(0.1, 0.2, 0.3, 0.4), prompts=["a"] * 4)
    with pytest.raises(ValueError, match="Reward 'better' must take `images, prompts"):
        pairwise(lambda first, second: 1.0, name="better")


# ---- where there are no groups -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "reward", "settings", "sentence"), [
    ("AdjointMatchingTrainer", apart, {}, "Reward 'apart' is not differentiable"),
    ("DiffusionNFTTrainer", apart, {"num_generations": 1, "reward_shaping": "none"}, "Reward 'apart' is groupwise, .* but `num_generations` is 1: make it 2 or more"),
    ("DiffusionNFTTrainer", apart, {"metric_for_best_model": "reward/apart"}, "`metric_for_best_model` is 'reward/apart', which evaluations do not have"),
])  # fmt: skip
def test_runs_without_groups_are_refused(tmp_path, name, reward, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_trainer(name, tmp_path, reward=reward, **settings)
