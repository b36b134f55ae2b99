"""`RewardGradientTrainer`: what adjoint matching and VGG-Flow share around the gradient of the reward."""

from typing import Any

import torch

from ..flow import expand_like, root_mean_square
from .base_trainer import FlowRLTrainer
from .reward_gradient_config import RewardGradientConfig


class RewardGradientTrainer(FlowRLTrainer):
    """A trainer whose target is built from reward gradients: their clipping, their scale, and what is not finite among them."""

    config_class = RewardGradientConfig
    needs_reward_gradient = True

    replayed_settings = (*FlowRLTrainer.replayed_settings, "reward_scale", "control_to_velocity_ratio", "reward_gradient_clip_quantile")

    args: RewardGradientConfig
    reward_scale: float | None

    def set_up(self) -> None:
        """The scale of the reward, None until the first rollout finds it."""
        self.reward_scale = self.args.reward_scale

    @property
    def known_scale(self) -> float:
        """The scale of the reward, once the first rollout has found it."""
        assert self.reward_scale is not None
        return self.reward_scale

    def clip_threshold(self, norms: torch.Tensor) -> torch.Tensor | None:
        """The quantile of the norms (M,) of this process's reward gradients and those of all others; None without clipping."""
        everyone = self.accelerator.gather(norms)
        self.log_metric("reward_gradient_norm", everyone.mean())
        quantile, moving = self.args.reward_gradient_clip_quantile, everyone[everyone > 0]  # zeros would clip all others away
        return None if quantile is None or not len(moving) else torch.quantile(moving, quantile)

    @staticmethod
    def clip(gradient: torch.Tensor, threshold: torch.Tensor | None) -> torch.Tensor:
        """Gradients (M, ...) scaled down to the threshold where their norm is above it."""
        if threshold is None:
            return gradient
        norm = gradient.flatten(1).norm(dim=1)
        return gradient * expand_like(torch.where(norm > threshold, threshold / norm, 1.0), gradient)

    def mean_square(self, parts: list[torch.Tensor]) -> float:
        """The mean square over latents (M, ...) of all parts and processes; raises `ValueError` if none of them is finite."""
        squares = self.accelerator.gather(torch.cat([root_mean_square(part) for part in parts])).double().square()
        finite = squares.isfinite()
        if not finite.any():
            raise ValueError("Nothing that the first rollout computed is finite: train in float32 or bfloat16.")
        return float(squares[finite].mean())

    def refuse_zero_gradient(self, gradients: list[torch.Tensor]) -> None:
        """Raises `ValueError` if the reward gradients (M, ...) of the first rollout are zero on all processes."""
        if not self.accelerator.gather(torch.cat([root_mean_square(g) for g in gradients])).any():
            raise ValueError("The reward's gradient is zero on the whole first rollout: nothing can be learned from it.")

    def algorithm_state(self) -> dict[str, Any]:
        """The reward scale, which was found on the first rollout."""
        return {"reward_scale": self.reward_scale}

    def load_algorithm_state(self, state: dict[str, Any]) -> None:
        """Take up the reward scale."""
        self.reward_scale = state["reward_scale"]
