"""The forward-process trainers on Gaussians: a trainer with float64 tensors by hand, and online runs that are solved
exactly.
"""

import math
from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import Tensor

from flowrl_trainers import DiffusionNFTConfig, DiffusionNFTTrainer
from flowrl_trainers.sampling.buffer import MicroBatch
from flowrl_trainers.sampling.prompt_groups import Example, ImageKey
from flowrl_trainers.trainers.ac_flow_trainer import ACFlowRecord
from flowrl_trainers.trainers.diffusion_nft_trainer import DiffusionNFTRecord
from flowrl_trainers.trainers.renoising_trainer import RenoisingRollout, RenoisingTrainer

from .ac_flow import Velocities
from .gaussian import NUMBERED, GaussianFlow, height, settings

IMAGES = 8_000
CONDITIONING = {"none": torch.zeros(1, 1)}


def diffusion_nft(folder, network=None, reward=height, **changes) -> DiffusionNFTTrainer:
    """On N(0, 1) with the reward r = x, which is the advantage; the velocity form, at levels that are uniform."""
    defaults = settings(
        folder, num_inference_steps=16, num_generations=4, max_steps=1, reward_shaping="none", timestep_bins=8,
        timestep_sampling="uniform", adaptive_weighting=False, reference_coefficient=0.0, old_policy_decay=0.0,
    )  # fmt: skip
    del defaults["reward_gradient_clip_quantile"]
    config = DiffusionNFTConfig(**(defaults | changes))
    t = DiffusionNFTTrainer(GaussianFlow(network or Velocities(11), 1), reward, config, NUMBERED)
    t.conditioning.encode(NUMBERED["prompt"], torch.device("cpu"), show_progress=False)
    return t


# ---- one loss on given tensors ------------------------------------------------------------------------------------


def examples(count: int, rollout: int = 0) -> list[Example]:
    return [Example(ImageKey(i % 64, i // 64, rollout), str(i % 64), {}) for i in range(count)]


def nft_batch(sigma: Tensor, u: Tensor, r: Tensor, v_old: Tensor, v_base: Tensor | None = None) -> MicroBatch:
    """At one state of each of B images: sigma, r (B,); the others (B, ...)."""
    base = None if v_base is None else v_base[:, None]
    record = DiffusionNFTRecord(u[:, None], sigma[:, None], u[:, None], r, v_old[:, None], base, None)
    return MicroBatch(examples(len(u)), record, torch.ones(len(u), dtype=torch.bool))


def ac_batch(
    sigma: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    v_base: Tensor | None = None,
    v_old: Tensor | None = None,
) -> MicroBatch:
    """At one state of each of B images: sigma, weights (B,); the others (B, ...)."""
    w, base, old = (None if value is None else value[:, None] for value in (weights, v_base, v_old))
    record = ACFlowRecord(targets[:, None], sigma[:, None], targets[:, None], w, base, old)
    return MicroBatch(examples(len(targets)), record, torch.ones(len(targets), dtype=torch.bool))


def loss_and_gradient(t: RenoisingTrainer, batch: MicroBatch, v: Tensor) -> tuple[Tensor, Tensor]:
    """The losses (B,) where the model says v (B, ...), and the gradient of their sum with respect to it."""
    v = v.detach().requires_grad_()
    losses = t.micro_batch_losses(lambda z, sigma, conditioning, guidance: v, batch, CONDITIONING, 0)
    (gradient,) = torch.autograd.grad(losses.sum(), v)
    return losses.detach(), gradient


# ---- online runs --------------------------------------------------------------------------------------------------


@torch.no_grad()
def sampled(network: Velocities, steps: int = 64) -> tuple[float, float]:
    """Mean and standard deviation of the end of the ODE of an affine velocity, by Heun's method."""
    x = torch.tensor([[0.0], [1.0]])
    levels = torch.linspace(1, 0, steps + 1)
    for now, then in pairwise(levels):
        v = network(x, now.expand(2))
        x = x + (then - now) * (v + network(x + (then - now) * v, then.expand(2))) / 2
    return float(x[0]), float(x[1] - x[0])


def minimise(t: RenoisingTrainer, batch: MicroBatch) -> None:
    """The exact minimum of the loss in the coefficients of `Velocities`, in which it is quadratic: one Newton step."""
    c = t.flow.network.coefficients
    flat = torch.zeros(c.numel(), dtype=torch.float64)

    def gradient(at: Tensor) -> Tensor:
        with torch.no_grad():
            c.copy_(at.view_as(c))
        conditioning, states = t.condition(batch.examples), batch.record.sigmas.shape[1]
        total = sum(t.micro_batch_losses(t.model, batch, conditioning, k).mean() for k in range(states))
        (found,) = torch.autograd.grad(total, c)
        return found.double().flatten()

    at_zero = gradient(flat)
    rows = [gradient(row) - at_zero for row in torch.eye(len(flat), dtype=torch.float64)]
    solution = torch.linalg.lstsq(torch.stack(rows), -at_zero).solution
    with torch.no_grad():
        c.copy_(solution.view_as(c))


def online(t: RenoisingTrainer, rounds: int, follows: bool = True) -> list[tuple[float, float]]:
    """Mean and variance of what the policy draws after each round: images of the sampling policy, and the minimum.

    Args:
        t: with `Velocities`.
        rounds: how many.
        follows: whether the old policy ever follows.
    """
    network, found = t.flow.network, []
    for number in range(rounds):
        t.state.global_step = number
        if follows:
            t.before_rollout()
        by_old = isinstance(t, DiffusionNFTTrainer) or t.args.rollout_policy == "old"
        with t.old_policy() if by_old else nullcontext():
            mean, std = sampled(network)
        # Nothing is drawn that could err: the normal's quantiles, in a random order.
        quantiles = torch.special.ndtri((torch.arange(IMAGES) + 0.5) / IMAGES)
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(number))
        x = mean + std * quantiles[order]
        drawn = MicroBatch(
            examples(IMAGES, number), RenoisingRollout(x[:, None]), torch.ones(IMAGES, dtype=torch.bool)
        )
        (batch,) = t.prepare([drawn])
        minimise(t, batch)
        mean, std = sampled(network)
        found.append((mean, std**2))
    print(found)
    return found


# ---- quadrature ---------------------------------------------------------------------------------------------------


def posterior(z: float, sigma: float, mean: float = 0.0, nodes: int = 20001) -> tuple[Tensor, Tensor]:
    """Images x given z, where x ~ N(mean, 1): nodes and their probabilities, float64."""
    m = (1 - sigma) ** 2 + sigma**2
    centre, std = mean + (1 - sigma) / m * (z - (1 - sigma) * mean), sigma / math.sqrt(m)
    x = centre + std * torch.linspace(-9, 9, nodes, dtype=torch.float64)
    return x, torch.softmax(-((x - centre) ** 2) / (2 * std**2), dim=0)
