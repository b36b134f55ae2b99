"""The adjoint matching trainer: what it computes, that it learns, what it refuses."""

import pytest
import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer

from flowrl_trainers import AdjointMatchingTrainer, FlowPipeline
from flowrl_trainers.flow import control_cost, shift_sigmas, uniform_sigmas
from flowrl_trainers.rewards import differentiable
from flowrl_trainers.shapes import load_pipeline, prompts

from .helpers import (
    CAPTIONS,
    adjoint_matching,
    adjoint_matching_config,
    constant,
    first_examples,
    first_rollout,
    redness,
    targets,
    update_rows,
)
from .tiny import tiny_sd3
from .tolerances import assert_same_pictures

# ---- what is computed -----------------------------------------------------------------------------------------------


def test_targets_are_base_velocities_minus_the_adjoint_of_the_next_state(tmp_path, tiny_pipeline):
    """Against autograd through the whole sampler: the adapter starts at zero, so base and current model are one."""
    t = adjoint_matching(tmp_path, tiny_pipeline)
    examples, (batch,) = first_rollout(t)
    conditioning, flow = t.condition(examples), t.flow
    states = [t.initial_latents([e.key for e in examples], "initial latents").requires_grad_()]
    velocities = []
    for k in range(4):
        level = t.sigmas[k].expand(2)
        velocities.append(flow.velocity(flow.transformer, states[k], level, conditioning, guidance=True))
        states.append(states[k] + (t.sigmas[k + 1] - t.sigmas[k]) * velocities[k])
    total = redness(images=flow.decode(states[-1]), prompts=None).sum()
    adjoints = torch.autograd.grad(total, states[2:])  # at x_2, x_3, x_4: of the controls at x_1, x_2, x_3
    for k, adjoint in enumerate(adjoints):
        torch.testing.assert_close(batch.record.states[:, k], states[k + 1], atol=1e-5, rtol=1e-4)
        expected = velocities[k + 1] - 50.0 * adjoint
        torch.testing.assert_close(targets(batch)[:, k], expected, atol=1e-5, rtol=1e-4)


def test_loss_is_the_mean_square_control_while_the_adapter_is_zero(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline, reward_scale=0.5)
    examples, (batch,) = first_rollout(t)
    t.model.eval()
    for state in range(3):
        losses = t.micro_batch_losses(t.model, batch, t.condition(examples), state)
        velocity = t.model(
            batch.record.states[:, state], t.window_sigmas[state].expand(2), t.condition(examples), guidance=False
        )
        torch.testing.assert_close(losses, (velocity - targets(batch)[:, state]).square().mean(dim=(1, 2, 3)))


def test_a_reward_without_any_gradient_is_refused_on_the_first_rollout(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline, reward=differentiable(constant), reward_scale=None)
    with pytest.raises(ValueError, match="gradient is zero on the whole first rollout"):
        first_rollout(t)


def test_reward_scale_is_found_on_the_first_rollout(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline, reward_scale=None, control_to_velocity_ratio=0.25, max_steps=1)
    examples, (batch,) = first_rollout(t)
    with torch.no_grad(), t.model.reference():
        velocities = torch.stack(
            [
                t.model(batch.record.states[:, k], t.window_sigmas[k].expand(2), t.condition(examples), guidance=False)
                for k in range(3)
            ],
            dim=1,
        )
    control = velocities - targets(batch)
    assert float(control.square().mean().sqrt() / velocities.square().mean().sqrt()) == pytest.approx(0.25, rel=1e-4)


def test_reward_gradients_are_clipped_at_the_quantile_of_their_rollout(tmp_path, tiny_pipeline):
    t = adjoint_matching(
        tmp_path,
        tiny_pipeline,
        per_device_train_batch_size=4,
        adjoint_steps=2,
        reward_scale=1.0,
        reward_gradient_clip_quantile=0.5,
    )
    _, (batch,) = first_rollout(t)
    unclipped = adjoint_matching(
        tmp_path, tiny_sd3(), per_device_train_batch_size=4, adjoint_steps=2, reward_scale=1.0
    )
    _, (reference,) = first_rollout(unclipped)
    norms = []
    for b, owner in ((batch, t), (reference, unclipped)):
        with torch.no_grad(), owner.model.reference():
            velocity = owner.model(
                b.record.states[:, 0], owner.window_sigmas[0].expand(4), owner.condition(b.examples), guidance=False
            )
        norms.append((velocity - targets(b)[:, 0]).flatten(1).norm(dim=1))
    median = norms[1].quantile(0.5)
    torch.testing.assert_close(norms[0], norms[1].clamp(max=median), rtol=1e-3, atol=0)


