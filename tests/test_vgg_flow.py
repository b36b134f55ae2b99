"""The VGG-Flow trainer: what it computes, what its value network learns from, what it refuses."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn

from flowrl_trainers import VGGFlowConfig, VGGFlowTrainer
from flowrl_trainers.flow import clean_estimate
from flowrl_trainers.networks import ValueMLP, ValueUNet, value_network
from flowrl_trainers.sampling.prompt_groups import ImageKey

from .gaussian import BETA, STD, GaussianFlow, SmoothControl, base_coefficients, closeness, continuous_gains, settings
from .helpers import CAPTIONS, LORA, first_examples, first_rollout, redness, update_rows
from .tiny import tiny_sd3


def vgg_flow(folder, pipeline, reward=redness, lora=LORA, network=None, **changes) -> VGGFlowTrainer:
    defaults = dict(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, num_inference_steps=6, timestep_bins=2,
        guidance_scale=1.0, max_sequence_length=8, reward_scale=50.0, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    config = VGGFlowConfig(**(defaults | changes))
    return VGGFlowTrainer(
        pipeline, reward, config, Dataset.from_dict({"prompt": CAPTIONS}), peft_config=lora, value_network=network
    )


# ---- states ---------------------------------------------------------------------------------------------------------


def test_one_state_of_each_bin_is_drawn_and_never_the_first(tmp_path, tiny_pipeline):
    t = vgg_flow(tmp_path, tiny_pipeline, num_inference_steps=11, timestep_bins=5, value_network="none")
    keys = [ImageKey(0, image, 0) for image in range(200)]
    steps = t.drawn_steps(keys)
    assert steps.shape == (200, 5)
    for bin_number in range(5):  # steps 1 to 10 in five bins of two
        assert set(steps[:, bin_number].tolist()) == {1 + 2 * bin_number, 2 + 2 * bin_number}
    assert torch.equal(t.drawn_steps(keys[7:9]), steps[7:9])  # whatever the batch


def test_what_is_kept_of_a_rollout_is_what_the_sampler_saw(tmp_path, tiny_pipeline):
    t = vgg_flow(tmp_path, tiny_pipeline, value_network="none")
    examples = first_examples(t)
    keys, conditioning = [e.key for e in examples], t.condition(examples)
    with torch.no_grad():
        kept = t.rollout(conditioning, keys)
        x, steps = t.initial_latents(keys, "initial latents"), t.drawn_steps(keys)
        for step in range(6):
            v = t.model(x, t.sigmas[step].expand(2), conditioning, guidance=True)
            for image, number in (steps == step).nonzero().tolist():
                assert torch.equal(kept.states[image, number], x[image])
                assert torch.equal(kept.velocities[image, number], v[image])
                assert kept.sigmas[image, number] == t.sigmas[step]
            x = x + (t.sigmas[step + 1] - t.sigmas[step]) * v
    assert torch.equal(kept.final, x)


# ---- targets --------------------------------------------------------------------------------------------------------


def test_the_reward_gradient_is_that_of_the_clean_estimate_and_does_not_pass_the_network(tmp_path, tiny_pipeline):
    """The same rule at the state and at the shifted point, bit for bit, against autograd at a detached estimate."""
    t = vgg_flow(tmp_path, tiny_pipeline, eta_schedule="constant", reward_gradient_clip_quantile=None)
    examples, (batch,) = first_rollout(t)
    conditioning = t.condition(examples)
    for record in (batch.record, batch.record.consistency):
        level = record.sigmas
        for state in range(2):
            x = record.states[:, state]
            with torch.no_grad():
                v = t.model(x, level[:, state], conditioning, guidance=True)
                estimate = clean_estimate(x, v, level[:, state])
            y = estimate.detach().requires_grad_()
            (expected,) = torch.autograd.grad(redness(images=t.flow.decode(y), prompts=None).sum(), y)
            assert torch.equal(record.reward_terms[:, state], -50.0 * expected)


def test_the_target_is_the_base_velocity_plus_the_scheduled_pull(tmp_path):
    """Without a value network: mean_d (v - v_base + beta eta R)^2, with eta = (1 - sigma)^2 and v still the base
    velocity.
    """
    changes = {"value_network": "none", "reward_gradient_clip_quantile": None}
    t = vgg_flow(tmp_path, tiny_sd3(), **changes)
    examples, (batch,) = first_rollout(t)
    _, (linear,) = first_rollout(vgg_flow(tmp_path, tiny_sd3(), eta_schedule="linear", **changes))
    sigma = batch.record.sigmas[:, 0, None, None, None]
    torch.testing.assert_close(batch.record.reward_terms[:, 0], (1 - sigma) * linear.record.reward_terms[:, 0])
    t.model.eval()
    losses = t.micro_batch_losses(t.model, batch, t.condition(examples), 0)
    torch.testing.assert_close(losses, batch.record.reward_terms[:, 0].square().mean(dim=(1, 2, 3)), rtol=1e-4, atol=0)


def test_four_fifths_of_the_gradients_keep_their_norm(tmp_path):
    norms = []
    for quantile in (None, 0.8):
        t = vgg_flow(
            tmp_path, tiny_sd3(), value_network="none", per_device_train_batch_size=4, timestep_bins=5,
            eta_schedule="constant", reward_gradient_clip_quantile=quantile,
        )  # fmt: skip
        _, (batch,) = first_rollout(t)
        norms.append(batch.record.reward_terms.flatten(0, 1).flatten(1).norm(dim=1))
    assert torch.isclose(norms[0], norms[1], rtol=1e-5).sum() == 16  # of 20; the quantile lies between two norms
    torch.testing.assert_close(norms[1].max(), norms[0].quantile(0.8))


def test_the_scale_is_found_on_the_first_rollout(tmp_path, tiny_pipeline):
    t = vgg_flow(
        tmp_path, tiny_pipeline, reward_scale=None, control_to_velocity_ratio=0.25, reward_gradient_clip_quantile=None
    )
    _, (batch,) = first_rollout(t)
    ratio = batch.record.reward_terms.square().mean().sqrt() / batch.record.base_velocities.square().mean().sqrt()
    assert float(ratio) == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_training_moves_the_reward_the_way_the_sign_says(tmp_path, sign):
    """On vectors; a trainer whose pull is turned round lowers the reward."""

    class Turned(VGGFlowTrainer):
        def _reward_term(self, gradient, sigma):
            return sign * super()._reward_term(gradient, sigma)

    config = VGGFlowConfig(
        **settings(
            tmp_path, num_inference_steps=8, reward_scale=0.3, max_steps=40, learning_rate=1e-2, value_network="none"
        )
    )
    prompts = Dataset.from_dict({"prompt": [str(n) for n in range(64)]})
    t = Turned(GaussianFlow(SmoothControl(2, STD, 0.0), 2), closeness(1.0), config, prompts, eval_dataset=prompts)
    t.train()
    metrics = t.evaluate()
    assert sign * (metrics["eval_reward/reward"] - metrics["eval_base_reward/reward"]) > 0.05


# ---- guidance -------------------------------------------------------------------------------------------------------


def test_with_guidance_the_target_is_guided_and_weights_learn_through_the_conditional_branch(tmp_path, tiny_pipeline):
    t = vgg_flow(tmp_path, tiny_pipeline, guidance_scale=4.0, value_network="none")
    examples, (batch,) = first_rollout(t)
    conditioning = t.condition(examples)
    x, sigma = batch.record.states[:, 0], batch.record.sigmas[:, 0]
    with torch.no_grad(), t.model.reference():
        both = [t.model(x, sigma, conditioning, guidance=guided) for guided in (True, False)]
    assert torch.equal(batch.record.base_velocities[:, 0], both[0])
    assert not torch.allclose(both[0], both[1], atol=1e-3)

    def gradient(velocity: torch.Tensor) -> list[torch.Tensor]:
        return torch.autograd.grad(velocity.sum(), t.trained_parameters(), allow_unused=True)

    t.model.eval()
    guided = gradient(t.model(x, sigma, conditioning, guidance=True))
    conditional = gradient(t.model(x, sigma, conditioning, guidance=False))
    for a, b in zip(guided, conditional, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, 4 * b, rtol=1e-3, atol=1e-5)


def test_with_guidance_gradients_to_the_latents_pass_both_branches(tmp_path, tiny_pipeline):
    t = vgg_flow(tmp_path, tiny_pipeline, guidance_scale=4.0, value_network="none")
    examples = first_examples(t)
    x, sigma = t.initial_latents([e.key for e in examples], "x").requires_grad_(), torch.tensor([0.7, 0.7])
    conditioning = t.condition(examples)
    (guided,) = torch.autograd.grad(t.model(x, sigma, conditioning, guidance=True).sum(), x)
    (conditional,) = torch.autograd.grad(t.model(x, sigma, conditioning, guidance=False).sum(), x)
    assert not torch.allclose(guided, 4 * conditional, atol=1e-4)


# ---- the value network ----------------------------------------------------------------------------------------------


class Exact(nn.Module):
    """The residual that makes (1) the exact value gradient of the linear-quadratic problem; `wrong` is added to its
    slope.
    """

    def __init__(self, gains: dict[float, tuple[float, float]], wrong: float = 0.0) -> None:
        super().__init__()
        self.gains, self.wrong = gains, nn.Parameter(torch.tensor(wrong))

    def forward(self, latents, sigma, prompt_features, prompt_mask):
        slope, offset = (
            torch.tensor([[self.gains[round(s, 4)][i]] for s in sigma.double().tolist()], dtype=latents.dtype)
            for i in (0, 1)
        )
        a, b = base_coefficients(sigma[:, None], STD, 0.0)
        estimate = latents - sigma[:, None] * (a * latents + b)  # the policy is still the base
        return -slope * latents - offset + BETA * (1 - sigma[:, None]) ** 2 * (1.0 - estimate) + self.wrong * latents


def test_consistency_vanishes_on_the_exact_value_gradient_and_not_beside_it(tmp_path):
    """With the forward difference's error, of the order of its step; a residual off by 0.3 x is off by much more."""
    levels = sorted({round(s, 4) for k in range(21) for s in (k / 20, max(k / 20 - 1e-3, 0.0))}, reverse=True)
    gains = dict(zip(levels, continuous_gains(np.array(levels), STD, 0.0, BETA, 1.0), strict=False))
    gains[0.0] = (-BETA, BETA)
    losses = []
    for wrong in (0.0, 0.3):
        config = VGGFlowConfig(**settings(
            tmp_path, num_inference_steps=20, reward_scale=BETA, finite_difference_step=1e-3,
            boundary_coefficient=1e-9, timestep_bins=19, max_steps=1,
        ))  # fmt: skip
        t = VGGFlowTrainer(
            GaussianFlow(SmoothControl(2, STD, 0.0), 2), closeness(1.0), config,
            Dataset.from_dict({"prompt": [str(n) for n in range(64)]}), value_network=Exact(gains, wrong),
        )  # fmt: skip
        examples, (batch,) = first_rollout(t)
        with torch.no_grad():
            for state in range(19):
                t.micro_batch_losses(t.model, batch, t.condition(examples), state)
        losses.append(sum(t.metrics.noted["loss/consistency"]) / 19)
    assert losses[0] < 1e-3 < 0.03 < losses[1]


