"""Rewards by name on tiny random checkpoints of the real architectures, each against a computation of its own.

The published checkpoints are far too large for a test; what is held here is everything around their numbers: layout,
preprocessing, tokens, scale and gradient.
"""

import asyncio
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from flowrl_trainers.rewards import (
    NAMED_REWARDS,
    AestheticReward,
    CLIPScore,
    HPSv2,
    ImageReward,
    PickScore,
    as_rewards,
)
from flowrl_trainers.rewards.preprocessing import resize_and_crop, resize_and_pad
from flowrl_trainers.shapes.models import WEIGHTS, new_tokenizer

from .tiny_image_reward import official_score
from .tiny_rewards import CONTEXT, LEVEL, PROMPTS, SIZE, SIZES, clip_config, resized_by_pillow, to_pillow, waves
from .tolerances import in_bfloat16


@pytest.mark.parametrize("size", SIZES)
def test_resizing_is_bicubic_as_pillow_defines_it(size):
    """Shorter side to 28 and centre, or longer side to 28 and black: Pillow's kernel in floats, 1e-5 apart at most."""
    images, (height, width) = waves(size), size
    shorter, longer = SIZE / min(size), SIZE / max(size)
    cropped = resized_by_pillow(images, int(height * shorter), int(width * shorter))
    top, left = (cropped.shape[2] - SIZE) // 2, (cropped.shape[3] - SIZE) // 2
    torch.testing.assert_close(
        resize_and_crop(images, SIZE), cropped[..., top : top + SIZE, left : left + SIZE], atol=1e-5, rtol=0
    )

    padded, inside = (
        torch.zeros(3, 3, SIZE, SIZE),
        resized_by_pillow(images, round(height * longer), round(width * longer)),
    )
    top, left = (SIZE - inside.shape[2]) // 2, (SIZE - inside.shape[3]) // 2
    padded[..., top : top + inside.shape[2], left : left + inside.shape[3]] = inside
    torch.testing.assert_close(resize_and_pad(images, SIZE), padded, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_the_librarys_processor(clip, size):
    """Pillow rounds to 8 bits after each pass: half a level, and half a level times at most 1.3 of bicubic weights, so
    1.15 levels.

    Without resizing the two agree to rounding. Waves of 0.5 ± 0.3 keep the kernel's overshoot within range, where
    Pillow clips nothing.
    """
    images, reward = waves(size), CLIPScore(clip)
    theirs = CLIPImageProcessorPil.from_pretrained(clip)(to_pillow(images), return_tensors="pt").pixel_values
    apart = ((reward.pixels(images) - theirs) * reward.std).abs().max()
    assert apart <= (1e-6 if size == (SIZE, SIZE) else 1.15 * LEVEL)


@pytest.mark.parametrize("size", SIZES)
def test_clip_score_and_pickscore_are_what_transformers_computes(clip, size):
    """`CLIPModel.forward` is exp(logit_scale) cos: the same to rounding on the same pixels, and 4e-4 apart at most as
    measured when Pillow resizes, whose rounding the test above bounds.
    """
    images, model = waves(size), CLIPModel.from_pretrained(clip)
    theirs = CLIPImageProcessorPil.from_pretrained(clip)(to_pillow(images), return_tensors="pt").pixel_values
    tokens = new_tokenizer()(PROMPTS, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt")
    for pixels, tolerance in [(CLIPScore(clip).pixels(images), 1e-6), (theirs, 1e-3)]:
        with torch.no_grad():
            logits = model(**tokens, pixel_values=pixels).logits_per_image.diagonal()
            scale = float(model.logit_scale.exp())
        torch.testing.assert_close(CLIPScore(clip)(images, PROMPTS), logits / scale, atol=tolerance, rtol=0)
        torch.testing.assert_close(PickScore(clip, clip)(images, PROMPTS), logits, atol=tolerance * scale, rtol=0)
    assert (logits / scale).std() > 0.01  # ten times the larger tolerance


@pytest.mark.parametrize("size", SIZES)
def test_hpsv2_is_what_open_clip_computes(hps, size):
    """The checkpoint's own network on tokens padded with 0 to the whole context, and on pictures padded with black
    (mean subtracted after).
    """
    folder, network = hps
    images, (height, width) = waves(size), size
    inside = resized_by_pillow(images, round(height * SIZE / max(size)), round(width * SIZE / max(size)))
    vertical, horizontal = SIZE - inside.shape[2], SIZE - inside.shape[3]
    left, top = horizontal // 2, vertical // 2
    square = nn.functional.pad(inside, (left, horizontal - left, top, vertical - top))
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    tokens = torch.zeros(3, CONTEXT, dtype=torch.long)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        ids = torch.tensor(new_tokenizer()(prompt, truncation=True, max_length=CONTEXT).input_ids)
        row[: len(ids)] = ids
    expected = torch.cosine_similarity(
        network.visual((square - mean[:, None, None]) / std[:, None, None]), network.encode_text(tokens)
    )
    reward = HPSv2(folder, folder, architecture=clip_config("gelu"))
    torch.testing.assert_close(reward(images, PROMPTS), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.01  # a thousand times the tolerance


@pytest.mark.parametrize("size", SIZES)
def test_image_reward_is_what_its_official_code_computes(image_reward, size):
    """The official computation of one picture and one prompt at a time, unpadded, in float64: the same to rounding,
    which it would not be with transformers' default epsilon (1e-5 for 1e-6 moves it by 6e-4) or heads; where pictures
    are resized, 1.6e-5 apart at most as measured, as Pillow resizes in float32.
    """
    folder, tensors = image_reward
    tensors = {name: t.double() for name, t in tensors.items()}
    images, (height, width) = waves(size), size
    pixels = resized_by_pillow(images, SIZE * height // min(size), SIZE * width // min(size)).double()
    top, left = (pixels.shape[2] - SIZE) // 2, (pixels.shape[3] - SIZE) // 2
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (pixels[..., top : top + SIZE, left : left + SIZE] - mean[:, None, None]) / std[:, None, None]
    ids = [
        torch.tensor(AutoTokenizer.from_pretrained(folder)(p, truncation=True, max_length=35).input_ids)
        for p in PROMPTS
    ]
    expected = torch.stack([official_score(tensors, x, i) for x, i in zip(pixels, ids, strict=True)])
    scores = ImageReward(folder, folder, dtype=torch.float64)(images.double(), PROMPTS)
    torch.testing.assert_close(scores, expected, atol=1e-10 if size == (SIZE, SIZE) else 1e-4, rtol=0)
    assert [len(i) for i in ids] == [12, 27, 35]  # the last is cut
    assert (
        torch.stack([official_score(tensors, x, ids[0]) for x in pixels]).std() > 1
    )  # of one prompt: ten thousand times the tolerance


@pytest.mark.parametrize("size", SIZES)
def test_aesthetic_is_the_linear_layers_over_the_unit_embedding(aesthetic, size):
    """To rounding of float32 on a picture of the right size; 2.1e-4 apart at most, as measured, when Pillow resizes
    and rounds.
    """
    folder, tower, layers = aesthetic
    images = waves(size)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(to_pillow(images), return_tensors="pt").pixel_values
    x = tower(pixels).image_embeds
    x = x / x.norm(dim=-1, keepdim=True)
    for weight, bias in layers:
        x = x @ weight.T + bias
    scores = AestheticReward(folder)(images, PROMPTS)
    torch.testing.assert_close(scores, x[:, 0], atol=1e-5 if size == (SIZE, SIZE) else 1e-3, rtol=0)
    assert scores.std() > 5e-3  # five times the larger tolerance


@pytest.mark.parametrize(
    "name", [name for name, reward in NAMED_REWARDS.items() if reward.differentiable and name != "shapes"]
)
def test_gradient_is_that_of_finite_differences(make_reward, name):
    """In float64, across the resize and for pixels beyond [0, 1]: central differences of step 1e-4 err by
    about 1e-8.
    """
    reward, x = make_reward[name](torch.float64), waves((40, 52), amplitude=0.7).double()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, PROMPTS).sum(), x)
    with torch.no_grad():
        numeric = (reward(x + 1e-4 * direction, PROMPTS) - reward(x - 1e-4 * direction, PROMPTS)).sum() / 2e-4
    assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=1e-5)
    assert float(x.detach().min()) < 0 < 1 < float(x.detach().max())
    outside = (x < 0) | (x > 1)
    assert float(gradient[outside].abs().max()) > 0  # nothing is clipped


@pytest.mark.parametrize("name", ["clip_score", "pickscore", "hpsv2", "image_reward", "aesthetic"])
def test_dtype_is_that_of_the_weights_and_scores_stay_float32(make_reward, name):
    images, reward = waves((40, 52)), make_reward[name](torch.bfloat16)
    scores, exact = reward(images, PROMPTS), make_reward[name](torch.float32)(images, PROMPTS)
    assert {p.dtype for p in reward.model.parameters()} == {torch.bfloat16}
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact, atol=in_bfloat16(reward.model) * float(exact.abs().max()), rtol=0)