def test_adjoints_are_clipped_at_the_quantile_of_every_step(tmp_path):
    settings = {"per_device_train_batch_size": 4, "adjoint_steps": 3, "reward_scale": 1.0}
    plain, clipped = (
        first_rollout(adjoint_matching(tmp_path, tiny_sd3(), adjoint_clip_quantile=quantile, **settings))[1][
            0
        ].record.adjoints
        for quantile in (None, 0.5)
    )
    norms = plain.flatten(2).norm(dim=2)
    bound = norms.quantile(0.5, dim=0)
    torch.testing.assert_close(clipped, plain * (bound / norms).clamp(max=1)[..., None, None, None])
    assert (norms > bound).sum() == 6


def test_the_adapter_is_on_again_and_trainable_after_a_rollout(tmp_path, tiny_pipeline):
    """A leak of the reference mode would give silently zero control."""
    t = adjoint_matching(tmp_path, tiny_pipeline)
    first_rollout(t)
    layers = [m for m in t.flow.transformer.modules() if isinstance(m, BaseTunerLayer)]
    assert layers
    assert not any(layer.disable_adapters for layer in layers)
    assert all(p.requires_grad for n, p in t.model.named_parameters() if "lora_" in n)


def test_rollouts_are_guided_and_targets_are_not(tmp_path, tiny_pipeline):
    """Guidance changes the states, but the regression is on the conditional branch, which keeps the adjoint from
    blowing up.
    """
    guided = adjoint_matching(tmp_path, tiny_pipeline, guidance_scale=6.0, adjoint_steps=2, reward_scale=1e-9)
    examples, (batch,) = first_rollout(guided)
    conditional = guided.flow.velocity(
        guided.flow.transformer,
        batch.record.states[:, 0],
        guided.window_sigmas[0].expand(2),
        guided.condition(examples),
        guidance=False,
    )
    torch.testing.assert_close(targets(batch)[:, 0], conditional.detach(), atol=1e-6, rtol=0)
    plain = adjoint_matching(tmp_path, tiny_sd3(), guidance_scale=1.0, adjoint_steps=2, reward_scale=1e-9)
    _, (other,) = first_rollout(plain)
    assert not torch.allclose(batch.record.states[:, 0], other.record.states[:, 0], atol=1e-3)


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_changes_the_adapter_alone_and_leaves_what_stock_diffusers_loads(tmp_path, tiny_pipeline):
    before = {n: p.detach().clone() for n, p in tiny_pipeline.transformer.named_parameters()}
    t = adjoint_matching(tmp_path, tiny_pipeline)
    t.train()
    for name, parameter in t.flow.transformer.named_parameters():
        if (
            "lora_B" in name
        ):  # the last block throws the output of its text stream away, and with it that of the text's queries
            assert (parameter.abs().max() > 0) != name.startswith("transformer_blocks.1.attn.add_q_proj")
        elif "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")])
    t.save_model()
    fresh = tiny_sd3()
    fresh.load_lora_weights(str(tmp_path))
    flow = FlowPipeline.from_pipeline(fresh, guidance_scale=1.0, max_sequence_length=8)
    pictures = [f.sample(CAPTIONS, 4, torch.Generator().manual_seed(0)) for f in (flow, t.flow)]
    assert_same_pictures(pictures[0], pictures[1], flow, 4)


@pytest.mark.slow
def test_the_reward_rises_on_shapes(tmp_path, shapes_pipeline):
    """Thirty updates towards red: on held-out prompts with the same seeds, the mean gain exceeds five of its standard
    errors.
    """
    held_out = prompts("held_out").select(range(48))
    t = adjoint_matching(
        tmp_path, shapes_pipeline, dataset=prompts("train"), eval_dataset=held_out, eval_reward_funcs="checker",
        max_steps=30, per_device_train_batch_size=8, learning_rate=1e-3, reward_scale=None,
        control_to_velocity_ratio=1.0, num_inference_steps=8, adjoint_steps=3,
    )  # fmt: skip
    t.train()
    metrics = t.evaluate()
    losses = [row["loss"] for row in update_rows(t)]
    assert len(losses) == 30
    base, tuned = (torch.tensor(p.scores["redness"]) for p in t.pictures(held_out, 48))
    gains = tuned - base
    assert gains.mean() > 5 * gains.std() / len(gains) ** 0.5
    assert {
        "eval_reward/checker",
        "eval_base_reward/checker",
        "eval_checker_accuracy",
        "eval_base_checker_accuracy",
    } <= set(metrics)
    assert "eval_diversity" not in metrics  # one picture of each prompt


