"""AC-Flow learns what it should: the critic the conditional mean of the reward, the actor the weighted images.

Long runs, of `make test-slow`.
"""

import pytest
import torch

from flowrl_trainers.flow import explained_variance

from .ac_flow import Velocities, ac_flow, exact_images
from .gaussian import closeness


@pytest.mark.slow
def test_the_critic_learns_the_conditional_mean_of_the_reward(tmp_path):
    """V* = b z. Mean squared error at most 0.02 Var r in every bin, explained variance of V* at least 0.95 where b z
    explains 10 %.
    """
    t = ac_flow(tmp_path, critic="convolutional", critic_learning_rate=3e-3, timestep_bins=4)
    for rollout in range(200):
        batch = exact_images(t, 256, rollout)
        for group in t.critic_optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - rollout / 200)
        for step in range(4):
            t._critic_step([batch], f"critic step {step}")
    batch = exact_images(t, 2048, 1000)
    states, _, sigma = t._renoised(batch, "judge")
    with torch.no_grad():
        values = t._values(states, sigma, t.condition(batch.examples))
    m = (1 - sigma) ** 2 + sigma**2
    best = (1 - sigma) / m * states[:, :, 0]
    errors = (values - best).square().mean(dim=0)
    explainable = best.var(dim=0)
    print("critic errors", errors.tolist(), "explainable share", explainable.tolist())
    assert (errors <= 0.02).all()
    explained = explained_variance(best, values)
    assert (explainable >= 0.1).sum() >= 3
    assert (explained[explainable >= 0.1] >= 0.95).all()


def spread_after(folder, rounds: int, alpha: float, seed: int = 0, weights=None) -> tuple[float, float]:
    """Mean and variance of the sampler's end after so many updates towards 1, four per rollout, from the learned
    coefficients.
    """
    network = Velocities()
    t = ac_flow(
        folder, network, closeness(1.0), per_device_train_batch_size=256, num_generations=4, max_steps=rounds,
        learning_rate=0.03, temperature=0.5, seed=seed, critic="convolutional", reward_shaping="standardise",
        advantage_clip=1.0, normalize_weights=True, wasserstein_coefficient=alpha, critic_warmup_max_steps=5,
        num_iterations=4,
    )  # fmt: skip
    if weights is not None:
        t._weights = weights(t._weights)
    t.train()
    mean, variance = 0.0, 1.0
    with torch.no_grad():
        for sigma, sigma_next in zip(t.sigmas[:-1], t.sigmas[1:], strict=True):
            at = [float(network(torch.tensor([[z]]), sigma[None])) for z in (0.0, 1.0)]
            slope, offset, h = at[1] - at[0], at[0], float(sigma - sigma_next)
            mean, variance = mean - h * (slope * mean + offset), (1 - h * slope) ** 2 * variance
    return mean, variance


@pytest.mark.slow
def test_without_an_anchor_the_variance_collapses_and_with_it_it_does_not(tmp_path):
    """Everything moves towards the single best image, 1; the anchor holds a part of the base's variance of 1."""
    free, anchored = (spread_after(tmp_path, 300, alpha) for alpha in (0.0, 1.0))
    print("mean and variance without and with an anchor", free, anchored)
    assert free[0] > anchored[0] > 0.2
    assert free[1] < 0.1 < 0.25 < anchored[1]


@pytest.mark.slow
def test_shuffled_weights_lose_the_gain(tmp_path):
    """Weights dealt to the wrong images: nothing is learned of the reward."""

    def shuffled(weights):
        def run(advantages, good):
            order = torch.randperm(len(advantages), generator=torch.Generator().manual_seed(0))
            return weights(advantages, good)[order]

        return run

    right, wrong = spread_after(tmp_path, 150, 0.5), spread_after(tmp_path, 150, 0.5, weights=shuffled)
    print("gain with right and with shuffled weights", right[0], wrong[0])
    assert right[0] > 0.2
    assert abs(wrong[0]) < 0.25 * right[0]
