"""VGG-Flow (arXiv 2512.05116): regress the velocity onto the base velocity plus a value gradient.

The optimal correction of the velocity in the control problem of reward r, weight beta and quadratic cost is a value gradient, which is
modelled as the reward's gradient at the clean estimate, scaled by eta, and a learned residual c. All in velocity units and our time
direction (sigma from 1 to 0, v = noise - data):

    G(x, sigma) = -beta eta(1 - sigma) R + c(x, sigma),    R = grad r at x - sigma v_theta(x, sigma), not through it           (1)
    matching     mean_d (v_theta - [v_base + G])^2                                                                            (2)
    consistency  mean_d ( (G(x - eps [u], sigma - eps) - G(x, sigma)) / eps - [J_base^T G] )^2,    u = v_base + G             (3)
    boundary     mean_d c(x_N, 0)^2                                                                                           (4)
    loss = matching + consistency + alpha boundary

Brackets are not differentiated: the transformer learns from (2) alone, the value network from (3) and (4). v is the guided velocity.
(3) is the paper's equation 12 along the trajectory, where the time derivative and the transport by u are one directional difference.

The paper runs t = 1 - sigma with v_paper = -v; its beta g is our G. Our choices, and why: one directional difference instead of the
paper's equations 43 and 44, which count the transport twice; the transposed Jacobian of equation 12 as a vector-Jacobian product, where
equation 45 takes the Jacobian; the same rule for R at the shifted point; velocity units, in which beta enters through R alone; the
value network reads the prompt, and starts from almost zero with no bias; bins of the steps after the first; what is in brackets, and R at
the shifted point, are computed once per rollout, which is exact at one update per rollout.
"""

import math
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import nn

from ..flow import clean_estimate, euler_step, expand_like, root_mean_square, vector_jacobian_product
from ..networks import value_network
from ..pipelines import Conditioning
from ..sampling.draws import keyed_generator
from ..sampling.micro_batch import MicroBatch
from ..sampling.prompt_groups import Example, ImageKey
from .reward_gradient_trainer import RewardGradientTrainer
from .vgg_flow_config import VGGFlowConfig


