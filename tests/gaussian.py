"""Gaussian data and a quadratic reward: control problems whose optimum is known."""

import math

import torch
from torch import nn

from flowrl_trainers import FlowPipeline
from flowrl_trainers.rewards import differentiable


def base_coefficients(sigma, std: float, mean: float):
    """The velocity of the flow of N(mean, std^2) is `slope x + offset`; sigma: a number or a tensor."""
    slope = (sigma - (1 - sigma) * std**2) / ((1 - sigma) ** 2 * std**2 + sigma**2)
    return slope, -slope * (1 - sigma) * mean - mean


class StepControl(nn.Module):
    """The base velocity minus a control that is affine in x, with coefficients of their own at every level of the grid."""

    def __init__(self, sigmas: torch.Tensor, dim: int, std: float, mean: float) -> None:
        super().__init__()
        self.std, self.mean = std, mean
        self.register_buffer("levels", sigmas[:-1].clone())
        self.slopes = nn.Parameter(torch.zeros(len(sigmas) - 1, 1))
        self.offsets = nn.Parameter(torch.zeros(len(sigmas) - 1, dim))

    def control(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        step = (self.levels - sigma[:, None]).abs().argmin(dim=1)
        return self.slopes[step] * x + self.offsets[step]

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        slope, offset = base_coefficients(sigma[:, None], self.std, self.mean)
        return slope * x + offset - self.control(x, sigma)


class RadialStepControl(StepControl):
    """The same, times a power of the affine function's root mean square: what costs of other orders ask for."""

    def __init__(self, sigmas: torch.Tensor, dim: int, std: float, mean: float) -> None:
        super().__init__(sigmas, dim, std, mean)
        self.powers = nn.Parameter(torch.zeros(len(sigmas) - 1, 1))

    def control(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        step = (self.levels - sigma[:, None]).abs().argmin(dim=1)
        affine = self.slopes[step] * x + self.offsets[step]
        length = torch.log(affine.square().mean(dim=1, keepdim=True) + 1e-8) / 2  # finite, and so its gradient, where the control is zero
        return affine * torch.exp(self.powers[step] * length)


class SmoothControl(nn.Module):
    """The base velocity minus a control that is affine in x, with coefficients that are smooth functions of sigma."""

    def __init__(self, dim: int, std: float, mean: float) -> None:
        super().__init__()
        self.std, self.mean = std, mean
        self.coefficients = nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1 + dim))
        nn.init.zeros_(self.coefficients[-1].weight)
        nn.init.zeros_(self.coefficients[-1].bias)

    def control(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        slope, offset = self.coefficients(sigma[:, None]).split([1, x.shape[1]], dim=1)
        return slope * x + offset

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        slope, offset = base_coefficients(sigma[:, None], self.std, self.mean)
        return slope * x + offset - self.control(x, sigma)


class GaussianFlow(FlowPipeline):
    """The exact flow of N(mean, std^2 I) in `dim` dimensions, with a control that is trained."""

    def __init__(self, network: nn.Module, dim: int) -> None:
        self.network, self.dim = network, dim

    @property
    def transformer(self) -> nn.Module:
        return self.network

    def encode_prompts(self, prompts):
        return {"none": torch.zeros(len(prompts), 1)}

    def initial_latents(self, batch_size, generator=None):
        return torch.cat([torch.randn(1, self.dim, generator=g) for g in generator])

    def velocity(self, transformer, latents, sigma, conditioning, *, guidance):
        return transformer(latents, sigma)

    def decode(self, latents):
        return latents

    def images(self, latents):
        return latents


def closeness(target: float):
    """The reward -|x - target|^2 / 2."""

    @differentiable
    def reward(images, prompts, **columns):
        return -(images - target).square().sum(dim=1) / 2

    return reward


def relative_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Relative L2 distance over all steps and paths."""
    difference = sum(float((a - b).double().square().sum()) for a, b in zip(found, expected, strict=True))
    return math.sqrt(difference / sum(float(b.double().square().sum()) for b in expected))