def test_evaluation_is_repeatable_and_does_not_depend_on_its_batch_size(tmp_path, shapes_pipeline):
    held_out = prompts("held_out").select(range(6))
    rows = [
        adjoint_matching(
            tmp_path, pipeline, dataset=prompts("train"), eval_dataset=held_out, per_device_eval_batch_size=size
        ).evaluate()
        for pipeline, size in ((shapes_pipeline, 6), (load_pipeline(), 4))
    ]
    assert rows[0]["eval_reward/redness"] == pytest.approx(rows[1]["eval_reward/redness"], abs=1e-5)
    assert (
        rows[0]["eval_reward/redness"] == rows[0]["eval_base_reward/redness"]
    )  # an untrained adapter changes nothing


def test_accumulation_does_not_change_the_update(tmp_path):
    """Four images at once against four times one image; equal but for the order of sums in float32."""
    adapters = []
    for size, accumulation in ((4, 1), (1, 4)):
        pipeline = tiny_sd3()
        t = adjoint_matching(
            tmp_path, pipeline, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            num_generations=2, optim="sgd", learning_rate=1.0,
        )  # fmt: skip
        t.train()
        adapters.append({n: p.detach().clone() for n, p in t.model.named_parameters() if "lora_" in n})
    for name, value in adapters[0].items():
        torch.testing.assert_close(value, adapters[1][name], atol=1e-5, rtol=1e-4)


def test_a_model_of_ones_own_trains_all_its_weights(tmp_path):
    """Linear velocity on vectors: v = (a + theta) x. The reward is the negative square, so theta must rise to shrink
    x.
    """
    flow = Vectors()
    start = flow.transformer.rate.item()
    t = AdjointMatchingTrainer(
        flow, shrink, adjoint_matching_config(
            tmp_path, guidance_scale=None, max_sequence_length=None, learning_rate=0.02, max_steps=20,
            reward_scale=1.0,
        ),
        Dataset.from_dict({"prompt": ["x", "y"]}), eval_dataset=Dataset.from_dict({"prompt": ["x"] * 8}),
    )  # fmt: skip
    t.train()
    metrics = t.evaluate()
    assert flow.transformer.rate.item() > start + 0.1
    assert metrics["eval_reward/shrink"] > metrics["eval_base_reward/shrink"]
    t.save_model()
    assert (tmp_path / "transformer" / "model.safetensors").exists()


