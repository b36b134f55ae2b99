"""Deterministic, truncated adjoint matching for flow models, as reconstructed from the abstract of arXiv 2605.06583.

The sampler with control u on top of the base velocity, in our time direction (v_theta = v_base - u, h_k = sigma_k - sigma_{k+1} > 0):

    x_{k+1} = x_k - h_k v_theta(x_k, sigma_k),    minimise  E[ sum_k h_k L(u_k) - lambda r(x_N) ]                             (1)

Its optimum is reached by regressing the control, at states sampled with the current model, onto the best one against the adjoint g:

    g_N = lambda grad r(x_N),    g_k = g_{k+1} - h_k J_base(x_k, sigma_k)^T g_{k+1}                                           (2)
    loss = mean_k mean_d (u_theta(x_k, sigma_k) - grad L*(g_{k+1}))^2                                                         (3)

over the last `adjoint_steps` steps k. For the quadratic cost, L = |u|^2 / 2, grad L*(g) = g and the target of v_theta is v_base - g.
The lean adjoint (2) differentiates the frozen base alone (arXiv 2409.08861, section 5.2). The full one is the gradient of (1):

    g_k = g_{k+1} - h_k [ J_theta^T (g_{k+1} - grad L(u_k)) + J_base^T grad L(u_k) ]                                          (4)

Papers run t = 1 - sigma with v_paper = -v, where (2) reads a_k = a_{k+1} + h J^T a_{k+1} and the target v_base + a.

Only the abstract of 2605.06583 could be read, which names the deterministic control problem, the regression, the truncation and costs
beyond the quadratic one. Our choices: the lean adjoint by default, the pairing of the control at step k with g_{k+1} (exact for the Euler
system; g_k is off by O(h)), the radial polynomial costs of `flow.control_costs`, no weights over steps, the conditional branch alone in
(2) to (4) while rollouts are guided, and `control_to_velocity_ratio`.
"""

import logging
import math
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import nn

from ..flow import (
    best_control,
    best_rms,
    carry_adjoint,
    control_cost,
    control_cost_gradient,
    euler_step,
    expand_like,
    lean_adjoint,
    root_mean_square,
    vector_jacobian_product,
)
from ..pipelines import Conditioning
from .adjoint_matching_config import AdjointMatchingConfig
from .base_trainer import FlowRLTrainer
from .micro_batch import MicroBatch

logger = logging.getLogger(__name__)

SMALLEST_OPENING = 0.05


