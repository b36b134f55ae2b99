"""The two samplers of adjoint matching: what a step does, and what that makes of target and loss.

For the step h = sigma - sigma' > 0 from state x with the velocity v, and g the adjoint at its end:

                        ODE (arXiv 2605.06583)          memoryless (arXiv 2409.08861)
    step                x - h v                         x - h (2 v + x / (1 - sigma')) + sqrt(h) s eps
    gain                1                               s^2 / 2                     (target control = grad L*(gain g))
    weight              1                               2 / gain                    (of the squared error)
    product             J_v^T g                         2 J_v^T g + g / (1 - sigma')

with s^2 = 2 (sigma + h) / (1 - sigma'). The paper of the second runs t = 1 - sigma with v_paper = -v; both offsets by
h are its own (appendix G): the one below keeps s finite at pure noise, the one above lets late steps learn. This
process forgets where it started, which makes the optimum of the control problem the tilted distribution p_base
exp(lambda r) (theorem 1). Its last step, to sigma = 0, is a noiseless Euler step of the base model's ODE: noise would
spoil the reward's gradient.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from .adjoint import Velocity, carry_adjoint, vector_jacobian_product
from .conversions import expand_like
from .steps import euler_step

LATE_SHARE = 4  # the last quarter of the memoryless steps is always trained (arXiv 2409.08861, appendix G)


class Dynamics(ABC):
    """What a sampler's step does, and what that makes of the target and the loss of adjoint matching."""

    @abstractmethod
    def controlled(self, sigma_next: Tensor) -> Tensor:
        """Whether the model, and not its base, takes the steps that end at levels (M,): (M,)."""

    @abstractmethod
    def step(self, x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean (B, ...) and standard deviation (B, 1, ...) of the next state; None where nothing is drawn.

        Args:
            x: (B, ...).
            velocity: Of the shape of x.
            sigma: (B,) or ().
            sigma_next: Of the shape of sigma, below it.
        """

    @abstractmethod
    def gain(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """The factor on the adjoint in the target control of the steps between levels (M,): (M,)."""

    @abstractmethod
    def weight(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """The weight of the squared error of the steps between levels (M,): (M,)."""

    @abstractmethod
    def carry(self, velocity: Velocity, states: Tensor, sigmas: Tensor, terminal: Tensor) -> tuple[Tensor, Tensor]:
        """`carry_adjoint` with the Jacobian of one velocity alone: adjoints (K, B, ...) and velocities (K - 1, B,
        ...).

        With the frozen base velocity this is the lean adjoint of arXiv 2409.08861 (section 5.2), whose fixed point is
        the optimal control; with the velocity that was sampled with, it is the gradient of the final reward at every
        state.

        Args:
            velocity: Maps `(x (B, ...), sigma (B,))` to (B, ...).
            states: (K, B, ...), those before each step.
            sigmas: (K + 1,), decreasing.
            terminal: (B, ...), the gradient at the final state.
        """

    @abstractmethod
    def trained_steps(self, steps: int, generator: Generator) -> list[int]:
        """Which of the last `steps` steps are trained: their numbers, counted from the first of them, in order."""


@dataclass(frozen=True)
class OdeDynamics(Dynamics):
    """The Euler ODE: nothing is drawn, every step is controlled and trained."""

    def controlled(self, sigma_next: Tensor) -> Tensor:
        return torch.ones_like(sigma_next, dtype=torch.bool)

    def step(self, x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, None]:
        return euler_step(x, velocity, sigma, sigma_next), None

    def gain(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def weight(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def carry(self, velocity: Velocity, states: Tensor, sigmas: Tensor, terminal: Tensor) -> tuple[Tensor, Tensor]:
        def product(x: Tensor, sigma: Tensor, sigma_next: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
            return vector_jacobian_product(velocity, x, sigma, g)

        return carry_adjoint(product, states, sigmas, terminal)

    def trained_steps(self, steps: int, generator: Generator) -> list[int]:
        return list(range(steps))


@dataclass(frozen=True)
class MemorylessDynamics(Dynamics):
    """The memoryless process; trained are the last quarter of its steps, and as many drawn from the earlier ones."""

    def variance(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """s^2, the noise per unit of time of steps between levels of any shape; infinite only for sigma_next = 1."""
        return 2 * (2 * sigma - sigma_next) / (1 - sigma_next)

    def controlled(self, sigma_next: Tensor) -> Tensor:
        return sigma_next > 0

    def step(self, x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.controlled(sigma_next).any():
            return euler_step(x, velocity, sigma, sigma_next), None
        h, level = expand_like(sigma - sigma_next, x), expand_like(1 - sigma_next, x)
        std = (h * expand_like(self.variance(sigma, sigma_next), x)).sqrt()
        return x - h * (2 * velocity + x / level), std

    def gain(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return self.variance(sigma, sigma_next) / 2

    def weight(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return 2 / self.gain(sigma, sigma_next)

    def carry(self, velocity: Velocity, states: Tensor, sigmas: Tensor, terminal: Tensor) -> tuple[Tensor, Tensor]:
        def product(x: Tensor, sigma: Tensor, sigma_next: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
            carried, v = vector_jacobian_product(velocity, x, sigma, g)
            noisy = expand_like(self.controlled(sigma_next), g)
            return torch.where(noisy, 2 * carried + g / expand_like(1 - sigma_next, g), carried), v

        return carry_adjoint(product, states, sigmas, terminal)

    def trained_steps(self, steps: int, generator: Generator) -> list[int]:
        late = -(-steps // LATE_SHARE)
        earlier = torch.randperm(steps - late, generator=generator)[:late]
        return [*sorted(earlier.tolist()), *range(steps - late, steps)]
