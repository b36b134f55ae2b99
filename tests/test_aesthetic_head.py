"""The aesthetic head as LAION publishes it: five linear layers in a file of tensors, over OpenAI's CLIP."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from flowrl_trainers.rewards import AestheticReward
from flowrl_trainers.rewards.aesthetic import HEAD, _read_head, linear_layers

from .tiny_rewards import JOINT, PROMPTS, waves

NUMBERS = (0, 2, 4, 6, 7)
# The published file, where it lies beside this checkout: 3.7 MB, not in the repository.
PUBLISHED = sorted((Path(__file__).parents[2] / "shared" / "data" / "aesthetic").glob(HEAD))


def random_head(width: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    layers = {}
    for number, (before, after) in zip(NUMBERS, pairwise([width, 1024, 128, 64, 16, 1]), strict=True):
        layers[f"layers.{number}.weight"] = torch.randn(after, before) / before**0.5
        layers[f"layers.{number}.bias"] = torch.randn(after)
    return layers


def affine_form(layers: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """w and b of w · e + b: the product of all matrices, and each bias through those behind it; in float64."""
    matrices = [layers[f"layers.{number}.weight"].double() for number in NUMBERS]
    behind, b = torch.eye(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for number, matrix in zip(reversed(NUMBERS), reversed(matrices), strict=True):
        b = b + behind @ layers[f"layers.{number}.bias"].double()
        behind = behind @ matrix
    return behind[0], b


@pytest.fixture(params=["random", *PUBLISHED], ids=["random", *("published" for _ in PUBLISHED)])
def head(request, tmp_path):
    if request.param != "random":
        return request.param
    torch.save(random_head(768), tmp_path / HEAD)
    return tmp_path / HEAD


def test_the_five_layers_are_one_affine_map(head):
    """Float32 rounds each of 1024 + 128 + 64 + 16 + 1 sums: 1e-4 apart at most on scores of about 5."""
    tensors = _read_head(head)
    layers = linear_layers(768).eval()
    layers.load_state_dict({name.removeprefix("layers."): t for name, t in tensors.items()})
    e = torch.nn.functional.normalize(torch.randn(64, 768, generator=torch.Generator().manual_seed(0)), dim=-1)
    w, b = affine_form(tensors)
    torch.testing.assert_close(layers(e)[:, 0].double(), e.double() @ w + b, atol=1e-4, rtol=0)
    if head in PUBLISHED:  # the numbers of the docstring
        assert float(w.norm()) == pytest.approx(18.0, abs=0.05)
        assert float(b) == pytest.approx(5.24, abs=0.005)


def test_head_and_clip_are_put_together(clip, tmp_path):
    """A head in LAION's layout over a CLIP with its text tower, of which the vision tower alone is read: as the CLIP's
    embedding and the affine form by hand.
    """
    from transformers import CLIPModel

    layers = random_head(JOINT)
    torch.save(layers, tmp_path / HEAD)
    reward = AestheticReward(head=tmp_path / HEAD, clip=clip)
    images = waves((28, 28))
    pixels = (images - reward.mean) / reward.std
    e = CLIPModel.from_pretrained(clip).get_image_features(pixels).pooler_output
    w, b = affine_form(layers)
    expected = torch.nn.functional.normalize(e.double(), dim=-1) @ w + b
    torch.testing.assert_close(reward(images, PROMPTS).double(), expected, atol=1e-5, rtol=0)
    assert expected.std() > 3e-4  # thirty times the tolerance
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, PROMPTS).sum(), x)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda layers: layers.pop("layers.7.bias"), "does not hold LAION's five linear layers: pass LAION's sac"),
    (lambda layers: layers.update({"layers.2.weight": torch.zeros(3, 3)}), "does not hold LAION's five linear layers"),
    (lambda layers: layers.update({"layers.0.weight": torch.zeros(3)}), "does not hold LAION's five linear layers"),
    (lambda layers: layers.update(epoch=3), r"holds no dictionary of plain tensors: pass LAION's sac\+logos"),
    (lambda layers: layers.update({"layers.0.weight": torch.zeros(1024, 768)}), r"reads embeddings of width 768, but those of `clip` \('.*'\) have 24: pass the CLIP"),
])  # fmt: skip
def test_a_wrong_head_is_refused_in_one_sentence(clip, tmp_path, change, sentence):
    layers = random_head(JOINT)
    change(layers)
    torch.save(layers, tmp_path / HEAD)
    with pytest.raises(ValueError, match=sentence):
        AestheticReward(head=tmp_path / HEAD, clip=clip)


def test_a_head_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"^`head` \('/nowhere.pth'\) is no file: pass LAION's sac"):
        AestheticReward(head="/nowhere.pth")