def test_transformer_and_value_network_learn_from_their_own_losses(tmp_path, tiny_pipeline):
    """Moving the matching loss alone leaves the value network's gradient as it was and changes the transformer's."""
    t = vgg_flow(tmp_path, tiny_pipeline)
    examples, (batch,) = first_rollout(t)
    heads = list(t.model.head.parameters())
    gradients = []
    for offset in (0.0, 1.0):
        batch.record.base_velocities.add_(offset)  # moves the matching loss alone
        t.model.zero_grad()
        t.micro_batch_losses(t.model, batch, t.condition(examples), 1).sum().backward()
        gradients.append(
            (
                [p.grad.clone() for p in heads if p.grad is not None],
                [p.grad.clone() for p in t.trained_parameters() if p.grad is not None],
            )
        )
    for a, b in zip(gradients[0][0], gradients[1][0], strict=True):
        torch.testing.assert_close(a, b)
    assert any(not torch.allclose(a, b) for a, b in zip(gradients[0][1], gradients[1][1], strict=True))


def test_the_value_network_is_saved_and_has_its_own_learning_rate_and_clip(tmp_path, tiny_pipeline):
    t = vgg_flow(
        tmp_path, tiny_pipeline, value_network_learning_rate=3e-3, max_grad_norm=1e-3, optim="sgd", learning_rate=1.0
    )
    t.train()
    heads = {id(p) for p in t.model.head.parameters()}
    for group in t.optimizer.param_groups:
        assert {group["lr"]} == {3e-3 if id(p) in heads else 1.0 for p in group["params"]} or not group["params"]
    row = update_rows(t)[0]
    assert row["value_network_grad_norm"] > 1e-3
    assert {"loss/matching", "loss/consistency", "loss/boundary", "residual_rms"} <= set(row)
    t.save_model()
    saved = ValueUNet.from_pretrained(tmp_path / "value_network")
    assert all(torch.equal(p, q) for p, q in zip(saved.parameters(), t.model.head.parameters(), strict=True))
    stored = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all("lora" in name for name in stored)


