"""VGG-Flow (arXiv 2512.05116): regress the velocity onto the base velocity plus a value gradient.

The optimal correction of the velocity in the control problem of reward r, weight beta and quadratic cost is a value
gradient, which is modelled as the reward's gradient at the clean estimate, scaled by eta, and a learned residual c.
All in velocity units and our time direction (sigma from 1 to 0, v = noise - data):

    (1)  G(x, sigma) = -beta eta(sigma) R + c(x, sigma),   R = grad r at [x - sigma v_theta(x, sigma)]
    (2)  matching     mean_d (v_theta - [v_base + G])^2
    (3)  consistency  mean_d ( (G(x - eps [u], sigma - eps) - G(x, sigma)) / eps - [J_base^T G] )^2,    u = v_base + G
    (4)  boundary     mean_d c(x_N, 0)^2

    loss = matching + consistency + alpha boundary

Brackets are not differentiated: the transformer learns from (2) alone, the value network from (3) and (4). v is the
guided velocity. (3) is the paper's equation 12 along the trajectory, where the time derivative and the transport by u
are one directional difference.

The paper runs t = 1 - sigma with v_paper = -v; its beta g is our G. Our choices, and why: one directional difference
instead of the paper's equations 43 and 44, which count the transport twice; the transposed Jacobian of equation 12 as
a vector-Jacobian product, where equation 45 takes the Jacobian; the same rule for R at the shifted point; velocity
units, in which beta enters through R alone; the value network reads the prompt, and starts from almost zero with no
bias; bins of the steps after the first; what is in brackets, and R at the shifted point, are computed once per
rollout, which is exact at one update per rollout.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..flow import clean_estimate, euler_steps, expand_like, root_mean_square, vector_jacobian_product
from ..networks import value_network
from ..pipelines import Conditioning
from ..sampling.buffer import MicroBatch, Record
from ..sampling.draws import ImageKey, keyed_generators
from ..sampling.prompt_groups import Example
from .reward_gradient_trainer import RewardGradientTrainer
from .vgg_flow_config import VGGFlowConfig


@dataclass(frozen=True)
class VGGFlowRollout(Record):
    """What a rollout keeps, at K drawn states of each trajectory.

    Attributes:
        states: x, (B, K, ...).
        sigmas: Their levels, (B, K).
        velocities: v_theta at the states, as it was sampled with, (B, K, ...).
        final: x_N, (B, ...).
    """

    states: Tensor
    sigmas: Tensor
    velocities: Tensor
    final: Tensor


@dataclass(frozen=True)
class ConsistencyRecord(Record):
    """What (3) and (4) need beside the value network.

    Attributes:
        states: x - eps u, (B, K, ...).
        sigmas: sigma - eps, (B, K).
        reward_terms: -beta eta R there, (B, K, ...).
        inverse_steps: 1 / eps, (B, K).
        targets: J_base^T G at x, (B, K, ...).
        final: x_N, (B, ...).
    """

    states: Tensor
    sigmas: Tensor
    reward_terms: Tensor
    inverse_steps: Tensor
    targets: Tensor
    final: Tensor


@dataclass(frozen=True)
class VGGFlowRecord(Record):
    """What the loss needs, at K drawn states of each trajectory.

    Attributes:
        states: x, (B, K, ...).
        sigmas: Their levels, (B, K).
        base_velocities: v_base at the states, (B, K, ...).
        reward_terms: -beta eta R, the first term of G in (1), (B, K, ...).
        consistency: What the value network learns from; None without one.
    """

    states: Tensor
    sigmas: Tensor
    base_velocities: Tensor
    reward_terms: Tensor
    consistency: ConsistencyRecord | None


class VGGFlowTrainer(RewardGradientTrainer[VGGFlowRollout, VGGFlowRecord]):
    """Fine-tunes a flow model to raise a differentiable reward by value-gradient guidance.

    Args:
        value_network: Beside the arguments of `FlowRLTrainer`, a module called with latents (B, ...), sigma (B,),
            prompt features (B, L, D) and their mask (B, L), which returns what is added to the value gradient (B,
            ...), in units of the velocity; None for the one that `args.value_network` names.
    """

    _name: ClassVar[str] = "VGG-Flow"
    _tag_names: ClassVar[list[str]] = ["vgg-flow"]
    _paper: ClassVar[dict[str, str] | None] = {
        "title": "Value Gradient Guidance for Flow Matching Alignment",
        "id": "2512.05116",
        "authors": "Liu, Z. and Xiao, T. Z. and Domingo-Enrich, C. and Liu, W. and Zhang, D.",
    }
    config_class = VGGFlowConfig
    record_class = VGGFlowRecord

    args: VGGFlowConfig

    def __init__(self, *args: Any, value_network: nn.Module | None = None, **kwargs: Any) -> None:
        self.given_network = value_network
        super().__init__(*args, **kwargs)

    def check_arguments(self, args: Any, peft_config: LoraConfig | None) -> None:
        """Raises `ValueError` for a value network that is passed where the settings ask for none."""
        super().check_arguments(args, peft_config)
        if self.given_network is not None and args.value_network == "none":
            raise ValueError("`value_network` is passed, but `args.value_network` is 'none': leave out one of them.")

    def make_head(self) -> tuple[str, nn.Module] | None:
        """The value network."""
        if self.args.value_network == "none":
            return None
        latent, width = self.latent_and_prompt_sizes()
        if self.given_network is not None:
            return "value_network", self.tried("value_network", self.given_network, latent)
        return "value_network", value_network(latent, width)

    def head_learning_rate(self) -> float:
        """`value_network_learning_rate`."""
        return self.args.value_network_learning_rate or self.args.learning_rate

    @property
    def num_trained_states(self) -> int:
        """One per bin."""
        return self.args.timestep_bins

    def eta(self, sigma: Tensor) -> Tensor:
        """The share of the reward gradient that counts at noise levels sigma, any shape: in [0, 1]."""
        match self.args.eta_schedule:
            case "quadratic":
                return (1 - sigma) ** 2
            case "linear":
                return 1 - sigma
            case "constant":
                return torch.ones_like(sigma)

    # ---- the rollout -----------------------------------------------------------------------------------------------

    def drawn_steps(self, keys: list[ImageKey]) -> Tensor:
        """One step of each bin for each image: (B, bins). The first step, at pure noise, is in no bin."""
        edges = torch.linspace(1, self.args.num_inference_steps, self.args.timestep_bins + 1).round().long()
        low, width = edges[:-1], edges.diff()
        draws = [torch.rand(len(low), generator=g) for g in keyed_generators(self.args.seed, keys, "states")]
        return (low + (torch.stack(draws) * width).long()).to(self.args.device)

    def rollout(self, conditioning: Conditioning, keys: list[ImageKey]) -> VGGFlowRollout:
        """Euler steps with guidance; keeps the drawn states, their velocities and levels, and the end."""

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return self.model(x, sigma, conditioning, guidance=True)

        steps, latents = self.drawn_steps(keys), self.initial_latents(keys)
        states = latents.new_zeros(len(latents), steps.shape[1], *latents.shape[1:])
        velocities, final = torch.zeros_like(states), latents
        for step, (x, v, x_next) in enumerate(euler_steps(velocity, latents, self.sigmas)):
            here = expand_like(steps == step, states)
            states = torch.where(here, x[:, None], states)
            velocities = torch.where(here, v[:, None], velocities)
            final = x_next
        return VGGFlowRollout(states=states, sigmas=self.sigmas[steps], velocities=velocities, final=final)

    # ---- once per rollout ------------------------------------------------------------------------------------------

    def prepare(self, rollout: list[MicroBatch[VGGFlowRollout]]) -> list[MicroBatch[VGGFlowRecord]]:
        """Reward gradients of (1), their clipping and scale, base velocities, and all that (3) needs beside c."""
        with self.metrics.timed("reward_gradient"), self.placement.network_away():  # once for all micro-batches
            final = torch.cat([batch.record.final for batch in rollout])
            scores = self.scorer.score(final, [example for batch in rollout for example in batch.examples])
            self.log_rewards(scores, rollout)
            self.show_samples(final, scores, rollout)
            estimates = [clean_estimate(b.record.states, b.record.velocities, b.record.sigmas) for b in rollout]
            found = [self._state_gradients(*pair) for pair in zip(estimates, rollout, strict=True)]
            rollout = [batch.keeping(good) for batch, (_, good) in zip(rollout, found, strict=True)]
            gradients = [gradient for gradient, _ in found]
            threshold = self.clip_threshold(torch.cat([g.flatten(2).norm(dim=2).flatten() for g in gradients]))
            gradients = [self.clip(gradient, threshold, batch_dims=2) for gradient in gradients]
        self.count_bad_samples("reward_gradient", ~torch.cat([batch.good for batch in rollout]))
        base_velocities: list[Tensor] = []
        consistency: list[ConsistencyRecord] | list[None] = [None] * len(rollout)
        if self.model.head is None or self.reward_scale is None:
            with self.metrics.timed("base"):
                states = [batch.record.states for batch in rollout]
                sigmas = [batch.record.sigmas for batch in rollout]
                base_velocities = self.at_once(partial(self.base_velocities, guidance=True), rollout, states, sigmas)
                if self.reward_scale is None:
                    self.reward_scale = self._find_reward_scale(rollout, gradients, base_velocities)
        terms = [self._reward_term(g, batch.record.sigmas) for batch, g in zip(rollout, gradients, strict=True)]
        if self.model.head is not None:
            with self.metrics.timed("consistency"):
                base_velocities, consistency, good = self._consistency(rollout, terms, threshold)
            rollout = [batch.keeping(part) for batch, part in zip(rollout, good, strict=True)]
        batches = [
            batch.with_record(
                VGGFlowRecord(
                    states=batch.record.states,
                    sigmas=batch.record.sigmas,
                    base_velocities=base,
                    reward_terms=term,
                    consistency=difference,
                ),
                good=batch.record.final.flatten(1).isfinite().all(dim=1),
            )
            for batch, term, base, difference in zip(rollout, terms, base_velocities, consistency, strict=True)
        ]
        batches = [batch.zero_not_finite() for batch in batches]
        self.count_bad_samples("target", ~torch.cat([batch.good for batch in batches]))
        self.metrics.note("reward_scale", self.known_scale)
        reward_terms = [batch.record.reward_terms for batch in batches]
        self.metrics.note("target_control_rms", math.sqrt(self.mean_square(reward_terms, 2)))
        return batches

    def _state_gradients(self, estimates: Tensor, batch: MicroBatch[VGGFlowRollout]) -> tuple[Tensor, Tensor]:
        """R at clean estimates (B, K, ...) of all states, and which images (B,) are good at all of them."""
        count = estimates.shape[1]
        examples = [example for example in batch.examples for _ in range(count)]
        _, gradient, good = self.reward_gradient(estimates.flatten(0, 1), examples)
        return gradient.unflatten(0, estimates.shape[:2]), good.unflatten(0, estimates.shape[:2]).all(dim=1)

    def _reward_term(self, gradient: Tensor, sigma: Tensor) -> Tensor:
        """-beta eta R of clipped gradients (B, ...) at levels (B,), or of (B, K, ...) at (B, K)."""
        return expand_like(-self.known_scale * self.eta(sigma), gradient) * gradient

    def _find_reward_scale(
        self, rollout: list[MicroBatch[VGGFlowRollout]], gradients: list[Tensor], base_velocities: list[Tensor]
    ) -> float:
        """The beta for which RMS(beta eta R) / RMS(v_base) is `control_to_velocity_ratio` on this rollout.

        Args:
            rollout: Its batches.
            gradients: R of each, (B, K, ...).
            base_velocities: Of each, (B, K, ...).
        """
        self.refuse_zero_gradient([gradient.flatten(0, 1) for gradient in gradients])
        pairs = zip(rollout, gradients, strict=True)
        pull = self.mean_square([expand_like(self.eta(batch.record.sigmas), g) * g for batch, g in pairs], 2)
        return self.args.control_to_velocity_ratio * math.sqrt(self.mean_square(base_velocities, 2) / pull)

    def _consistency(
        self, rollout: list[MicroBatch[VGGFlowRollout]], reward_terms: list[Tensor], threshold: Tensor | None
    ) -> tuple[list[Tensor], list[ConsistencyRecord], list[Tensor]]:
        """What (3) and (4) need of every state, and the base velocities that J_base^T G meets on the way.

        Args:
            rollout: Its batches.
            reward_terms: -beta eta R at their states, (B, K, ...) of each.
            threshold: Of the norms of reward gradients.

        Returns:
            Of each batch v_base at the states (B, K, ...), the record, and which images (B,) are good at all shifted
            points.
        """
        states, sigmas = [b.record.states for b in rollout], [b.record.sigmas for b in rollout]
        ask_head = partial(self.velocities, guidance=True, part="head")
        residuals = self.at_once(ask_head, rollout, states, sigmas)
        G = [term + c for term, c in zip(reward_terms, residuals, strict=True)]
        products = self.at_once(self._products, rollout, states, sigmas, G, images=self.args.products_at_once)
        targets, base = zip(*(both.unbind(1) for both in products), strict=True)
        eps = [sigma.clamp(max=self.args.finite_difference_step) for sigma in sigmas]
        shifted = [x - expand_like(e, x) * (v_base + g) for x, e, v_base, g in zip(states, eps, base, G, strict=True)]
        levels = [sigma - e for sigma, e in zip(sigmas, eps, strict=True)]
        velocities = self.at_once(partial(self.velocities, guidance=True), rollout, shifted, levels)
        records, good = [], []
        with self.placement.network_away():
            estimates = [clean_estimate(*columns) for columns in zip(shifted, velocities, levels, strict=True)]
            found = [self._state_gradients(*pair) for pair in zip(estimates, rollout, strict=True)]
        for number, (batch, (gradient, finite)) in enumerate(zip(rollout, found, strict=True)):
            x, sigma = shifted[number], levels[number]
            good.append(batch.good & finite)
            records.append(
                ConsistencyRecord(
                    states=x,
                    sigmas=sigma,
                    reward_terms=self._reward_term(self.clip(gradient, threshold, batch_dims=2), sigma),
                    inverse_steps=1 / eps[number],
                    targets=targets[number],
                    final=batch.record.final,
                )
            )
        return list(base), records, good

    def _products(self, states: Tensor, sigmas: Tensor, G: Tensor, examples: list[Example]) -> Tensor:
        """J_base^T G and v_base at states (B, K, ...) of B images and their levels (B, K), as (B, 2, K, ...).

        Args:
            states: (B, K, ...).
            sigmas: (B, K).
            G: (B, K, ...).
            examples: B of them.
        """
        conditioning = self.condition(examples)

        def guided(x: Tensor, sigma: Tensor) -> Tensor:
            return self.model(x, sigma, conditioning, guidance=True)

        with self.model.reference():
            columns = zip(states.unbind(1), sigmas.unbind(1), G.unbind(1), strict=True)
            found = [torch.stack(vector_jacobian_product(guided, *column), dim=1) for column in columns]
        return torch.stack(found, dim=2)

    # ---- the loss --------------------------------------------------------------------------------------------------

    def micro_batch_losses(
        self, model: nn.Module, batch: MicroBatch[VGGFlowRecord], conditioning: Conditioning, state: int
    ) -> Tensor:
        """Matching and consistency at one state; the boundary loss counts once per trajectory, with the last state."""
        record, eps_record = batch.record, batch.record.consistency
        x, sigma = record.states[:, state], record.sigmas[:, state]
        v = model(x, sigma, conditioning, guidance=True)
        v_base, reward_term = record.base_velocities[:, state], record.reward_terms[:, state]
        self.note_norm_ratios(v, root_mean_square(v_base), sigma, batch.good)
        if eps_record is None:
            return (v - (v_base + reward_term)).flatten(1).square().mean(dim=1)

        last = state == self.num_trained_states - 1
        points = [(x, sigma), (eps_record.states[:, state], eps_record.sigmas[:, state])]
        points += [(eps_record.final, torch.zeros_like(sigma))] if last else []
        latents, levels = torch.cat([p for p, _ in points]), torch.cat([s for _, s in points])
        repeated = {name: torch.cat([value] * len(points)) for name, value in conditioning.items()}
        c, c_eps, *c_final = model(latents, levels, repeated, guidance=True, part="head").chunk(len(points))
        G, G_eps = reward_term + c, eps_record.reward_terms[:, state] + c_eps
        matching = (v - (v_base + G.detach())).flatten(1).square().mean(dim=1)
        difference = (G_eps - G) * expand_like(eps_record.inverse_steps[:, state], x)
        consistency = (difference - eps_record.targets[:, state]).flatten(1).square().mean(dim=1)
        self.metrics.note("loss/matching", self.mean_of_good(matching, batch.good))
        self.metrics.note("loss/consistency", self.mean_of_good(consistency, batch.good))
        if not last:
            return matching + consistency
        boundary = c_final[0].flatten(1).square().mean(dim=1)
        self.metrics.note("loss/boundary", self.mean_of_good(boundary, batch.good))
        self.metrics.note("residual_rms", self.mean_of_good(root_mean_square(c), batch.good))
        # The base takes the mean over states, so what counts once is multiplied by their number.
        return matching + consistency + self.num_trained_states * self.args.boundary_coefficient * boundary

    # ---- the card --------------------------------------------------------------------------------------------------

    def card_settings(self) -> dict[str, Any]:
        """What the card shows of the method."""
        args, head = self.args, self.model.head
        return {
            "eta, states per trajectory": f"{args.eta_schedule}, {args.timestep_bins}",
            "value network": "none" if head is None else type(head).__name__,
        } | super().card_settings()