@pytest.mark.parametrize("amplitude", [0.0, 0.3, 0.7])
def test_jpeg_rewards_are_the_size_of_pillows_file(tmp_path, amplitude):
    images = waves((40, 52), amplitude).clamp(0, 1)
    sizes = []
    for number, picture in enumerate(to_pillow(images)):
        picture.save(tmp_path / f"{number}.jpg", quality=95)
        sizes.append((tmp_path / f"{number}.jpg").stat().st_size / 1000)
    more, less = as_rewards(["jpeg_incompressibility", "jpeg_compressibility"])
    assert more(images, PROMPTS) == sizes
    assert less(images, PROMPTS) == [-s for s in sizes]


@pytest.mark.parametrize("name", ["jpeg_incompressibility", "jpeg_compressibility", "checker"])
def test_a_picture_that_is_not_finite_has_no_finite_score(name):
    """Though the pixels of a JPEG, and a colour, can be had of any number."""
    (reward,) = as_rewards([name])
    images = torch.rand(3, 3, 32, 32)
    images[1, 0, 0, 0], images[2] = math.nan, math.inf
    scores = reward(images, ["a red circle"] * 3)
    assert [math.isnan(score) for score in scores] == [False, True, True]


def test_names_are_those_of_the_classes():
    assert {name: reward.name for name, reward in NAMED_REWARDS.items() if name != "shapes"} == {
        n: n for n in NAMED_REWARDS if n != "shapes"
    }
    assert {name for name, reward in NAMED_REWARDS.items() if not reward.differentiable} == {
        "checker",
        "jpeg_compressibility",
        "jpeg_incompressibility",
        "ocr",
        "ocr_strict",
        "vlm_judge",
        "geneval_judge",
    }


