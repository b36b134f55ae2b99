"""The TAFS-GRPO trainer: its sampler, its probabilities and its credit against closed forms and independent
computations.
"""

import logging
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig

from flowrl_trainers import TAFSGRPOConfig, TAFSGRPOTrainer
from flowrl_trainers.flow import compare_within_groups, step_advantages
from flowrl_trainers.metrics import colour_entropy, edge_density
from flowrl_trainers.sampling.buffer import MicroBatch
from flowrl_trainers.sampling.prompt_groups import Example, ImageKey
from flowrl_trainers.trainers.tafs_grpo_trainer import TAFSGRPORecord

from .gaussian import NUMBERED, GaussianFlow, Shifted, height, unit_slope
from .helpers import make_trainer, redness
from .tiny import tiny_sd3


def tafs(folder, dim: int = 1, network=None, reward=height, **changes) -> TAFSGRPOTrainer:
    defaults = dict(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=64, num_generations=16, beta=0.0,
        epsilon=1e-4, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1,
        max_grad_norm=0.0, learning_rate=1e-2,
    )  # fmt: skip
    config = TAFSGRPOConfig(**(defaults | changes))
    t = TAFSGRPOTrainer(GaussianFlow(network or Shifted(), dim), reward, config, NUMBERED)
    t.conditioning.encode(NUMBERED["prompt"], torch.device("cpu"), show_progress=False)
    return t


