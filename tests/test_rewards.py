"""Rewards: the contract, the CLIP score against a computation of its own, and what is refused."""

import asyncio

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image as PILImage

from flowrl_trainers import AdjointMatchingConfig, AdjointMatchingTrainer
from flowrl_trainers.rewards import (
    CheckerReward,
    CLIPScore,
    FunctionReward,
    Reward,
    ShapesReward,
    as_rewards,
    differentiable,
)
from flowrl_trainers.rewards.preprocessing import _resize
from flowrl_trainers.sampling.prompt_groups import Example, ImageKey
from flowrl_trainers.sampling.scoring import call_rewards
from flowrl_trainers.shapes import WEIGHTS, all_prompts, draw, load_clip, parse, random_scene
from flowrl_trainers.trainers.input_checks import check_columns

from .helpers import redness

PROMPTS = ["a red circle", "a blue square and a green cross"]


def pictures(size: int = 32) -> torch.Tensor:
    rng = np.random.default_rng(3)
    return (
        torch.from_numpy(np.stack([draw(random_scene(parse(p), rng, size), size) for p in PROMPTS])).permute(
            0, 3, 1, 2
        )
        / 255
    )


def examples(**columns) -> list[Example]:
    return [
        Example(ImageKey(i, 0, 0), p, {name: values[i] for name, values in columns.items()})
        for i, p in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("enabled", [True, False])
def test_asynchronous_rewards_compute_gradients_where_the_caller_does(enabled):
    async def asked(images, prompts, **columns):
        await asyncio.sleep(0)
        return [float(torch.is_grad_enabled())] * len(images)

    with torch.set_grad_enabled(enabled):
        assert call_rewards(as_rewards(asked), pictures(), examples()).flatten().tolist() == [float(enabled)] * 2


def test_a_reward_that_takes_other_arguments_is_refused():
    with pytest.raises(
        ValueError,
        match=r"^Reward 'narrow' must take `images, prompts, \*\*columns` by name, as trainers call it: "
        r".*'trainer_state'",
    ):
        as_rewards(narrow)
    (reward,) = as_rewards(needs_a_column)
    assert reward(images=pictures(), prompts=PROMPTS, answer=["a", "b"], trainer_state=None) == [0.0, 0.0]


class Own(Reward):
    name = "own"

    def __call__(self, images, prompts, **columns):
        return [0.0] * len(images)


class Narrow(Own):
    name = "narrow"

    def __call__(self, images, prompts):
        return [0.0] * len(images)


class Nameless(Own):
    name = ""


class Blind(Own):
    sees = "latent"


def of_latents(latents, prompts, **columns):
    return [0.0] * len(latents)


@pytest.mark.parametrize(("reward", "sentence"), [
    (Narrow(), r"Reward 'narrow' must take `images, prompts, \*\*columns` by name, as trainers call it: .*'trainer_state'"),
    (Nameless(), "A Nameless is called '': set its `name`, a text"),
    ({5: Own()}, "A Own is called 5: set its `name`, a text"),
    (of_latents, "Reward 'of_latents' asks for `latents`, but sees images: set `sees` to 'latents', or take `images`"),
    (Blind(), "Reward 'own' sees 'latent': set `sees` to 'images' or 'latents'"),
    (max, "Reward 'builtin_function_or_method' must take `images, prompts"),
], ids=["arguments", "name", "a number for a name", "another view", "view", "a function of C"])  # fmt: skip
def test_a_reward_of_any_kind_must_be_callable_as_trainers_call_it(reward, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        as_rewards(reward)


def test_a_reward_that_takes_no_further_columns_is_refused_where_the_data_has_some():
    def few(images, prompts, trainer_state, log_metric, log_extra):
        return [0.0] * len(images)

    rewards = as_rewards([few, Own()])
    check_columns(rewards, Dataset.from_dict({"prompt": ["a"]}), "train_dataset")
    with pytest.raises(ValueError, match=r"^Reward 'few' must take `images, prompts, \*\*columns` by name.*'answer'"):
        check_columns(rewards, Dataset.from_dict({"prompt": ["a"], "answer": ["b"]}), "train_dataset")


def test_a_judge_may_not_have_the_name_of_a_trained_reward(tmp_path):
    args = AdjointMatchingConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    judges = ["checker", FunctionReward(near, name="redness")]
    with pytest.raises(ValueError, match="`eval_reward_funcs` has a reward called 'redness', as `reward_funcs` has"):
        AdjointMatchingTrainer("no/such/folder", redness, args, ["a"] * 9, eval_reward_funcs=judges)


def near(images, prompts, **columns):
    return [0.0] * len(images)


def narrow(images, prompts):
    return [0.0] * len(images)


def needs_a_column(images, prompts, answer, **columns):
    return [0.0] * len(answer)


def test_a_reward_that_returns_nothing_is_named():
    def forgetful(images, prompts, **columns):
        pass

    with pytest.raises(
        ValueError, match=r"^Reward 'forgetful' returned None for 2 images: return one score per image\.$"
    ):
        call_rewards(as_rewards(forgetful), pictures(), examples())


def test_clip_score_is_the_cosine_of_the_two_embeddings():
    clip, tokenizer = load_clip()
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        text = clip.text_projection(clip.text_model(**tokens).pooler_output)
        image = clip.visual_projection(clip.vision_model((pictures() - 0.5) / 0.5).pooler_output)
    torch.testing.assert_close(
        ShapesReward()(pictures(), PROMPTS), torch.cosine_similarity(text, image), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("shape", [(48, 48), (37, 64), (200, 90), (24, 24)])
def test_resizing_is_torchs_own_in_values_and_gradients(shape):
    images, weight = torch.rand(2, 3, *shape, requires_grad=True), torch.rand(2, 3, 24, 30)
    with torch.inference_mode():  # what it keeps may be asked for here first
        _resize(images.detach(), 24, 30)
    expected = F.interpolate(images, size=(24, 30), mode="bicubic", antialias=True, align_corners=False)
    ours = _resize(images, 24, 30)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    gradients = [torch.autograd.grad((resized * weight).sum(), images)[0] for resized in (ours, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)


def test_clip_score_resizes_as_pillow_does():
    """Bicubic with antialiasing in torch against Pillow's, which rounds to 8 bits: one level of 255 apart, two at
    most.
    """
    large = pictures(80)
    reward = ShapesReward()
    ours = reward.pixels(large) * 0.5 + 0.5
    theirs = torch.from_numpy(np.stack([
        np.asarray(
            PILImage.fromarray((x.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).resize(
                (32, 32), PILImage.Resampling.BICUBIC
            )
        )
        for x in large
    ])).permute(0, 3, 1, 2) / 255  # fmt: skip
    assert (ours.clamp(0, 1) - theirs).abs().max() <= 2.5 / 255


def test_clip_score_crops_the_centre_of_a_wide_picture():
    wide = torch.cat([torch.zeros(2, 3, 32, 8), pictures(), torch.zeros(2, 3, 32, 8)], dim=3)
    reward = ShapesReward()
    torch.testing.assert_close(reward(wide, PROMPTS), reward(pictures(), PROMPTS), atol=1e-6, rtol=0)


def test_gradient_of_the_clip_score_is_that_of_finite_differences():
    reward, x = ShapesReward(), pictures(48)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, PROMPTS).sum(), x)
    with torch.no_grad():
        numeric = (reward(x + 1e-3 * direction, PROMPTS) - reward(x - 1e-3 * direction, PROMPTS)).sum() / 2e-3
    # Rounding of the scores (1e-7 each) over a step of 1e-3, and the curvature over it.
    assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=0.02, abs=2e-3)


def test_shapes_reward_prefers_the_right_caption():
    """The best of all 625 captions describes the drawn picture, in at least 95 of 100 cases."""
    captions, rng, reward = all_prompts(), np.random.default_rng(0), ShapesReward()
    numbers = rng.integers(0, len(captions), 100)
    drawn = (
        torch.from_numpy(np.stack([draw(random_scene(parse(captions[n]), rng)) for n in numbers])).permute(0, 3, 1, 2)
        / 255
    )
    scores = (
        reward.image_embeddings(drawn) @ reward.text_embeddings(captions, drawn).T
    )  # of every picture with every caption
    torch.testing.assert_close(scores.diagonal(), reward(drawn, captions[:100]), atol=1e-6, rtol=0)
    right = sum(
        sorted(parse(captions[int(best)])) == sorted(parse(captions[n]))
        for best, n in zip(scores.argmax(dim=1), numbers, strict=True)
    )
    assert right >= 95


def test_a_clip_is_loaded_by_name_of_its_folder():
    assert CLIPScore(WEIGHTS / "clip").name == "clip_score"
    torch.testing.assert_close(CLIPScore(WEIGHTS / "clip")(pictures(), PROMPTS), ShapesReward()(pictures(), PROMPTS))


def test_checker_reward_is_one_for_right_and_zero_for_wrong():
    reward = CheckerReward()
    assert reward(pictures(), PROMPTS) == [1.0, 1.0]
    assert reward(pictures(), PROMPTS[::-1]) == [0.0, 0.0]
    assert not reward.differentiable


def test_functions_coroutines_lists_and_none_are_scores():
    def from_column(images, prompts, length, **columns):
        return [length[0], None]

    async def slow(images, prompts, **columns):
        await asyncio.sleep(0.01)
        return torch.tensor([3.0, 4.0])

    rewards = as_rewards([from_column, slow, "checker"])
    assert [r.name for r in rewards] == ["from_column", "slow", "checker"]
    scores = call_rewards(rewards, pictures(), examples(length=[7, 8]))
    torch.testing.assert_close(scores, torch.tensor([[7.0, 3.0, 1.0], [float("nan"), 4.0, 1.0]]), equal_nan=True)


def test_a_wrong_number_of_scores_is_refused():
    with pytest.raises(
        ValueError, match=r"Reward 'short' returned scores of shape \(1,\) for 2 images: return one score per image"
    ):
        call_rewards(as_rewards(differentiable(short)), pictures(), examples())


def short(images, prompts, **columns):
    return [1.0]


def test_a_module_is_a_reward_under_the_name_of_its_class():
    class Brightness(torch.nn.Module):
        def forward(self, images, prompts, **columns):
            return images.mean(dim=(1, 2, 3))

    (plain,), (marked,) = as_rewards(Brightness()), as_rewards(differentiable(Brightness()))
    assert (plain.name, plain.differentiable, marked.differentiable) == ("Brightness", False, True)
    assert isinstance(plain, Reward)


@pytest.mark.parametrize(("rewards", "error", "sentence"), [
    ("beauty", ValueError, "`reward_funcs` names 'beauty', which is no known reward: choose shapes, checker"),
    ([], ValueError, "`reward_funcs` is empty"),
    (["shapes", "shapes"], ValueError, "`reward_funcs` has 2 rewards called 'shapes': give each its own name"),
    (3, TypeError, "`reward_funcs` has a int: pass a name, a callable"),
])  # fmt: skip
def test_what_is_no_reward_is_refused(rewards, error, sentence):
    with pytest.raises(error, match=sentence):
        as_rewards(rewards)


def test_a_prompt_that_stands_several_times_is_encoded_once(clip):
    """Each picture meets the embedding of its own prompt; equal but for the order of sums."""
    prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    images, rows = pictures(28)[[0, 1, 0, 1]], []
    each, once = CLIPScore(clip), CLIPScore(clip, distinct_prompts=True)
    for reward in (each, once):
        reward.model.text_model.register_forward_hook(lambda module, args, out: rows.append(len(out.pooler_output)))
    torch.testing.assert_close(once(images, prompts), each(images, prompts), atol=1e-5, rtol=0)
    assert rows == [2, 4]
    assert once(images, prompts).std() > 1e-3