def test_transformer_and_value_network_are_clipped_apart(tmp_path, tiny_pipeline):
    t = vgg_flow(tmp_path, tiny_pipeline, max_grad_norm=1.0)
    t.create_optimizer()
    for p in t.trained_parameters():
        p.grad = torch.full_like(p, 10.0)
    t._clip_grad_norm(t.model)
    heads = torch.cat([p.grad.flatten() for p in t.model.head.parameters()])
    others = torch.cat(
        [
            p.grad.flatten()
            for n, p in t.model.named_parameters()
            if p.requires_grad and not n.startswith("value_network.")
        ]
    )
    assert float(heads.double().norm()) == pytest.approx(1.0, rel=1e-3)
    assert float(others.double().norm()) == pytest.approx(1.0, rel=1e-3)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 1)

    def forward(self, latents, sigma, prompt_features, prompt_mask):
        return self.layer(latents)


def test_a_value_network_of_ones_own(tmp_path, tiny_pipeline):
    network = Own()
    before = network.layer.weight.detach().clone()
    t = vgg_flow(tmp_path, tiny_pipeline, network=network)
    t.train()
    assert not torch.equal(network.layer.weight, before)
    t.save_model()
    assert torch.equal(
        load_file(tmp_path / "value_network" / "model.safetensors")["layer.weight"], network.layer.weight
    )