def test_the_rewards_of_the_docs_are_rewards():
    docs = Path(__file__).parent.parent / "docs"
    page = (docs / "rewards.md").read_text() + (docs / "guides" / "reward.md").read_text()
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        exec(block, scope)
    images = waves((28, 28))
    rewards = as_rewards([scope["length_of_answer"], scope["judge"], scope["redness"], scope["Likeness"](images[0])])
    assert [r.differentiable for r in rewards] == [False, False, True, True]
    assert rewards[0](images, PROMPTS, answer=["a", "bc", ""]) == [1.0, 2.0, 0.0]
    assert asyncio.run(rewards[1](images, PROMPTS)) == [1.0] * 3
    assert rewards[2](images, PROMPTS).shape == (3,)
    assert float(rewards[3](images, PROMPTS)[0]) == 0
    assert all(f"| `{name}` | `{reward.__name__}` |" in page for name, reward in NAMED_REWARDS.items())


def test_weights_that_were_cut_off_are_refused_by_name(tmp_path):
    shutil.copytree(WEIGHTS / "clip", tmp_path / "clip")
    weights = tmp_path / "clip" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(
        ValueError, match=r"^The weights of checkpoint '.*clip' were cut off or damaged \(.*\): get them again\.$"
    ):
        CLIPScore(tmp_path / "clip")
