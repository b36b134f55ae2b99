"""The metrics of the `evaluate` library give what the functions behind them give."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from flowrl_trainers.metrics import CheckerAccuracy, Diversity, MeanReward, PriorPreservation, diversity
from flowrl_trainers.metrics.evaluate_metrics import as_tensor
from flowrl_trainers.rewards import ShapesReward
from flowrl_trainers.run_folder.gallery import to_pillow
from flowrl_trainers.shapes.scenes import draw, parse, random_scene

PROMPTS = ["a red circle", "a red circle", "a blue cross", "a blue cross"]


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [to_pillow(torch.from_numpy(draw(random_scene(parse(p), rng))).permute(2, 0, 1) / 255) for p in PROMPTS]


def test_diversity_in_pixels_and_in_a_feature_space(pictures):
    images = as_tensor(pictures)
    assert images.shape == (4, 3, 32, 32)
    assert Diversity().compute(images=pictures, prompts=PROMPTS)["diversity"] == pytest.approx(
        diversity(images, PROMPTS)
    )
    accepted = [True, True, False, True]
    found = Diversity().compute(images=pictures, prompts=PROMPTS, accepted=accepted)["diversity"]
    assert found == pytest.approx(float((images[0] - images[1]).square().mean().sqrt()))
    clip = ShapesReward()
    embeddings = clip.image_embeddings(images)
    expected = ((embeddings[0] - embeddings[1]).norm() + (embeddings[2] - embeddings[3]).norm()) / 2
    found = Diversity(clip.image_embeddings).compute(images=pictures, prompts=PROMPTS)["diversity"]
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_pictures_are_measured_as_they_are_now(pictures, tmp_path):
    """One that was opened from a file and edited since, on its side in the file, or saved with losses."""
    for number, picture in enumerate(pictures[:2]):
        picture.save(tmp_path / f"{number}.png")
    edited, other = (Image.open(tmp_path / f"{number}.png") for number in range(2))
    edited.paste("black", (0, 0, 32, 32))
    expected = diversity(as_tensor([edited, other]), ["p"] * 2)
    assert Diversity().compute(images=[edited, other], prompts=["p"] * 2)["diversity"] == pytest.approx(expected)
    one_by_one = Diversity()
    for picture in (edited, other):
        one_by_one.add(images=picture, prompts="p")
    assert one_by_one.compute()["diversity"] == pytest.approx(expected)
    noisy = Image.effect_noise((32, 32), 80).convert("RGB")
    noisy.save(tmp_path / "noisy.jpg", quality=95)
    loaded = Image.open(tmp_path / "noisy.jpg")
    expected = float((as_tensor([loaded]) - as_tensor([noisy])).square().mean().sqrt())
    found = PriorPreservation().compute(images=[loaded], base_images=[noisy], prompts=["p"])
    assert found["prior_distance"] == pytest.approx(expected)


def test_pictures_of_several_sizes_are_refused(pictures):
    with pytest.raises(ValueError, match=r"^The pictures have 2 sizes, \(16, 16\) and \(32, 32\) among them: make"):
        Diversity().compute(images=[pictures[0], pictures[1].resize((16, 16))], prompts=["p", "p"])


def test_prior_preservation_is_measured_by_the_spread_of_the_base(pictures):
    same = PriorPreservation().compute(images=pictures, base_images=pictures, prompts=PROMPTS)
    assert same["prior_distance"] == 0
    assert same["prior_spread"] == pytest.approx(diversity(as_tensor(pictures), PROMPTS))
    other = PriorPreservation().compute(images=pictures[::-1], base_images=pictures, prompts=PROMPTS)
    images = as_tensor(pictures)
    expected = (images - images.flip(0)).square().flatten(1).mean(dim=1).sqrt().mean()
    assert other["prior_distance"] == pytest.approx(float(expected))
    assert other["prior_distance"] > 0.1


def test_mean_reward_leaves_out_what_has_no_score():
    assert MeanReward().compute(scores=[1.0, None, 3.0, None]) == {"mean_reward": 2.0, "missing": 0.5}
    assert math.isnan(MeanReward().compute(scores=[None])["mean_reward"])
    assert all(math.isnan(value) for value in MeanReward().compute(scores=[]).values())


def test_checker_accuracy_counts_right_pictures(pictures):
    assert CheckerAccuracy().compute(images=pictures, prompts=PROMPTS)["checker_accuracy"] == 1
    assert CheckerAccuracy().compute(images=pictures, prompts=["a red circle"] * 4)["checker_accuracy"] == 0.5