@pytest.mark.parametrize(("shape", "levels"), [((4, 4, 4), 1), ((8, 8, 8), 2), ((16, 12, 20), 2), ((16, 128, 128), 4)])
def test_the_network_follows_the_latent_and_starts_from_almost_zero(shape, levels, default_value_network):
    network = value_network(torch.Size(shape), 12)
    assert len(network.unet.down_blocks) == levels
    if shape[1] <= 20:
        x, features = torch.randn(2, *shape), torch.randn(2, 3, 12)
        mask = torch.tensor([[True, True, False], [True, True, True]])
        out = network(x, torch.tensor([0.3, 0.9]), features, mask)
        assert out.shape == x.shape
        assert float(out.detach().square().mean().sqrt()) < 0.01
        changed = features.clone()
        changed[0, 2] += 100  # behind the mask
        torch.testing.assert_close(network(x, torch.tensor([0.3, 0.9]), changed, mask), out)


def test_vectors_get_an_mlp():
    network = value_network(torch.Size((3,)), 5)
    assert isinstance(network, ValueMLP)
    out = network(torch.randn(4, 3), torch.rand(4), torch.randn(4, 2, 5), torch.ones(4, 2, dtype=torch.bool))
    assert out.shape == (4, 3)


def test_a_run_leaves_what_it_says(tmp_path, tiny_pipeline):
    before = {n: p.detach().clone() for n, p in tiny_pipeline.transformer.named_parameters()}
    t = vgg_flow(tmp_path, tiny_pipeline)
    t.train()
    for name, parameter in t.flow.transformer.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")])
    t.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "2512.05116" in card
    assert "ValueUNet" in card
    assert json.loads((tmp_path / "value_network" / "config.json").read_text())["_class_name"] == "ValueUNet"


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"timestep_bins": 6}, r"`timestep_bins` \(6\) must be between 1 and `num_inference_steps` - 1 \(5\)"),
    ({"eta_schedule": "cubic"}, "`eta_schedule` is 'cubic': choose 'quadratic', 'linear' or 'constant'"),
    ({"value_network": "lora"}, "`value_network` is 'lora': choose 'unet' or 'none'"),
    ({"ddp_find_unused_parameters": True}, "`ddp_find_unused_parameters` must be False"),
    ({"ddp_find_unused_parameters": None}, "`ddp_find_unused_parameters` must be False"),
    ({"boundary_coefficient": 0.0}, r"`boundary_coefficient` \(0.0\) must be above 0"),
    ({"finite_difference_step": -1.0}, r"`finite_difference_step` \(-1.0\) must be above 0"),
    ({"reward_gradient_clip_quantile": 0.0}, r"`reward_gradient_clip_quantile` \(0.0\) must be above 0 and at most 1"),
    ({"reward_scale": 0.0}, r"`reward_scale` \(0.0\) must be above 0"),
])  # fmt: skip
def test_a_wrong_configuration_is_refused(tmp_path, tiny_pipeline, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        vgg_flow(tmp_path, tiny_pipeline, **changes)


def test_a_black_box_reward_is_refused(tmp_path, tiny_pipeline):
    with pytest.raises(ValueError, match="Reward 'checker' is not differentiable, which VGGFlowTrainer needs"):
        vgg_flow(tmp_path, tiny_pipeline, reward="checker")
