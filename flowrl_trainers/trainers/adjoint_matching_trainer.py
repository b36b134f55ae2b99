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

With `dynamics="memoryless"`, the stochastic method of arXiv 2409.08861: steps and noise s_k of `flow.memoryless`, the last step without
noise and with the base velocity, and for the last quarter of the steps and as many drawn from the earlier ones

    g_k of `flow.memoryless_adjoint`,    loss = mean_k min( |(2 / s_k) u_theta - s_k g_{k+1}|^2, clip lambda^2 ) / d              (5)

which is (3) with the target s_k^2 / 2 g_{k+1} and the weight 4 / s_k^2.

Only the abstract of 2605.06583 could be read, which names the deterministic control problem, the regression, the truncation and costs
beyond the quadratic one. Our choices: the lean adjoint by default, the pairing of the control at step k with g_{k+1} (exact for the Euler
system; g_k is off by O(h); also in (5), where the paper takes the Jacobian at the right end of each step), the radial polynomial costs of
`flow.control_costs`, no weights over steps in the regression, the conditional branch alone in (2) to (5) while rollouts are guided, and
`control_to_velocity_ratio`.
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
    memoryless_adjoint,
    memoryless_step,
    memoryless_variance,
    root_mean_square,
    vector_jacobian_product,
)
from ..pipelines import Conditioning
from ..sampling.draws import keyed_generator
from ..sampling.micro_batch import MicroBatch
from ..sampling.prompt_groups import ImageKey
from .adjoint_matching_config import AdjointMatchingConfig
from .reward_gradient_trainer import RewardGradientTrainer

logger = logging.getLogger(__name__)

SMALLEST_OPENING = 0.05
LATE_SHARE = 4  # with memoryless dynamics, the last quarter of the steps is always trained


