"""AC-Flow on a Gaussian in one dimension: a velocity that can learn, the trainer, images that are drawn exactly."""

import torch
from torch import nn

from flowrl_trainers import ACFlowConfig, ACFlowTrainer
from flowrl_trainers.sampling.buffer import MicroBatch
from flowrl_trainers.sampling.prompt_groups import Example, ImageKey
from flowrl_trainers.trainers.renoising_trainer import RenoisingRollout, Returns

from .gaussian import NUMBERED, GaussianFlow, height, settings


class Velocities(nn.Module):
    """A velocity that is affine in z, with coefficients interpolated between knots in sigma, plus that of N(0, 1)."""

    def __init__(self, knots: int = 21) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(knots, 2))

    def forward(self, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        place = sigma * (len(self.coefficients) - 1)
        low = place.floor().long().clamp(max=len(self.coefficients) - 2)
        share = (place - low)[:, None]
        slope, offset = torch.lerp(self.coefficients[low], self.coefficients[low + 1], share).unsqueeze(-1).unbind(1)
        s = sigma[:, None]
        return (2 * s - 1) / ((1 - s) ** 2 + s**2) * z + slope * z + offset


def ac_flow(folder, network=None, reward=height, given=None, **changes) -> ACFlowTrainer:
    defaults = settings(
        folder, num_inference_steps=16, num_generations=4, max_steps=1, reward_shaping="none", advantage_clip=None,
        normalize_weights=False, critic="none" if given is None else "module", critic_warmup_max_steps=0,
        wasserstein_coefficient=0.0,
    )  # fmt: skip
    del defaults["reward_gradient_clip_quantile"]
    t = ACFlowTrainer(
        GaussianFlow(network or Velocities(), 1), reward, ACFlowConfig(**(defaults | changes)), NUMBERED, critic=given
    )
    t.conditioning.encode(NUMBERED["prompt"], torch.device("cpu"), show_progress=False)
    return t


def drawn_images(t: ACFlowTrainer, count: int, rollout: int = 0) -> MicroBatch[RenoisingRollout]:
    """A micro-batch whose images are drawn from N(0, 1) itself."""
    examples = [Example(ImageKey(i % 64, i // 64, rollout), str(i % 64), {}) for i in range(count)]
    x = torch.randn(count, 1, generator=torch.Generator().manual_seed(100 + rollout))
    return MicroBatch(examples, RenoisingRollout(x), torch.ones(count, dtype=torch.bool))


def exact_images(t: ACFlowTrainer, count: int, rollout: int = 0) -> MicroBatch[Returns]:
    """The same, scored by the trainer."""
    (batch,) = t._shape([drawn_images(t, count, rollout)])
    return batch