def rolled_out(t: TAFSGRPOTrainer, rollout: int = 0) -> MicroBatch:
    """A prepared micro-batch of one rollout: groups of the config's size."""
    size, group = t.args.per_device_train_batch_size, t.args.num_generations
    (batch,) = t.make_rollout(
        [Example(ImageKey(i // group, i % group, rollout), str(i // group), {}) for i in range(size)]
    )
    t.buffer.step = 1
    return batch


# ---- credit ---------------------------------------------------------------------------------------------------------


def test_advantages_compare_within_the_prompt_and_column_by_column():
    rewards = torch.tensor([[0.0, 10.0], [2.0, 14.0], [5.0, 20.0], [5.0, 20.0], [math.nan, 12.0]])
    groups = torch.tensor([3, 3, 1, 1, 3])
    centred = torch.tensor([[-1.0, -2.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(compare_within_groups(rewards, groups, "none"), centred)
    columns = [torch.tensor([0.0, 2.0, 5.0, 5.0]), torch.tensor([10.0, 14.0, 20.0, 20.0, 12.0])]
    spread = torch.stack([c.std(correction=0) for c in columns])
    torch.testing.assert_close(compare_within_groups(rewards, groups, "batch"), centred / (spread + 1e-4))
    own = torch.tensor([1.0, math.sqrt(8 / 3)])
    torch.testing.assert_close(
        compare_within_groups(rewards, groups, "group"), centred / (own + 1e-4), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("rule", "expected"), [
    ("final", [7.0, 7.0, 7.0]), ("level", [2.0, 4.0, 7.0]), ("gain", [1.0, 2.0, 3.0]), ("return", [2 + 2 + 1.75, 4 + 3.5, 7.0]),
    ("mixed", [0.25 * 7 + 0.75 * 2, 0.25 * 7 + 0.75 * 4, 7.0]),
])  # fmt: skip
def test_every_rule_credits_a_draw_with_what_came_after_it(rule, expected):
    rewards = torch.tensor([[1.0, 2.0, 4.0, 7.0], [-1.0, -2.0, -4.0, -7.0]])
    found = step_advantages(rewards, torch.zeros(2), rule, "none", mix=0.25, discount=0.5)
    torch.testing.assert_close(found, torch.tensor([expected, [-e for e in expected]]))


@pytest.mark.parametrize(("rule", "expected"), [("mixed", [3.25, 4.75, 6.0]), ("return", [5.75, 6.0, 6.0])])
def test_the_trainer_credits_with_its_settings_and_clips(tmp_path, rule, expected):
    """The rewards of the test above, through a trainer; what is above 6 is clipped."""
    t = tafs(tmp_path, credit_rule=rule, credit_mix=0.25, credit_discount=0.5, scale_rewards="none", advantage_clip=6)
    scores = torch.tensor([[1.0, 2.0, 4.0, 7.0], [-1.0, -2.0, -4.0, -7.0]])
    found = t._advantages(scores[:, :, None], torch.zeros(2))
    torch.testing.assert_close(found, torch.tensor([expected, [-e for e in expected]]))


# ---- the sampler ----------------------------------------------------------------------------------------------------


def test_the_sampler_is_that_of_the_stochastic_scheduler_of_diffusers(tmp_path, monkeypatch):
    t = tafs(tmp_path, dim=4, num_inference_steps=4)
    latents = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    ours = t._trained_sampler(t.model, latents, {}, [torch.Generator().manual_seed(n) for n in range(3)])
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    generators = [torch.Generator().manual_seed(n) for n in range(3)]
    draw = lambda *args, **kwargs: torch.stack([torch.randn(4, generator=g) for g in generators])  # noqa: E731
    monkeypatch.setattr("diffusers.schedulers.scheduling_flow_match_euler_discrete.randn_tensor", draw)
    x = latents
    for timestep in scheduler.timesteps:
        x = scheduler.step(t.model.transformer(x, (timestep / 1000).expand(3)), timestep, x).prev_sample
    torch.testing.assert_close(ours, x.detach(), atol=1e-5, rtol=1e-5)


def test_images_of_a_prompt_start_together_and_their_first_velocity_is_computed_once(tmp_path):
    network = Shifted()
    t = tafs(tmp_path, dim=3, network=network, reward=lambda images, prompts, **columns: images.mean(dim=1))
    network.sizes.clear()
    batch = rolled_out(t)
    assert network.sizes == [4, 64, 64, 64]
    states = batch.record.states.unflatten(0, (4, 16))
    assert (states[:, :, 0] == states[:, :1, 0]).all()
    assert states[:, :, 1].std(dim=1).min() > 0.1
    torch.testing.assert_close(
        states[:, :, 0].flatten(0, 1),
        t.initial_latents([ImageKey(i // 16, 0, 0) for i in range(64)], "initial latents"),
    )
    apart = tafs(
        tmp_path,
        dim=3,
        network=network,
        reward=lambda images, prompts, **columns: images.mean(dim=1),
        share_initial_noise=False,
    )
    network.sizes.clear()
    assert rolled_out(apart).record.states[:, 0].unique(dim=0).shape[0] == 64
    assert network.sizes == [64] * 4


@pytest.mark.parametrize("kernel", ["renoise", "precise", "flow_grpo"])
@pytest.mark.parametrize("form", ["gaussian", "coefficients_preserving"])
def test_stored_probabilities_are_those_of_torch(tmp_path, kernel, form):
    t = tafs(
        tmp_path,
        dim=5,
        kernel=kernel,
        eta=0.8,
        log_prob_form=form,
        reward=lambda images, prompts, **columns: images.mean(dim=1),
    )
    batch = rolled_out(t)
    for k in range(3):
        s, s_next = t.sigmas[k], t.sigmas[k + 1]
        x, x_next = batch.record.states[:, k].double(), batch.record.states[:, k + 1].double()
        v = unit_slope(s.double()) * x
        if kernel == "renoise":
            std = s_next * math.sin(math.pi * 0.4)
            mean = (1 - s_next) * (x - s * v) + s_next * math.cos(math.pi * 0.4) * (x + (1 - s) * v)
        elif kernel == "precise":
            rho = float(s_next / (1 - s_next) * (1 - s) / s) ** 0.32
            std = s_next * math.sqrt(1 - rho**2)
            mean = (1 - s_next) * (x - s * v) + s_next * rho * (x + (1 - s) * v)
        else:
            dt, g = s_next - s, 0.8 * torch.sqrt(s / (1 - (s_next if k == 0 else s)))
            std = g * torch.sqrt(-dt)
            # The drift v + g^2 (x + (1 - s) v) / (2 s) of the reverse SDE, as the paper writes it.
            mean = x + (v + g**2 / (2 * s) * (x + (1 - s) * v)) * dt
        if form == "gaussian":
            expected = torch.distributions.Normal(mean, std).log_prob(x_next).mean(dim=1)
        else:
            expected = -(x_next - mean).square().mean(dim=1)
        torch.testing.assert_close(batch.record.log_probabilities[:, k].double(), expected, atol=2e-6, rtol=2e-6)


# ---- the gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["level", "final", "gain", "return"])
def test_the_policy_gradient_is_the_analytic_one_and_vanishes_one_step_off(tmp_path, rule):
    """Velocity `slope x + theta`, reward x, all noise drawn afresh. With c_k = 1 - s_k slope_k the clean estimate is
    c_k x_k - s_k theta, so a draw of mean m_k = (1 - s_{k+1}) x0_k moves x0_j by prod (1 - s) c on the way, and its
    own mean moves by -(1 - s_{k+1}) s_k a theta. The mean of a group of G contains the image itself, which takes 1 / G
    of the covariance away.
    """
    group, groups, discount = 64, 400, 0.7
    t = tafs(
        tmp_path, per_device_train_batch_size=group, num_generations=group, credit_rule=rule, scale_rewards="none",
        advantage_clip=1e6, log_prob_form="gaussian", epsilon=1e-2, credit_discount=discount,
    )  # fmt: skip
    s = t.sigmas.double()
    c = 1 - s * unit_slope(s)

    def effect(k: int, j: int) -> float:
        """Of the draw k on the clean estimate of step j > k, per unit of theta."""
        carried = (
            c[j] * torch.prod(torch.stack([(1 - s[i + 1]) * c[i] for i in range(k + 1, j)])) if j > k + 1 else c[j]
        )
        return float(-(1 - s[k + 1]) * s[k] * carried)

    credited = {
        "level": lambda k: effect(k, k + 1),
        "gain": lambda k: effect(k, k + 1),
        "final": lambda k: effect(k, 3),
        "return": lambda k: sum(discount ** (j - k - 1) * effect(k, j) for j in range(k + 1, 4)),
    }[rule]
    analytic = -sum(credited(k) for k in range(3)) * (1 - 1 / group)
    found, shifted = [], []
    t.model.eval()
    for number in range(groups):
        examples = [Example(ImageKey(number % 64, i, number), str(number % 64), {}) for i in range(group)]
        conditioning, keys = t.condition(examples), [e.key for e in examples]
        with torch.no_grad():
            drawn = t.rollout(conditioning, keys)
        rewards = drawn.estimates[:, :, 0]
        rows = torch.tensor([e.key.row for e in examples])
        for results, advantages in (
            (found, step_advantages(rewards, rows, rule, "none", discount=discount)),
            (shifted, compare_within_groups(rewards[:, :-1], rows, "none")),  # draw k with the reward of step k
        ):
            record = TAFSGRPORecord(drawn.states, drawn.log_probabilities, advantages, base_velocities=None)
            batch = MicroBatch(examples, record, torch.ones(group, dtype=torch.bool))
            t.buffer.step = 2  # the ratio is 1 here too, but this is no run
            losses = torch.stack([t.micro_batch_losses(t.model, batch, conditioning, k).mean() for k in range(3)])
            results.append(float(torch.autograd.grad(losses.sum(), t.model.transformer.theta)[0]))
    for results, expected in ((found, analytic), (shifted, 0.0)):
        values = torch.tensor(results, dtype=torch.float64)
        error = float(values.std() / math.sqrt(groups))
        print(f"{rule}: {float(values.mean()):.4f} +- {error:.4f}, expected {expected:.4f}")
        assert error <= 0.05 * abs(analytic)
        assert abs(float(values.mean()) - expected) <= 3 * error


def test_flow_grpo_is_a_configuration(tmp_path):
    """Its loss computed from its equations (arXiv 2505.05470), after the weights have moved, so that ratios differ
    from 1 and some are clipped.
    """
    t = tafs(
        tmp_path, dim=6, kernel="flow_grpo", eta=0.7, credit_rule="final", share_initial_noise=False,
        log_prob_form="gaussian", scale_rewards="group", beta=0.04, epsilon=1e-2, num_iterations=2,
        reward=lambda images, prompts, **columns: images.square().sum(dim=1),
    )  # fmt: skip
    batch = rolled_out(t)
    x = batch.record.states
    with torch.no_grad():
        final = x[:, 3] - t.sigmas[3] * unit_slope(t.sigmas[3]) * x[:, 3]
        t.model.transformer.theta.fill_(0.05)
    rewards = final.square().sum(dim=1).unflatten(0, (4, 16))
    advantages = (
        (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, correction=0, keepdim=True) + 1e-4)
    ).flatten()
    t.buffer.step = 2
    clipped = []
    for k in range(3):
        s, dt = t.sigmas[k], t.sigmas[k + 1] - t.sigmas[k]
        g = 0.7 * math.sqrt(s / (1 - (t.sigmas[1] if k == 0 else s)))
        std = g * math.sqrt(-dt)

        def mean(theta: float, x=x[:, k], s=s, dt=dt, g=g):
            v = unit_slope(s) * x + theta
            return x * (1 + g**2 * dt / (2 * s)) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt

        def log_p(m, k=k, std=std):
            return (-((x[:, k + 1] - m) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))).mean(
                dim=1
            )

        ratio = torch.exp(log_p(mean(0.05)) - log_p(mean(0.0)))
        policy = torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, 0.99, 1.01))
        kl = ((mean(0.05) - mean(0.0)) ** 2).mean(dim=1) / (2 * std**2)
        with torch.no_grad():
            found = t.micro_batch_losses(t.model, batch, t.condition(batch.examples), k)
        torch.testing.assert_close(found, policy + 0.04 * kl, atol=1e-6, rtol=1e-5)
        clipped.append(((ratio - 1).abs() > 0.01).float().mean())
    assert max(clipped) > 0
    assert min(clipped) < 1


def test_the_divergence_is_that_of_torch(tmp_path):
    t = tafs(tmp_path, dim=3, beta=1.0, num_iterations=2, reward=lambda images, prompts, **columns: images.mean(dim=1))
    batch = rolled_out(t)
    batch = batch.with_record(replace(batch.record, advantages=torch.zeros(64, 3)))
    with torch.no_grad():
        t.model.transformer.theta.fill_(0.2)
    t.buffer.step = 2
    for k in range(3):
        s, s_next = t.sigmas[k], t.sigmas[k + 1]
        x = batch.record.states[:, k]
        means = [(1 - s_next) * (x - s * (unit_slope(s) * x + theta)) for theta in (0.2, 0.0)]
        expected = torch.distributions.kl_divergence(*(torch.distributions.Normal(m, s_next) for m in means)).mean(
            dim=1
        )
        found = t.micro_batch_losses(t.model, batch, t.condition(batch.examples), k)
        torch.testing.assert_close(found.detach(), expected, atol=1e-6, rtol=1e-5)


# ---- guards ---------------------------------------------------------------------------------------------------------


def test_a_replay_that_differs_from_the_rollout_stops_the_run(tmp_path):
    t = tafs(tmp_path, network=Shifted(extra=1e-3))
    with pytest.raises(
        RuntimeError, match=r"The probability ratio of a rollout that was just made is off by .*, more than 1e-06"
    ):
        t.train()
    assert t.state.global_step == 0


def test_half_precision_gets_more_room_and_a_warning(tmp_path, caplog):
    t = tafs(tmp_path, network=Shifted(extra=1e-4), epsilon=1e-5, max_steps=1)
    t.exact = False
    with caplog.at_level(logging.WARNING):
        t.train()
    assert "half precision clips at random" in caplog.text
    t = tafs(tmp_path, network=Shifted(extra=3e-2), epsilon=1e-5, max_steps=1)
    t.exact = False
    with pytest.raises(RuntimeError, match="more than 1e-03"):
        t.train()


def test_the_ratio_of_a_real_network_is_one_and_logged(tmp_path):
    t = make_trainer("TAFSGRPOTrainer", tmp_path, num_iterations=2, max_steps=4)
    t.train()
    errors = [row["replay_ratio_error"] for row in t.state.log_history if "replay_ratio_error" in row]
    assert len(errors) == 2  # one for each rollout
    assert max(errors) <= 1e-6


def test_bfloat16_counts_as_half_precision(tmp_path):
    t = make_trainer("TAFSGRPOTrainer", tmp_path, bf16=True)
    assert not t.exact
    t.train()
    assert make_trainer("TAFSGRPOTrainer", tmp_path).exact


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"num_inference_steps": 1}, r"`num_inference_steps` \(1\) must be at least 2"),
    ({"num_inference_steps": 64}, r"`num_inference_steps` \(64\) ends with a draw at sigma 0.016, below 0.05"),
    ({"num_generations": 1}, r"`num_generations` \(1\) must be at least 2"),
    ({"eta": 1.5}, r"`eta` \(1.5\) must be at most 1 with `kernel='renoise'`"),
    ({"eta": 0.0}, r"`eta` \(0.0\) must be at least 0.001"),
    ({"credit_rule": "best"}, "`credit_rule` is 'best': choose 'mixed', 'final', 'level', 'gain' or 'return'"),
    ({"credit_mix": 1.5}, r"`credit_mix` \(1.5\) must be between 0 and 1"),
    ({"scale_rewards": "all"}, "`scale_rewards` is 'all'"),
    ({"kernel": "sde"}, "`kernel` is 'sde': choose 'renoise', 'precise' or 'flow_grpo'"),
    ({"eval_num_inference_steps": 20}, r"`eval_num_inference_steps` \(20\) must be left out"),
    ({"beta": -1.0}, r"`beta` \(-1.0\) must be at least 0"),
])  # fmt: skip
def test_wrong_settings_are_refused(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        tafs(tmp_path, **changes)


def test_dropout_is_refused(tmp_path):
    config = TAFSGRPOConfig(
        output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=4, report_to="none", use_cpu=True
    )
    prompts = Dataset.from_dict({"prompt": ["a", "b"]})
    with pytest.raises(ValueError, match=r"`lora_dropout` \(0.1\) must be 0"):
        TAFSGRPOTrainer(tiny_sd3(), height, config, prompts, peft_config=LoraConfig(r=2, lora_dropout=0.1))


def test_an_image_that_is_left_out_does_not_spoil_its_group(tmp_path):
    """The group shares the first call, which is made for its first image: here the one whose score is missing."""

    def first_of_each_group_is_missing(images, prompts, **columns):
        return [None if i % 16 == 0 else v for i, v in enumerate(images[:, 0].tolist())]

    t = tafs(tmp_path, reward=first_of_each_group_is_missing, credit_rule="final", beta=0.1)
    t.train()
    errors = [row["replay_ratio_error"] for row in t.state.log_history if "replay_ratio_error" in row]
    assert len(errors) == 2
    assert max(errors) <= 1e-6


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_rewards_rise_and_the_kl_term_holds_back(tmp_path):
    """Reward x: without an anchor the velocity shifts as far as it may, with one less."""
    shifts = []
    for beta in (0.0, 0.3):
        t = tafs(tmp_path, beta=beta, max_steps=60, log_prob_form="gaussian", max_grad_norm=1.0)
        t.train()
        rewards = [row["reward"] for row in t.state.log_history if "reward" in row]
        assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
        shifts.append(-float(t.model.transformer.theta.detach()))
    assert shifts[0] > shifts[1] + 0.02 > 0.02


def test_training_stops_at_the_velocity_budget(tmp_path, caplog):
    t = tafs(tmp_path, max_steps=200, max_velocity_distance=0.05)
    with caplog.at_level(logging.WARNING):
        t.train()
    assert 1 < t.state.global_step < 100
    assert "more than `max_velocity_distance` (0.05)" in caplog.text
    distances = [row["velocity_distance"] for row in t.state.log_history if "velocity_distance" in row]
    assert distances[-2] <= 0.05 < t.velocity_distance


def test_several_rewards_are_compared_one_by_one(tmp_path):
    def tall(images, prompts, **columns):
        return [1000 * v for v in images[:, 0].tolist()]

    def wide(images, prompts, **columns):
        return [-v for v in images[:, 1].tolist()]

    both = rolled_out(tafs(tmp_path, dim=2, reward=[tall, wide], reward_weights=[1.0, 0.5]))
    alone = [rolled_out(tafs(tmp_path, dim=2, reward=reward)) for reward in (height, wide)]
    expected = alone[0].record.advantages + 0.5 * alone[1].record.advantages
    torch.testing.assert_close(
        both.record.advantages, expected, atol=2e-3, rtol=2e-3
    )  # 1e-4 is added to either spread


def test_evaluation_reports_the_own_sampler_and_the_ode(tmp_path):
    t = make_trainer("TAFSGRPOTrainer", tmp_path, max_steps=1, learning_rate=1e-2)
    t.train()
    metrics = t.evaluate(Dataset.from_dict({"prompt": ["a red circle", "a red circle", "a blue square"]}))
    assert set(t.rows) == {"base", "tuned", "base_ode", "tuned_ode"}
    for prefix in ("eval", "eval_base", "eval_ode", "eval_base_ode"):
        assert {
            f"{prefix}_{n}" for n in ("reward/redness", "diversity", "edge_density", "colour_entropy")
        } <= metrics.keys()
    assert metrics["eval_base_reward/redness"] != metrics["eval_base_ode_reward/redness"]
    assert metrics["eval_velocity_distance"] > 0
    t.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "stochastic_sampling=True" in card
    assert "sigmas=[1.0, 0.666667, 0.333333]" in card
    assert "| tuned_ode |" in card


def test_evaluation_takes_the_steps_that_were_asked_for(tmp_path):
    levels = set()
    t = tafs(tmp_path, num_inference_steps=4, ode_num_inference_steps=6)
    t.model.transformer.register_forward_pre_hook(lambda _, given: levels.add(round(float(given[1][0]), 5)))
    t.evaluate(NUMBERED.select(range(2)))
    assert levels == {round(step / count, 5) for count in (4, 6) for step in range(1, count + 1)}


# ---- what betrays a hacked reward -----------------------------------------------------------------------------------


def test_image_statistics_of_pictures_that_are_known():
    flat = torch.full((1, 3, 8, 8), 0.4)
    board = ((torch.arange(8)[:, None] + torch.arange(8)) % 2).float().expand(1, 3, 8, 8)
    halves = torch.zeros(1, 3, 8, 8)
    halves[..., 4:] = 1
    images = torch.cat([flat, board, halves])
    torch.testing.assert_close(edge_density(images), torch.tensor([0.0, 1.0, 8 / 112]))
    torch.testing.assert_close(colour_entropy(images), torch.tensor([0.0, 1.0, 1.0]))
    every = torch.cartesian_prod(*[torch.tensor([0.1, 0.4, 0.6, 1.0])] * 3).T.reshape(1, 3, 8, 8)
    torch.testing.assert_close(colour_entropy(every), torch.tensor([6.0]))


# ---- images without a signal ------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_micro_batch_without_an_advantage_costs_one_state_and_changes_nothing(tmp_path, monkeypatch, beta):
    """Of two prompts, one has images of equal rewards; with an anchor, its images are trained on all the same."""

    def partial(images, prompts, **columns):
        scores = redness(images, prompts)
        return torch.where(torch.tensor([p == "a red circle" for p in prompts]), scores, 0.0)

    prompts = Dataset.from_dict({"prompt": ["a red circle", "a blue square"]})
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_inference_steps": 4,
        "beta": beta,
    }
    found = []
    for skips in (True, False):
        t = make_trainer("TAFSGRPOTrainer", tmp_path / str(skips), reward=partial, dataset=prompts, **settings)
        if not skips:
            monkeypatch.setattr(type(t), "has_signal", lambda self, batch: True)
        calls = []
        t.model.transformer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        t.train()
        found.append((sum(calls), torch.cat([p.detach().flatten() for p in t.trained_parameters()])))
    (fewer, skipped), (every, trained) = found
    assert every == 2 * 2 * 3  # updates, micro-batches, draws
    assert fewer == (every if beta else 2 * (3 + 1))
    assert torch.equal(skipped, trained)