class AdjointMatchingTrainer(RewardGradientTrainer):
    """Fine-tunes a flow model to raise a differentiable reward by adjoint matching, deterministic and truncated or memoryless."""

    _name: ClassVar[str] = "Adjoint Matching"
    _tag_names: ClassVar[list[str]] = ["adjoint-matching"]
    _paper: ClassVar[dict[str, str]] = {
        "title": "Improved techniques for fine-tuning flow models via adjoint matching: a deterministic control pipeline",
        "id": "2605.06583",
        "note": ", as reconstructed from its abstract",
    }
    config_class = AdjointMatchingConfig

    replayed_settings = (
        *RewardGradientTrainer.replayed_settings, "adjoint_steps", "adjoint", "control_cost_order", "control_cost_weight", "dynamics",
        "adjoint_clip_quantile",
    )  # fmt: skip

    args: AdjointMatchingConfig

    def set_up(self) -> None:
        """The window of controlled steps; raises `ValueError` if it opens where nothing is left to learn."""
        super().set_up()
        steps, self.window_sigmas = self.args.adjoint_steps, self.sigmas[-self.args.adjoint_steps - 1 :]
        self.memoryless = self.args.dynamics == "memoryless"
        self.cost = (self.args.control_cost_order, self.args.control_cost_weight)
        late = min(steps, -(-steps // LATE_SHARE))
        self.num_trained_states = min(2 * late, steps) if self.memoryless else steps
        sigma, sigma_next = self.window_sigmas[:-1], self.window_sigmas[1:]
        h = sigma - sigma_next
        # Of every step: the factor on g in the target, and the weight of the loss.
        self.gains = memoryless_variance(sigma, sigma_next) / 2 if self.memoryless else torch.ones_like(h)
        self.weights = 2 / self.gains if self.memoryless else h / h.mean() if self.args.loss_type == "hamiltonian" else torch.ones_like(h)
        opening = float(self.window_sigmas[0])
        if opening < SMALLEST_OPENING:
            raise ValueError(
                f"`adjoint_steps` ({steps}) opens its window at sigma {opening:.3f}, below {SMALLEST_OPENING}, where nothing is left to "
                "learn: take more adjoint steps."
            )
        if self.is_world_process_zero():
            logger.info("The window of %d of %d steps opens at sigma %.3f.", steps, self.args.num_inference_steps, opening)

    def rollout(self, latents: torch.Tensor, conditioning: Conditioning, keys: list[ImageKey]) -> dict[str, torch.Tensor]:
        """Steps with guidance; keeps the states before the last `adjoint_steps` steps (B, K, ...) and the final one (B, ...)."""
        kept: list[torch.Tensor] = []
        for step, (sigma, sigma_next) in enumerate(pairwise(self.sigmas)):
            kept = [*kept, latents][-self.args.adjoint_steps :]
            latents = self._step(latents, sigma, sigma_next, conditioning, keys, step)
        return {"latents": torch.stack(kept, dim=1), "final": latents}

    def _step(
        self, x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, conditioning: Conditioning, keys: list[ImageKey], step: int
    ) -> torch.Tensor:
        """One step of the dynamics; the last memoryless one has no noise, which would spoil the reward's gradient, and no control."""
        if self.memoryless and sigma_next == 0:
            with self.model.reference():
                velocity = self.model(x, sigma.expand(len(x)), conditioning, guidance=True)
            return euler_step(x, velocity, sigma, sigma_next)
        velocity = self.model(x, sigma.expand(len(x)), conditioning, guidance=True)
        if not self.memoryless:
            return euler_step(x, velocity, sigma, sigma_next)
        mean, std = memoryless_step(x, velocity, sigma, sigma_next)
        generators = [keyed_generator(self.args.seed, k.row, k.image, k.rollout, f"noise of step {step}") for k in keys]
        return mean + std * torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x.device)

    def prepare(self, rollout: list[MicroBatch]) -> None:
        """Reward gradients and their clipping, the adjoint (2), (4) or (5), base velocities and, on the first rollout, the reward scale."""
        with self.timed("reward_gradient"):
            self._reward_gradients(rollout)
        with self.timed("adjoint"):
            if self.reward_scale is None:
                self.reward_scale = self._find_reward_scale(rollout)
            states = self._trained_steps(rollout[0].examples[0].key.rollout)
            for batch in rollout:
                batch.tensors["adjoints"] = self._adjoints(batch, self.args.adjoint, self.reward_scale)
                del batch.tensors["reward_gradient"]
                for name in ("latents", "velocities", "adjoints"):
                    batch.tensors[name] = batch.tensors[name][:, states]
                for name, table in (("sigmas", self.window_sigmas), ("gains", self.gains), ("weights", self.weights)):
                    batch.tensors[name] = table[states].expand(len(batch.examples), -1)
                batch.leave_out_what_is_not_finite()
        self.count_bad_samples("adjoint", ~torch.cat([batch.good for batch in rollout]))
        if self.args.adjoint_clip_quantile is not None:
            self._clip_adjoints(rollout, self.args.adjoint_clip_quantile)
        self.log_metric("reward_scale", self.reward_scale)
        if self.args.control_cost_weight > 0:
            controls = [self._target_control(batch.tensors["adjoints"], batch.tensors["gains"]).flatten(0, 1) for batch in rollout]
            self.log_metric("target_control_rms", math.sqrt(self.mean_square(controls)))

    def _trained_steps(self, rollout: int) -> list[int]:
        """The numbers, within the window, of the steps whose loss is taken; the same for all images of a rollout."""
        steps = self.args.adjoint_steps
        if not self.memoryless:
            return list(range(steps))
        late = -(-steps // LATE_SHARE)
        generator = keyed_generator(self.args.seed, 0, 0, rollout, "earlier steps")
        earlier = torch.randperm(steps - late, generator=generator)[: self.num_trained_states - late]
        return [*sorted(earlier.tolist()), *range(steps - late, steps)]

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
        threshold = self.clip_threshold(torch.cat([batch.tensors["reward_gradient"].flatten(1).norm(dim=1) for batch in rollout]))
        for batch in rollout:
            batch.tensors["reward_gradient"] = self.clip(batch.tensors["reward_gradient"], threshold)

    def _clip_adjoints(self, rollout: list[MicroBatch], quantile: float) -> None:
        """Step by step, scale adjoints down to the quantile of their norms over the images of all processes."""
        adjoints = torch.cat([batch.tensors["adjoints"] for batch in rollout])
        norms, good = (
            self.accelerator.gather(adjoints.flatten(2).norm(dim=2)),
            self.accelerator.gather(torch.cat([b.good for b in rollout])),
        )
        if not good.any():
            return
        thresholds = torch.quantile(norms[good], quantile, dim=0)
        for batch in rollout:
            columns = zip(batch.tensors["adjoints"].unbind(dim=1), thresholds, strict=True)
            batch.tensors["adjoints"] = torch.stack([self.clip(adjoint, threshold) for adjoint, threshold in columns], dim=1)

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

        def full_product(x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
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
                carry = memoryless_adjoint if self.memoryless else lean_adjoint
                with self.model.reference():
                    adjoints = carry(base_velocity, latents, self.window_sigmas, terminal)
            case "current":
                adjoints = lean_adjoint(velocity, latents, self.window_sigmas, terminal)
            case _:
                adjoints = carry_adjoint(full_product, latents, self.window_sigmas, terminal)
        with torch.no_grad(), self.model.reference():
            for k in reversed(range(len(latents) - len(seen))):  # the states that needed no product of the base
                base_velocity(latents[k], self.window_sigmas[k].expand(len(latents[k])))
        batch.tensors["velocities"] = torch.stack(seen[::-1], dim=1)
        return adjoints.transpose(0, 1)

    def _target_control(self, adjoints: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
        """Grad L* of adjoints (B, K, ...) times gains (B, K), latent by latent."""
        scaled = adjoints.flatten(0, 1) * expand_like(gains.flatten(), adjoints.flatten(0, 1))
        return best_control(scaled, *self.cost).reshape(adjoints.shape)

    def _find_reward_scale(self, rollout: list[MicroBatch]) -> float:
        """The lambda for which RMS(target control) / RMS(base velocity) is `control_to_velocity_ratio` on this rollout."""
        gradients = [batch.tensors["reward_gradient"] for batch in rollout]
        self.refuse_zero_gradient(gradients)
        # The lean adjoint is linear in the gradient; at a scale near one it does not underflow in half precision.
        unit = 1 / math.sqrt(self.mean_square(gradients))
        found = [(self._adjoints(batch, "lean", unit), batch.tensors["velocities"]) for batch in rollout]
        wanted = self.args.control_to_velocity_ratio * math.sqrt(self.mean_square([v.flatten(0, 1) for _, v in found]))
        rms = torch.cat([root_mean_square(a.flatten(0, 1)) * self.gains.repeat(len(a)) for a, _ in found])
        adjoint = self.accelerator.gather(rms).double()
        adjoint = adjoint[adjoint.isfinite()]
        low, high = -80.0, 80.0  # of log lambda; the control grows with it, so halving the interval finds it
        for _ in range(100):
            middle = (low + high) / 2
            too_large = float(best_rms(adjoint * math.exp(middle), *self.cost).square().mean().sqrt()) > wanted
            low, high = (low, middle) if too_large else (middle, high)
        return unit * math.exp(low)

    def micro_batch_losses(self, model: nn.Module, batch: MicroBatch, conditioning: Conditioning, state: int) -> torch.Tensor:
        """(3) or (5) at one state, or the Hamiltonian form of (3)."""
        names = ("latents", "velocities", "adjoints", "sigmas", "gains", "weights")
        latents, base, adjoint, sigma, gain, weight = (batch.tensors[name][:, state] for name in names)
        control = base - model(latents, sigma, conditioning)
        if self.args.loss_type == "hamiltonian":
            return 2 * weight * (control_cost(control, *self.cost) - (control * adjoint).flatten(1).mean(dim=1))
        losses = weight * (control - best_control(expand_like(gain, adjoint) * adjoint, *self.cost)).flatten(1).square().mean(dim=1)
        if not self.memoryless or self.args.memoryless_loss_clip is None:
            return losses
        largest = self.args.memoryless_loss_clip * self.known_scale**2 / control[0].numel()
        self.log_metric("clipped_losses", self.mean_of_good((losses > largest).float(), batch.good))
        return losses.clamp(max=largest)

    def card_settings(self) -> dict[str, Any]:
        """What the card shows of the method."""
        args = self.args
        return {
            "controlled steps": f"{args.adjoint_steps} of {args.num_inference_steps}, from sigma {float(self.window_sigmas[0]):.3f}",
            "dynamics, adjoint, loss": f"{args.dynamics}, {args.adjoint}, {args.loss_type}",
            "cost": f"order {args.control_cost_order}, weight {args.control_cost_weight:g}",
            "reward scale": "not found yet" if self.reward_scale is None else f"{self.reward_scale:.4g}",
        }