class VGGFlowTrainer(RewardGradientTrainer):
    """Fine-tunes a flow model to raise a differentiable reward by value-gradient guidance.

    Args beside those of `FlowRLTrainer`:
        value_network: a module called with latents (B, ...), sigma (B,), prompt features (B, L, D) and their mask (B, L), which returns
            what is added to the value gradient (B, ...), in units of the velocity; None for the one that `args.value_network` names.
    """

    _name: ClassVar[str] = "VGG-Flow"
    _tag_names: ClassVar[list[str]] = ["vgg-flow"]
    _paper: ClassVar[dict[str, str]] = {"title": "Value Gradient Guidance for Flow Matching Alignment", "id": "2512.05116"}
    config_class = VGGFlowConfig
    head_name = "value_network"

    replayed_settings = (
        *RewardGradientTrainer.replayed_settings, "eta_schedule", "timestep_bins", "value_network", "finite_difference_step",
    )  # fmt: skip

    args: VGGFlowConfig

    def __init__(self, *args: Any, value_network: nn.Module | None = None, **kwargs: Any) -> None:
        self.given_network = value_network
        super().__init__(*args, **kwargs)

    def make_head(self) -> nn.Module | None:
        """The value network."""
        if self.given_network is not None or self.args.value_network == "none":
            return self.given_network
        latent = self.initial_latents([ImageKey(0, 0, 0)], "shape")
        features, _ = self.flow.prompt_features(self.condition([self.train_dataset[ImageKey(0, 0, 0)]]))
        return value_network(latent.shape[1:], features.shape[-1])

    def head_learning_rate(self) -> float:
        """`value_network_learning_rate`."""
        return self.args.value_network_learning_rate or self.args.learning_rate

    def set_up(self) -> None:
        """One state per bin."""
        super().set_up()
        self.num_trained_states = self.args.timestep_bins

    def eta(self, sigma: torch.Tensor) -> torch.Tensor:
        """The share of the reward gradient that counts at noise levels sigma, any shape: in [0, 1]."""
        return {"quadratic": (1 - sigma) ** 2, "linear": 1 - sigma, "constant": torch.ones_like(sigma)}[self.args.eta_schedule]

    def drawn_steps(self, keys: list[ImageKey]) -> torch.Tensor:
        """One step of each bin for each image: (B, bins). The first step, at pure noise, is in no bin."""
        edges = torch.linspace(1, self.args.num_inference_steps, self.args.timestep_bins + 1).round().long()
        low, width = edges[:-1], edges.diff()
        draws = [torch.rand(len(low), generator=keyed_generator(self.args.seed, k.row, k.image, k.rollout, "states")) for k in keys]
        return (low + (torch.stack(draws) * width).long()).to(self.args.device)

    def rollout(self, latents: torch.Tensor, conditioning: Conditioning, keys: list[ImageKey]) -> dict[str, torch.Tensor]:
        """Euler steps with guidance; keeps the drawn states, their velocities (B, K, ...) and levels (B, K), and the end (B, ...)."""
        steps = self.drawn_steps(keys)
        kept = latents.new_zeros(len(latents), steps.shape[1], *latents.shape[1:])
        velocities = torch.zeros_like(kept)
        for step, (sigma, sigma_next) in enumerate(pairwise(self.sigmas)):
            velocity = self.model(latents, sigma.expand(len(latents)), conditioning, guidance=True)
            here = expand_like((steps == step).flatten(), kept.flatten(0, 1)).unflatten(0, steps.shape)
            kept = torch.where(here, latents[:, None], kept)
            velocities = torch.where(here, velocity[:, None], velocities)
            latents = euler_step(latents, velocity, sigma, sigma_next)
        return {"latents": kept, "sampled": velocities, "sigmas": self.sigmas[steps], "final": latents}

    def prepare(self, rollout: list[MicroBatch]) -> None:
        """Reward gradients of (1), their clipping and scale, base velocities, and all that (3) needs beside the value network."""
        with self.timed("reward_gradient"):
            self.log_rewards(torch.cat([self.score(batch.tensors["final"], batch.examples) for batch in rollout]))
            for batch in rollout:
                x, v, sigma = (batch.tensors[name].flatten(0, 1) for name in ("latents", "sampled", "sigmas"))
                batch.tensors["gradients"] = self._reward_gradient(clean_estimate(x, v, sigma), batch).unflatten(
                    0, batch.tensors["sigmas"].shape
                )
                del batch.tensors["sampled"]
            norms = torch.cat([batch.tensors["gradients"].flatten(0, 1).flatten(1).norm(dim=1) for batch in rollout])
            threshold = self.clip_threshold(norms)
            for batch in rollout:
                gradients = batch.tensors["gradients"]
                batch.tensors["gradients"] = self.clip(gradients.flatten(0, 1), threshold).unflatten(0, gradients.shape[:2])
        self.count_bad_samples("reward_gradient", ~torch.cat([batch.good for batch in rollout]))
        with self.timed("base"):
            for batch in rollout:
                self._base_velocities(batch)
            if self.reward_scale is None:
                self.reward_scale = self._find_reward_scale(rollout)
            for batch in rollout:
                batch.tensors["pulls"] = self._pull(batch.tensors.pop("gradients"), batch.tensors["sigmas"])
        if self.model.head is not None:
            with self.timed("consistency"):
                for batch in rollout:
                    self._shifted(batch, threshold)
        for batch in rollout:
            batch.leave_out_what_is_not_finite()
        self.count_bad_samples("target", ~torch.cat([batch.good for batch in rollout]))
        self.log_metric("reward_scale", self.reward_scale)
        self.log_metric("target_control_rms", math.sqrt(self.mean_square([batch.tensors["pulls"].flatten(0, 1) for batch in rollout])))

    def _reward_gradient(self, latents: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """R at clean estimates (B * K, ...) of a batch's images, K after one another; what is not finite is zero and marks its image."""
        count = len(latents) // len(batch.examples)
        examples: list[Example] = [e for e in batch.examples for _ in range(count)]
        values, gradient = self.score_with_gradient(latents, examples)
        finite = ~values.isinf().any(dim=1) & gradient.flatten(1).isfinite().all(dim=1)
        batch.good &= finite.unflatten(0, (-1, count)).all(dim=1)
        return torch.where(expand_like(finite, gradient), gradient, 0.0)

    def _pull(self, gradient: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The first term of (1), -beta eta R, of clipped gradients (B, K, ...) at levels (B, K)."""
        factor = -self.known_scale * self.eta(sigma)
        return expand_like(factor.flatten(), gradient.flatten(0, 1)).unflatten(0, sigma.shape) * gradient

    @torch.no_grad()
    def _base_velocities(self, batch: MicroBatch) -> None:
        conditioning = self.condition(batch.examples)
        states = zip(batch.tensors["latents"].unbind(1), batch.tensors["sigmas"].unbind(1), strict=True)
        with self.model.reference():
            batch.tensors["velocities"] = torch.stack([self.model(x, s, conditioning, guidance=True) for x, s in states], dim=1)

    def _find_reward_scale(self, rollout: list[MicroBatch]) -> float:
        """The beta for which RMS(beta eta R) / RMS(base velocity) is `control_to_velocity_ratio` on this rollout."""
        gradients = [batch.tensors["gradients"].flatten(0, 1) for batch in rollout]
        self.refuse_zero_gradient(gradients)
        eta = [expand_like(self.eta(batch.tensors["sigmas"]).flatten(), g) for batch, g in zip(rollout, gradients, strict=True)]
        pull = self.mean_square([e * g for e, g in zip(eta, gradients, strict=True)])
        velocity = self.mean_square([batch.tensors["velocities"].flatten(0, 1) for batch in rollout])
        return self.args.control_to_velocity_ratio * math.sqrt(velocity / pull)

    def _shifted(self, batch: MicroBatch, threshold: torch.Tensor | None) -> None:
        """What (3) needs of every state: the shifted point, its first term of (1), and the product with the base Jacobian."""
        conditioning = self.condition(batch.examples)
        tensors = batch.tensors
        names = ("shifted_latents", "shifted_sigmas", "shifted_pulls", "inverse_steps", "base_terms")
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for state in range(self.num_trained_states):
            x, sigma, base, pull = (tensors[name][:, state] for name in ("latents", "sigmas", "velocities", "pulls"))
            step = sigma.clamp(max=self.args.finite_difference_step)
            with torch.no_grad():
                gradient_of_value = pull + self.model(x, sigma, conditioning, part="head")
                shifted, level = x - expand_like(step, x) * (base + gradient_of_value), sigma - step
                velocity = self.model(shifted, level, conditioning, guidance=True)
            gradient = self.clip(self._reward_gradient(clean_estimate(shifted, velocity, level), batch), threshold)
            with self.model.reference():
                product = vector_jacobian_product(lambda y, s: self.model(y, s, conditioning, guidance=True), x, sigma, gradient_of_value)
            values = (shifted, level, self._pull(gradient[:, None], level[:, None])[:, 0], 1 / step, product)
            for kept, value in zip(parts.values(), values, strict=True):
                kept.append(value)
        tensors |= {name: torch.stack(values, dim=1) for name, values in parts.items()}

    def micro_batch_losses(self, model: nn.Module, batch: MicroBatch, conditioning: Conditioning, state: int) -> torch.Tensor:
        """Matching and consistency at one state; the boundary loss counts once per trajectory, with the last state."""
        x, sigma, base, pull = (batch.tensors[name][:, state] for name in ("latents", "sigmas", "velocities", "pulls"))
        velocity = model(x, sigma, conditioning, guidance=True)
        if self.model.head is None:
            return (velocity - (base + pull)).flatten(1).square().mean(dim=1)
        names = ("shifted_latents", "shifted_sigmas", "shifted_pulls", "inverse_steps", "base_terms")
        shifted, level, shifted_pull, inverse_step, base_term = (batch.tensors[name][:, state] for name in names)
        last = state == self.num_trained_states - 1
        points = [(x, sigma), (shifted, level)] + ([(batch.tensors["final"], torch.zeros_like(sigma))] if last else [])
        repeated = {name: torch.cat([value] * len(points)) for name, value in conditioning.items()}
        residuals = model(torch.cat([p for p, _ in points]), torch.cat([s for _, s in points]), repeated, part="head").chunk(len(points))
        value, shifted_value = pull + residuals[0], shifted_pull + residuals[1]
        matching = (velocity - (base + value.detach())).flatten(1).square().mean(dim=1)
        difference = (shifted_value - value) * expand_like(inverse_step, x)
        consistency = (difference - base_term).flatten(1).square().mean(dim=1)
        self.log_metric("loss/matching", self.mean_of_good(matching, batch.good))
        self.log_metric("loss/consistency", self.mean_of_good(consistency, batch.good))
        if not last:
            return matching + consistency
        boundary = residuals[2].flatten(1).square().mean(dim=1)
        self.log_metric("loss/boundary", self.mean_of_good(boundary, batch.good))
        self.log_metric("residual_rms", self.mean_of_good(root_mean_square(residuals[0]), batch.good))
        # The base takes the mean over states, so what counts once is multiplied by their number.
        return matching + consistency + self.num_trained_states * self.args.boundary_coefficient * boundary

    def card_settings(self) -> dict[str, Any]:
        """What the card shows of the method."""
        args = self.args
        return {
            "eta, states per trajectory": f"{args.eta_schedule}, {args.timestep_bins}",
            "value network": "none" if self.model.head is None else type(self.model.head).__name__,
            "reward scale": "not found yet" if self.reward_scale is None else f"{self.reward_scale:.4g}",
        }