class Rate(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rate * x


class Vectors(FlowPipeline):
    def __init__(self) -> None:
        self.network = Rate()

    @property
    def transformer(self):
        return self.network

    def encode_prompts(self, prompts):
        return {"none": torch.zeros(len(prompts), 1)}

    def initial_latents(self, batch_size, generator=None):
        return torch.cat([torch.randn(1, 3, generator=g) for g in generator])

    def velocity(self, transformer, latents, sigma, conditioning, *, guidance):
        return transformer(latents)

    def decode(self, latents):
        return latents

    def images(self, latents):
        return latents


@differentiable
def shrink(images, prompts, **columns):
    return -images.square().sum(dim=1)


# ---- one clear sentence each ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"adjoint_steps": 5}, r"`adjoint_steps` \(5\) must be between 1 and `num_inference_steps` \(4\)"),
    ({"num_generations": 3}, r"images per update \(2 = .*\) must be a multiple of `num_generations` \(3\), the images per prompt: make it 3"),
    ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, r"`steps_per_generation` \(3\) must be a multiple of"),
    ({"reward_scale": -1.0}, r"`reward_scale` \(-1.0\) must be above 0"),
    ({"control_cost_weight": 0.0}, r"`control_cost_weight` \(0.0\) must be above 0"),
    ({"control_cost_weight": -1.0, "loss_type": "hamiltonian"}, r"`control_cost_weight` \(-1.0\) must be at least 0"),
    ({"control_cost_weight": 0.0, "loss_type": "hamiltonian", "reward_scale": None}, "`reward_scale` must be given"),
    ({"adjoint": "exact"}, "`adjoint` is 'exact': choose 'lean', 'full' or 'current'"),
    ({"control_cost_order": 3}, r"`control_cost_order` is '3': choose '2', '4' or '2\+4'"),
    ({"ema_decay": 1.0}, r"`ema_decay` \(1.0\) must be above 0 and below 1"),
    ({"max_bad_sample_share": 2.0}, r"`max_bad_sample_share` \(2.0\) must be between 0 and 1"),
    ({"log_images": -1}, r"`log_images` \(-1\) must be at least 0"),
    ({"control_to_velocity_ratio": 0.0}, r"`control_to_velocity_ratio` \(0.0\) must be above 0"),
    ({"adjoint_clip_quantile": 0.0}, r"`adjoint_clip_quantile` \(0.0\) must be above 0 and at most 1"),
    ({"reward_gradient_clip_quantile": 1.5}, r"`reward_gradient_clip_quantile` \(1.5\) must be above 0 and at most 1"),
    ({"num_inference_steps": 0}, r"`num_inference_steps` \(0\) must be at least 1"),
    ({"remove_unused_columns": True}, r"`remove_unused_columns` \(True\) must be False"),
    ({"auto_find_batch_size": True}, r"`auto_find_batch_size` \(True\) must be False"),
])  # fmt: skip
def test_a_wrong_configuration_is_refused(tmp_path, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        adjoint_matching_config(tmp_path, **settings)


def test_a_window_that_opens_where_nothing_is_left_to_learn_is_refused(tmp_path, tiny_pipeline):
    with pytest.raises(ValueError, match=r"`adjoint_steps` \(1\) opens its window at sigma 0.009, below 0.05"):
        adjoint_matching(tmp_path, tiny_pipeline, adjoint_steps=1)


def test_a_lora_for_a_network_without_adapters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Rate has no `add_adapter`"):
        adjoint_matching(tmp_path, Vectors(), shrink, guidance_scale=None, max_sequence_length=None)


def test_evaluation_without_prompts_is_refused(tmp_path, tiny_pipeline):
    with pytest.raises(ValueError, match="`evaluate` needs prompts: pass `eval_dataset`"):
        adjoint_matching(tmp_path, tiny_pipeline).evaluate()


# ---- the variants ---------------------------------------------------------------------------------------------------


class Field(torch.nn.Module):
    """A nonlinear velocity of 3-vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = torch.nn.Linear(4, 16), torch.nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(torch.cat([x, sigma[:, None]], dim=1))))


class NonlinearVectors(Vectors):
    def __init__(self, shift: float = 1.0) -> None:
        self.network, self.shift = Field(), shift

    def sigmas(self, num_inference_steps, spacing="pipeline"):
        return shift_sigmas(uniform_sigmas(num_inference_steps), self.shift)

    def velocity(self, transformer, latents, sigma, conditioning, *, guidance):
        return transformer(latents, sigma)


@differentiable
def bumps(images, prompts, **columns):
    return torch.sin(2 * images).sum(dim=1)


def moved(folder, shift: float = 1.0, **settings) -> AdjointMatchingTrainer:
    """A trainer whose model has left its base, so that there is a control."""
    settings = {"adjoint_steps": 4, "per_device_train_batch_size": 4, "reward_scale": 0.7} | settings
    t = AdjointMatchingTrainer(
        NonlinearVectors(shift), bumps,
        adjoint_matching_config(folder, guidance_scale=None, max_sequence_length=None, **settings),
        Dataset.from_dict({"prompt": ["a", "b", "c", "d"]}),
    )  # fmt: skip
    with torch.no_grad():
        for number, parameter in enumerate(t.model.parameters()):
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return t


def loss_gradient(t: AdjointMatchingTrainer) -> list[torch.Tensor]:
    examples, (batch,) = first_rollout(t)
    states = t.num_trained_states
    losses = [t.micro_batch_losses(t.model, batch, t.condition(examples), state).mean() for state in range(states)]
    return list(torch.autograd.grad(sum(losses) / states, list(t.model.parameters())))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("order", ["2", "4", "2+4"])
def test_full_adjoint_with_hamiltonian_loss_is_the_gradient_of_the_regularised_objective(tmp_path, order, shift):
    """Against autograd through the sampler of mean [ sum_k h_k d cost(u_k) - lambda r(x_N) ], on a uniform and a
    shifted grid.

    The loss is a mean over K states, weighted by h_k K / sum h, and d = 3 dimensions, and twice the Hamiltonian; the
    h_k sum to 1.
    """
    t = moved(
        tmp_path, shift, adjoint="full", loss_type="hamiltonian", control_cost_order=order, control_cost_weight=0.6
    )
    keys = [e.key for e in first_examples(t)]
    x, objective = t.initial_latents(keys, "initial latents"), 0.0
    for sigma, sigma_next in zip(t.sigmas[:-1], t.sigmas[1:], strict=True):
        v = t.model(x, sigma.expand(4), {}, guidance=False)
        with t.model.reference():
            base = t.model(x, sigma.expand(4), {}, guidance=False)
        objective = objective + (sigma - sigma_next) * 3 * control_cost(base - v, order, 0.6)
        x = x + (sigma_next - sigma) * v
    objective = (objective - 0.7 * bumps(images=x, prompts=None)).mean()
    expected = torch.autograd.grad(objective, list(t.model.transformer.parameters()))
    for mine, theirs in zip(loss_gradient(t), expected, strict=True):
        torch.testing.assert_close(3 / 2 * mine, theirs, rtol=1e-3, atol=1e-6)


def test_without_a_cost_it_is_direct_backpropagation_through_the_last_steps(tmp_path):
    """DRaFT-K: autograd of -lambda r(x_N) through the last two of four steps; their h_k sum to sigma_2, d = 3."""
    t = moved(tmp_path, 3.0, adjoint="full", loss_type="hamiltonian", control_cost_weight=0.0, adjoint_steps=2)
    keys = [e.key for e in first_examples(t)]
    x = t.initial_latents(keys, "initial latents")
    for step, (sigma, sigma_next) in enumerate(zip(t.sigmas[:-1], t.sigmas[1:], strict=True)):
        with torch.set_grad_enabled(step >= 2):
            x = x + (sigma_next - sigma) * t.model(x, sigma.expand(4), {}, guidance=False)
    expected = torch.autograd.grad(-0.7 * bumps(images=x, prompts=None).mean(), list(t.model.transformer.parameters()))
    for mine, theirs in zip(loss_gradient(t), expected, strict=True):
        torch.testing.assert_close(float(t.sigmas[2]) * 3 / 2 * mine, theirs, rtol=1e-3, atol=1e-6)


def test_at_order_2_and_equal_steps_both_losses_have_the_same_gradient(tmp_path):
    gradients = [loss_gradient(moved(tmp_path, loss_type=loss)) for loss in ("regression", "hamiltonian")]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_three_adjoints_agree_without_control_and_differ_with_it(tmp_path):
    def adjoints(make) -> list[torch.Tensor]:
        found = []
        for kind in ("lean", "full", "current"):
            t = make(kind)
            _, (batch,) = first_rollout(t)
            found.append(batch.record.adjoints)
        return found

    lean, full, current = adjoints(lambda kind: moved(tmp_path, adjoint=kind))
    assert (lean - full).abs().max() > 1e-3
    assert (lean - current).abs().max() > 1e-3
    lean, full, current = adjoints(lambda kind: adjoint_matching(tmp_path, tiny_sd3(), adjoint=kind))
    torch.testing.assert_close(full, lean)
    torch.testing.assert_close(current, lean)


@pytest.mark.parametrize("order", ["4", "2+4"])
def test_the_wanted_control_ratio_is_reached_for_every_cost(tmp_path, tiny_pipeline, order):
    t = adjoint_matching(
        tmp_path,
        tiny_pipeline,
        reward_scale=None,
        control_to_velocity_ratio=0.2,
        control_cost_order=order,
        control_cost_weight=0.5,
    )
    _, (batch,) = first_rollout(t)
    control = t._target_control(batch.record.adjoints, batch.record.gains, 2)
    ratio = float(control.square().mean().sqrt() / batch.record.base_velocities.square().mean().sqrt())
    assert ratio == pytest.approx(0.2, rel=1e-4)


def test_the_adjoint_in_bfloat16_is_close_to_the_one_in_float32(tmp_path):
    """Relative L2 error below 5 %: bfloat16 has 8 bits, and the adjoint passes through two Jacobians."""
    found = []
    for bf16 in (False, True):
        t = adjoint_matching(tmp_path, tiny_sd3(), bf16=bf16)
        t.accelerator.prepare_model(t.model, evaluation_mode=True)  # autocast comes with it
        _, (batch,) = first_rollout(t)
        found.append(batch.record.adjoints[:, 0])
    assert 0 < (found[0] - found[1]).norm() / found[0].norm() < 0.05


@pytest.mark.parametrize("order", ["2", "4", "2+4"])
def test_the_hamiltonian_loss_trains_from_the_base_model(tmp_path, tiny_pipeline, order):
    """Where the control is zero, its cost must have a gradient."""
    t = adjoint_matching(tmp_path, tiny_pipeline, loss_type="hamiltonian", control_cost_order=order, max_steps=2)
    t.train()
    assert [row["skipped_updates"] for row in update_rows(t)] == [0, 0]
    assert any(p.abs().max() > 0 for n, p in t.model.named_parameters() if "lora_B" in n)
