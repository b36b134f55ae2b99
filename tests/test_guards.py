"""What a run logs against over-optimisation: the length of the velocity, prompts that teach nothing, the effective
eta, and advice on a reward that is trained alone.
"""

import math

import pytest
import torch
from torch import nn

import flowrl_trainers
from flowrl_trainers.flow import norm_ratios
from flowrl_trainers.rewards import as_rewards
from flowrl_trainers.sampling.prompt_groups import Example, ImageKey
from flowrl_trainers.sampling.reward_watch import RewardWatch, share_without_spread

from .ac_flow import ac_flow
from .forward_process import ac_batch, diffusion_nft, loss_and_gradient, nft_batch
from .gaussian import NUMBERED, GaussianFlow, base_coefficients, closeness, settings
from .helpers import make_trainer


class Longer(nn.Module):
    """The velocity of N(0, I / 4), longer by the share theta at every level."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return (1 + self.theta) * base_coefficients(sigma[:, None], 0.5, 0.0)[0] * x


SHORT = {
    "AdjointMatchingTrainer": {"adjoint_steps": 8, "reward_scale": 1.0},
    "VGGFlowTrainer": {"timestep_bins": 4, "reward_scale": 1.0},
    "ACFlowTrainer": {"critic": "none", "critic_warmup_max_steps": 0},
    "DiffusionNFTTrainer": {},
    "TAFSGRPOTrainer": {"num_inference_steps": 4, "num_generations": 4},
}


# ---- the length of the velocity -------------------------------------------------------------------------------------


def test_norm_ratios_are_means_within_each_quarter_of_the_levels():
    sigma = torch.tensor([0.0, 0.2499, 0.25, 0.75, 1.0, 0.8])
    lengths, base = torch.tensor([1.0, 3.0, 4.0, 5.0, 6.0, 99.0]), torch.tensor([1.0, 1.0, 2.0, 4.0, 4.0, 1.0])
    good = torch.tensor([True] * 5 + [False])
    expected = torch.tensor([2.0, 2.0, math.nan, 1.375])
    torch.testing.assert_close(norm_ratios(lengths, base, sigma, good), expected, equal_nan=True)


@pytest.mark.parametrize("name", SHORT)
def test_every_trainer_logs_how_much_longer_the_velocity_is(tmp_path, name, caplog):
    """A velocity of 1.1 times the base's has the ratio 1.1 at every level, in updates and in evaluations."""
    trainer = getattr(flowrl_trainers, name)
    defaults = settings(tmp_path, num_inference_steps=8, per_device_train_batch_size=8, max_steps=1)
    if not trainer.needs_reward_gradient:
        del defaults["reward_gradient_clip_quantile"]
    config = trainer.config_class(**(defaults | SHORT[name]))
    t = trainer(GaussianFlow(Longer(), 3), closeness(1.0), config, NUMBERED)
    t.conditioning.encode(NUMBERED["prompt"], torch.device("cpu"), show_progress=False)
    with torch.no_grad():
        t.model.transformer.theta.fill_(0.1)
    batches = t.make_rollout([Example(ImageKey(i // 4, i % 4, 0), str(i // 4), {}) for i in range(8)])
    t.buffer.step = 2  # not the first use of a rollout
    for state in range(t.num_trained_states):
        t.micro_batch_losses(t.model, batches[0], t.condition(batches[0].examples), state)
    ratios = {n: values for n, values in t.metrics.noted.items() if n.startswith("velocity_norm_ratio_")}
    assert len(ratios) >= 2
    for values in ratios.values():
        assert values == pytest.approx([1.1] * len(values), rel=1e-5)
    assert t.metrics.noted.get("prompts_without_spread", [0.0]) == [0.0]
    metrics = t.evaluate(NUMBERED.select(range(3)))
    for quarter in range(1 if name == "TAFSGRPOTrainer" else 0, 4):  # its four levels end at 1/4
        assert metrics[f"eval_velocity_norm_ratio_{quarter}"] == pytest.approx(1.1, rel=1e-5)
    assert metrics["eval_velocity_distance"] == pytest.approx(0.1, rel=1e-5)
    assert "The velocity is up to 10 % longer than the base model's" in caplog.text


# ---- prompts that teach nothing -------------------------------------------------------------------------------------


def test_the_share_of_prompts_without_spread():
    """Of five prompts one has a single picture and does not count; a score that is missing is no difference, and one
    reward with a difference is enough.
    """
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4])
    rewards = torch.tensor([[1.0, 5], [2, 5], [3, 7], [3, 7], [4, 8], [math.nan, 8], [1, 0], [1, math.inf], [9, 9]])
    assert float(share_without_spread(rewards, groups)) == 0.75
    assert float(share_without_spread(rewards[:2, 1:], groups[:2])) == 1.0
    assert share_without_spread(rewards, torch.arange(9)).isnan()


def test_rewards_of_no_weight_count_for_no_spread(tmp_path):
    def alike(images, prompts, **columns):
        return [1.0] * len(images)

    def apart(images, prompts, **columns):
        return list(range(len(images)))

    t = make_trainer("ACFlowTrainer", tmp_path, reward=[alike, apart], reward_weights=[1.0, 0.0], critic="none")
    t.train()
    assert [row["prompts_without_spread"] for row in t.state.log_history if "loss" in row] == [1.0, 1.0]


def test_a_reward_that_is_trained_alone_calls_for_a_judge():
    rewards, scores = as_rewards({"ocr": lambda images, prompts, **columns: None}), torch.rand(4, 1)
    watch = RewardWatch(rewards, judged=False)
    said = [watch.observe(scores, torch.zeros(4)) for _ in range(2)]
    assert [len(sentences) for sentences in said] == [1, 0]
    assert said[0][0].startswith("Reward 'ocr' is trained alone and no other looks at the pictures")
    assert RewardWatch(rewards, judged=True).observe(scores, torch.zeros(4)) == []
    assert RewardWatch(rewards * 2, judged=False).observe(torch.rand(4, 2), torch.zeros(4)) == []


# ---- the effective eta ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["weighted", "huber", "fixed", "fixed_from_old", "nft", "nft_velocity"])
def test_the_effective_eta_is_the_reward_s_pull_over_the_base_s(tmp_path, method):
    """The gradient is omega A (v - u) + a (v - v_base), and eta = omega / a: that of A = 1 at v = v_base, over that of
    A = 0 at v = v_base + (v_base - u). The old velocity is the base's.
    """
    generator = torch.Generator().manual_seed(0)
    u, v_base = torch.randn(2, 1, 64, generator=generator, dtype=torch.float64)
    sigma, eta = torch.tensor([0.6], dtype=torch.float64), []
    linear = dict(weighting="linear", temperature=2.0, wasserstein_coefficient=0.1, normalize_weights=False)
    fixed = dict(target="fixed", normalize_weights=None, temperature=2.0)
    gradients = []
    for A, v in ((torch.ones(1), v_base), (torch.zeros(1), 2 * v_base - u)):
        match method:
            case "weighted" | "huber":
                weighting = {"loss_weighting": "huber"} if method == "huber" else {}
                t = ac_flow(tmp_path, **linear, **weighting)
                batch = ac_batch(sigma, u, A / 2, v_base=v_base)
            case "fixed" | "fixed_from_old":
                alone = {"wasserstein_coefficient": None, "reward_multiplier": 7.0}
                beside = {"wasserstein_coefficient": 0.3, "target_anchor": "old", "reward_multiplier": 3.0}
                t = ac_flow(tmp_path, **fixed, **(alone if method == "fixed" else beside))
                targets = v_base + t.args.reward_multiplier * A / 2 * (u - v_base)
                batch = ac_batch(sigma, targets, None, v_base=None if method == "fixed" else v_base)
                v = v if method == "fixed" or A else v_base  # its pull to the old velocity is no pull to the base
            case _:
                adaptive = method == "nft"
                t = diffusion_nft(tmp_path, adaptive_weighting=adaptive, reference_coefficient=0.02)
                batch = nft_batch(sigma, u, A / 10 + 0.5, v_base, v_base)
        if method.startswith("nft") and not A:
            gradients.append(0.02 * 2 / 64 * (v_base - u))  # its error grows with v - v_old as well
        elif method == "fixed_from_old" and not A:
            gradients.append(0.3 * 2 / 64 * (v_base - u))
        else:
            gradients.append(loss_and_gradient(t, batch, v)[1])
            eta += t.metrics.noted["effective_eta"]
    reward, pull = gradients
    torch.testing.assert_close(reward, eta[0] * pull, rtol=1e-6, atol=0)


def test_positive_weights_have_no_effective_eta(tmp_path):
    t, zero = ac_flow(tmp_path, weighting="exponential", wasserstein_coefficient=0.1), torch.zeros(1, 4)
    loss_and_gradient(t, ac_batch(torch.ones(1), zero, torch.ones(1), v_base=zero), zero)
    assert "effective_eta" not in t.metrics.noted
