"""Gaussian data and a quadratic reward: control problems whose optimum is known."""

import math
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.integrate import solve_ivp
from torch import nn

from flowrl_trainers import FlowPipeline
from flowrl_trainers.rewards import differentiable


def base_coefficients(sigma, std: float, mean: float):
    """The velocity of the flow of N(mean, std^2) is `slope x + offset`; sigma: a number or a tensor."""
    slope = (sigma - (1 - sigma) * std**2) / ((1 - sigma) ** 2 * std**2 + sigma**2)
    return slope, -slope * (1 - sigma) * mean - mean


class StepControl(nn.Module):
    """The base velocity minus a control that is affine in x, with coefficients of their own at every level of the
    grid.
    """

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
        length = (
            torch.log(affine.square().mean(dim=1, keepdim=True) + 1e-8) / 2
        )  # finite, and so its gradient, where the control is zero
        return affine * torch.exp(self.powers[step] * length)


class SmoothControl(nn.Module):
    """The base velocity minus a control that is affine in x, with coefficients that are smooth functions of sigma."""

    def __init__(self, dim: int, std: float, mean: float) -> None:
        super().__init__()
        self.std, self.mean = std, mean
        self.coefficients = nn.Sequential(
            nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1 + dim)
        )
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


def continuous_gains(
    sigmas: np.ndarray, std: float, mean: float, scale: float, target: float
) -> list[tuple[float, float]]:
    """Minus the gradient of the continuous value, `-(p x + q)`: p' = -2 a p - p^2 and q' = -(p + a) q - b p in sigma,
    from the end on.
    """

    def right_side(sigma: float, y: np.ndarray) -> list[float]:
        (slope, offset), (p, q) = base_coefficients(sigma, std, mean), y
        return [-2 * slope * p - p**2, -(p + slope) * q - offset * p]

    levels = sigmas[::-1]
    solution = solve_ivp(right_side, (0, 1), [scale, -scale * target], t_eval=levels, rtol=1e-10, atol=1e-12)
    return [(-p, -q) for p, q in solution.y.T[::-1][:-1]]


# ---- runs -----------------------------------------------------------------------------------------------------------

STD, BETA = 0.5, 0.8  # of the data; the reward's scale in VGG-Flow
NUMBERED = Dataset.from_dict({"prompt": [str(n) for n in range(64)]})


def settings(folder, **changes) -> dict[str, Any]:
    """Of a run on a Gaussian, without what would disturb its optimum."""
    return dict(
        output_dir=str(folder), per_device_train_batch_size=64, reward_gradient_clip_quantile=None, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, lr_scheduler_type="linear", logging_steps=1000,
        max_grad_norm=0.0,
    ) | changes  # fmt: skip


def height(images, prompts, **columns):
    """r = x."""
    return images[:, 0].tolist()


def unit_slope(sigma):
    """The velocity of the flow of N(0, 1) is `unit_slope(sigma) x`."""
    return (2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2)


class Shifted(nn.Module):
    """The velocity of N(0, I) plus theta, one number; and `extra` of x, where the module is in training mode."""

    def __init__(self, extra: float = 0.0) -> None:
        super().__init__()
        self.theta, self.extra, self.sizes = nn.Parameter(torch.zeros(())), extra, []

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        return unit_slope(sigma[:, None]) * x + self.theta + (self.extra * x if self.training else 0.0)
