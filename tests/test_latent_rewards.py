"""Rewards that see latents: their gradient needs no decoder, and a run whose rewards all see latents never decodes."""

import pytest
import torch

from flowrl_trainers.rewards import FunctionReward

from .helpers import TRAINERS, first_examples, make_trainer, redness, update_rows

TARGET = 0.5


def near(latents, prompts, **columns):
    """Minus half the squared distance to a constant, whose gradient is `TARGET - latents`."""
    return -(latents - TARGET).square().sum(dim=(1, 2, 3)) / 2


NEAR = FunctionReward(near, differentiable=True, sees="latents")


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_whose_rewards_see_latents_never_decodes(tmp_path, monkeypatch, name):
    without_network = {"value_network": "none"} if name == "VGGFlowTrainer" else {}
    t = make_trainer(name, tmp_path, reward=NEAR, **without_network)

    def refuse(*args):
        raise AssertionError("the latents were decoded")

    for method in ("decode", "images"):
        monkeypatch.setattr(t.flow, method, refuse)
    t.train()
    assert all(row["reward/near"] < 0 for row in update_rows(t))
    assert any(p.abs().max() > 0 for n, p in t.model.named_parameters() if "lora_B" in n)


def test_gradients_of_latents_and_images_are_summed(tmp_path, monkeypatch):
    """Of the two alone: TARGET - x for the first, at its weight, beside that through the decoder for the second."""
    t = make_trainer("AdjointMatchingTrainer", tmp_path, reward=[redness, NEAR], reward_weights=[1.0, 3.0])
    examples = first_examples(t)
    latents = t.initial_latents([e.key for e in examples])
    x = latents.clone().requires_grad_()
    images = t.flow.decode(x)
    (through,) = torch.autograd.grad(redness(images=images, prompts=[]).sum(), x)
    decoded = []
    decode = t.flow.decode
    monkeypatch.setattr(t.flow, "decode", lambda part: decoded.append(len(part)) or decode(part))
    scores, gradient = t.scorer.score_with_gradient(latents, examples)
    assert decoded == [4]
    torch.testing.assert_close(gradient, through + 3 * (TARGET - latents), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores[:, 1], near(latents, []))


def test_evaluations_and_groups_see_latents_too(tmp_path):
    """The distance to the group's mean, in latents, is that of the latents; an evaluation has the reward's row."""

    def apart(latents, prompts, **columns):
        return (latents - latents.mean(dim=0)).square().mean(dim=(1, 2, 3)).sqrt()

    rewards = [
        FunctionReward(apart, groupwise=True, sees="latents"),
        near_alone := FunctionReward(near, sees="latents"),
    ]
    t = make_trainer("DiffusionNFTTrainer", tmp_path, reward=rewards, eval_dataset=["a red circle"])
    examples = first_examples(t)
    latents = t.initial_latents([e.key for e in examples])
    of_prompts = latents.unflatten(0, (2, 2))
    expected = (of_prompts - of_prompts.mean(dim=1, keepdim=True)).square().mean(dim=(2, 3, 4)).sqrt().flatten()
    found = t.scorer.score(latents, examples)
    torch.testing.assert_close(found, torch.stack([expected, near(latents, [])], dim=1))
    t.probe()
    assert t.evaluate()[f"eval_reward/{near_alone.name}"] < 0


def test_wrong_rewards_of_latents_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Reward 'of_images' must take `latents, prompts, .* by name"):
        FunctionReward(lambda images, prompts: 0, sees="latents", name="of_images")
    detached = FunctionReward(lambda latents, **columns: near(latents.detach(), []), True, "cut", sees="latents")
    t = make_trainer("VGGFlowTrainer", tmp_path, reward=detached)
    with pytest.raises(
        ValueError, match=r"Reward 'cut' .* no gradient: compute them from `latents` by torch operations"
    ):
        t.train()
    with pytest.raises(ValueError, match="`train_dataset` has a column 'latents', which is what rewards are told"):
        make_trainer("VGGFlowTrainer", tmp_path, dataset=t.train_dataset.dataset.add_column("latents", [0] * 4))