class AdjointMatchingTrainer(FlowRLTrainer):
    """Fine-tunes a flow model to raise a differentiable reward by deterministic, truncated adjoint matching."""

    _name: ClassVar[str] = "Adjoint Matching"
    _tag_names: ClassVar[list[str]] = ["adjoint-matching"]
    _paper: ClassVar[dict[str, str]] = {
        "title": "Improved techniques for fine-tuning flow models via adjoint matching: a deterministic control pipeline",
        "id": "2605.06583",
        "note": ", as reconstructed from its abstract",
    }
    config_class = AdjointMatchingConfig
    needs_reward_gradient = True

    replayed_settings = (*FlowRLTrainer.replayed_settings, "adjoint_steps", "adjoint", "control_cost_order", "control_cost_weight")

    args: AdjointMatchingConfig

    def set_up(self) -> None:
        """The window of controlled steps; raises `ValueError` if it opens where nothing is left to learn."""
        self.num_trained_states = self.args.adjoint_steps
        self.window_sigmas = self.sigmas[-self.args.adjoint_steps - 1 :]
        self.reward_scale = self.args.reward_scale
        self.cost = (self.args.control_cost_order, self.args.control_cost_weight)
        opening = float(self.window_sigmas[0])
        if opening < SMALLEST_OPENING:
            raise ValueError(
                f"`adjoint_steps` ({self.args.adjoint_steps}) opens its window at sigma {opening:.3f}, below {SMALLEST_OPENING}, where "
                "nothing is left to learn: take more adjoint steps."
            )
        if self.is_world_process_zero():
            steps = f"{self.args.adjoint_steps} of {self.args.num_inference_steps} steps"
            logger.info("The window of %s opens at sigma %.3f.", steps, opening)

    def rollout(self, latents: torch.Tensor, conditioning: Conditioning) -> dict[str, torch.Tensor]:
        """Euler steps with guidance; keeps the states before the last `adjoint_steps` steps (B, K, ...) and the final one (B, ...)."""
        kept: list[torch.Tensor] = []
        for sigma, sigma_next in pairwise(self.sigmas):
            kept = [*kept, latents][-self.args.adjoint_steps :]
            velocity = self.model(latents, sigma.expand(len(latents)), conditioning, guidance=True)
            latents = euler_step(latents, velocity, sigma, sigma_next)
        return {"latents": torch.stack(kept, dim=1), "final": latents}

    def prepare(self, rollout: list[MicroBatch]) -> None:
        """Reward gradients and their clipping, the adjoint (2) or (4), base velocities and, on the first rollout, the reward scale."""
        with self.timed("reward_gradient"):
            self._reward_gradients(rollout)
        with self.timed("adjoint"):
            if self.reward_scale is None:
                self.reward_scale = self._find_reward_scale(rollout)
            for batch in rollout:
                batch.tensors["adjoints"] = self._adjoints(batch, self.args.adjoint, self.reward_scale)
                del batch.tensors["reward_gradient"]
                self._leave_out_what_is_not_finite(batch)
        self.count_bad_samples("adjoint", ~torch.cat([batch.good for batch in rollout]))
        self.log_metric("reward_scale", self.reward_scale)
        controls = torch.cat([root_mean_square(self._target_control(batch.tensors["adjoints"]).flatten(0, 1)) for batch in rollout])
        self.log_metric("target_control_rms", self.accelerator.gather(controls).square().mean().sqrt())

    def _reward_gradients(self, rollout: list[MicroBatch]) -> None:
        scores = []
        for batch in rollout:
            values, gradient = self.score_with_gradient(batch.tensors.pop("final"), batch.examples)
            finite = ~values.isinf().any(dim=1) & gradient.flatten(1).isfinite().all(dim=1)
            batch.good &= finite
            batch.tensors["reward_gradient"] = torch.where(expand_like(finite, gradient), gradient, 0.0)
            scores += [values]
        self.log_rewards(torch.cat(scores))
        self.count_bad_samples("reward_gradient", ~torch.cat([batch.good for batch in rollout]))
        norms = [batch.tensors["reward_gradient"].flatten(1).norm(dim=1) for batch in rollout]
        everyone = self.accelerator.gather(torch.cat(norms))
        self.log_metric("reward_gradient_norm", everyone.mean())
        if self.args.reward_gradient_clip_quantile is not None:
            largest = torch.quantile(everyone, self.args.reward_gradient_clip_quantile)
            for batch, norm in zip(rollout, norms, strict=True):
                factor = torch.where(norm > largest, largest / norm, 1.0)
                batch.tensors["reward_gradient"] *= expand_like(factor, batch.tensors["reward_gradient"])

    @staticmethod
    def _leave_out_what_is_not_finite(batch: MicroBatch) -> None:
        """Mark images with anything that is not finite, and zero them, as zero times infinity would still reach the weights."""
        for name in ("latents", "velocities", "adjoints"):
            batch.good &= batch.tensors[name].flatten(1).isfinite().all(dim=1)
        for name, value in batch.tensors.items():
            batch.tensors[name] = torch.where(expand_like(batch.good, value), value, 0.0)

    def _adjoints(self, batch: MicroBatch, kind: str, reward_scale: float) -> torch.Tensor:
        """(B, K, ...): g_{k+1} for every trained state; also leaves the base velocities in the batch."""
        conditioning, latents = self.condition(batch.examples), batch.tensors["latents"].transpose(0, 1)
        terminal = reward_scale * batch.tensors["reward_gradient"]

        seen: list[torch.Tensor] = []  # base velocities at the last state, the one before it, ...

        def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return self.model(x, sigma, conditioning)

        def base_velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            v = velocity(x, sigma)
            seen.append(v.detach())
            return v

        def full_product(x: torch.Tensor, sigma: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
            """The bracket of (4); what is computed with the adapter off is differentiated with it off."""
            with torch.no_grad():
                current = velocity(x, sigma)
            with self.model.reference():
                base_x = x.detach().requires_grad_()
                base = base_velocity(base_x, sigma)
                pull = control_cost_gradient(base.detach() - current, *self.cost)
                (from_base,) = torch.autograd.grad(base, base_x, grad_outputs=pull)
            return from_base + vector_jacobian_product(velocity, x, sigma, g - pull)

        match kind:
            case "lean":
                with self.model.reference():
                    adjoints = lean_adjoint(base_velocity, latents, self.window_sigmas, terminal)
            case "current":
                adjoints = lean_adjoint(velocity, latents, self.window_sigmas, terminal)
            case _:
                adjoints = carry_adjoint(full_product, latents, self.window_sigmas, terminal)
        with torch.no_grad(), self.model.reference():
            for k in reversed(range(len(latents) - len(seen))):  # the states that needed no product of the base
                base_velocity(latents[k], self.window_sigmas[k].expand(len(latents[k])))
        batch.tensors["velocities"] = torch.stack(seen[::-1], dim=1)
        return adjoints.transpose(0, 1)

    def _target_control(self, adjoints: torch.Tensor) -> torch.Tensor:
        """Grad L* of adjoints (B, K, ...), latent by latent."""
        return best_control(adjoints.flatten(0, 1), *self.cost).reshape(adjoints.shape)

    def _find_reward_scale(self, rollout: list[MicroBatch]) -> float:
        """The lambda for which RMS(target control) / RMS(base velocity) is `control_to_velocity_ratio` on this rollout."""
        gradients = self.accelerator.gather(torch.cat([root_mean_square(b.tensors["reward_gradient"]) for b in rollout]))
        if not gradients.any():
            raise ValueError("The reward's gradient is zero on the whole first rollout: nothing can be learned from it.")
        # The lean adjoint is linear in the gradient; at a scale near one it does not underflow in half precision.
        unit = float(1 / gradients.square().mean().sqrt())
        found = [(self._adjoints(batch, "lean", unit).flatten(0, 1), batch.tensors["velocities"].flatten(0, 1)) for batch in rollout]
        adjoint, velocity = (
            self.accelerator.gather(torch.cat([root_mean_square(x) for x in part])).double() for part in zip(*found, strict=True)
        )
        good = adjoint.isfinite() & velocity.isfinite()
        if not good.any():
            raise ValueError("No adjoint of the first rollout is finite: train in float32 or bfloat16.")
        adjoint, wanted = adjoint[good], self.args.control_to_velocity_ratio * float(velocity[good].square().mean().sqrt())
        low, high = -80.0, 80.0  # of log lambda; the control grows with it, so halving the interval finds it
        for _ in range(100):
            middle = (low + high) / 2
            too_large = float(best_rms(adjoint * math.exp(middle), *self.cost).square().mean().sqrt()) > wanted
            low, high = (low, middle) if too_large else (middle, high)
        return unit * math.exp(low)

    def micro_batch_losses(self, model: nn.Module, batch: MicroBatch, conditioning: Conditioning, state: int) -> torch.Tensor:
        """(3) at one state, or its Hamiltonian form."""
        latents, base, adjoint = (batch.tensors[name][:, state] for name in ("latents", "velocities", "adjoints"))
        control = base - model(latents, self.window_sigmas[state].expand(len(latents)), conditioning)
        if self.args.loss_type == "regression":
            return (control - best_control(adjoint, *self.cost)).flatten(1).square().mean(dim=1)
        return 2 * (control_cost(control, *self.cost) - (control * adjoint).flatten(1).mean(dim=1))

    def algorithm_state(self) -> dict[str, Any]:
        """The reward scale, which was found on the first rollout."""
        return {"reward_scale": self.reward_scale}

    def load_algorithm_state(self, state: dict[str, Any]) -> None:
        """Take up the reward scale."""
        self.reward_scale = state["reward_scale"]

    def card_settings(self) -> dict[str, Any]:
        """What the card shows of the method."""
        args = self.args
        return {
            "controlled steps": f"{args.adjoint_steps} of {args.num_inference_steps}, from sigma {float(self.window_sigmas[0]):.3f}",
            "adjoint, loss": f"{args.adjoint}, {args.loss_type}",
            "cost": f"order {args.control_cost_order}, weight {args.control_cost_weight:g}",
            "reward scale": "not found yet" if self.reward_scale is None else f"{self.reward_scale:.4g}",
        }
