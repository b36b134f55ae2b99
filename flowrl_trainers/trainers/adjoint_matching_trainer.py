"""Deterministic, truncated adjoint matching for flow models, as reconstructed from the abstract of arXiv 2605.06583.

The sampler with control u on top of the base velocity, in our time direction, v_theta = v_base - u and steps
h_k = sigma_k - sigma_{k+1} > 0:

    (1)  x_{k+1} = x_k - h_k v_theta(x_k, sigma_k),    minimise  E[ sum_k h_k L(u_k) - lambda r(x_N) ]

Its optimum is reached by regressing the control, at states sampled with the current model, onto the best one against
the adjoint g:

    (2)  g_N = lambda grad r(x_N),    g_k = g_{k+1} - h_k J_base(x_k, sigma_k)^T g_{k+1}
    (3)  loss = mean_k mean_d (u_theta(x_k, sigma_k) - grad L*(g_{k+1}))^2

over the last `adjoint_steps` steps k. For the quadratic cost, L = |u|^2 / 2, grad L*(g) = g and the target of v_theta
is v_base - g. The lean adjoint (2) differentiates the frozen base alone (arXiv 2409.08861, section 5.2). The full one
is the gradient of (1):

    (4)  g_k = g_{k+1} - h_k [ J_theta^T (g_{k+1} - grad L(u_k)) + J_base^T grad L(u_k) ]

Papers run t = 1 - sigma with v_paper = -v, where (2) reads a_k = a_{k+1} + h J^T a_{k+1} and the target v_base + a.

With `dynamics="memoryless"`, the stochastic method of arXiv 2409.08861: steps, noise s_k and adjoint g_k of
`flow.MemorylessDynamics`, the last step without noise and with the base velocity, and for the last quarter of the
steps and as many drawn from the earlier ones

    (5)  loss = mean_k min( |(2 / s_k) u_theta - s_k g_{k+1}|^2, clip lambda^2 ) / d

which is (3) with the target gain_k g_{k+1}, gain_k = s_k^2 / 2, and the weight 2 / gain_k.

With `prefix_pool_size`, rollouts take the steps before the window with the base model, from a fixed pool of (prompt,
noise) pairs, so that the states that open the window are drawn once (`PrefixPool`); (1) to (4) hold inside the window.

Only the abstract of 2605.06583 could be read, which names the deterministic control problem, the regression, the
truncation and costs beyond the quadratic one. Our choices: the lean adjoint by default, the pairing of the control at
step k with g_{k+1} (exact for the Euler system; g_k is off by O(h); also in (5), where the paper takes the Jacobian at
the right end of each step), the radial polynomial costs of `flow.control_costs`, no weights over steps in the
regression, the conditional branch alone in (2) to (5) while rollouts are guided, and `control_to_velocity_ratio`.
"""

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from torch import Generator, Tensor, nn

from ..flow import (
    Dynamics,
    MemorylessDynamics,
    OdeDynamics,
    best_control,
    best_rms,
    carry_adjoint,
    control_cost,
    control_cost_gradient,
    expand_like,
    root_mean_square,
    vector_jacobian_product,
)
from ..pipelines import Conditioning
from ..sampling.buffer import MicroBatch, Record
from ..sampling.draws import ImageKey, keyed_generator, keyed_generators, noise
from ..sampling.prefix_pool import PrefixPool
from ..sampling.prompt_groups import Example
from ..sampling.sharding import asks_for_sharding
from .adjoint_matching_config import AdjointMatchingConfig
from .reward_gradient_trainer import RewardGradientTrainer

logger = logging.getLogger(__name__)

SMALLEST_OPENING = 0.05
DYNAMICS: dict[str, Dynamics] = {"ode": OdeDynamics(), "memoryless": MemorylessDynamics()}


@dataclass(frozen=True)
class AdjointMatchingRollout(Record):
    """What a rollout keeps.

    Attributes:
        states: x_k before each of the last K = `adjoint_steps` steps, (B, K, ...).
        final: x_N, (B, ...).
    """

    states: Tensor
    final: Tensor


@dataclass(frozen=True)
class AdjointMatchingRecord(Record):
    """What the loss needs, at T trained steps: all K, or some of them with memoryless dynamics.

    Attributes:
        states: x_k, (B, T, ...).
        sigmas: Their levels, (B, T).
        base_velocities: v_base at the states, (B, T, ...).
        adjoints: g_{k+1}, (B, T, ...).
        gains: The factors on g_{k+1} in the target control, (B, T).
        weights: Of the squared errors, (B, T).
    """

    states: Tensor
    sigmas: Tensor
    base_velocities: Tensor
    adjoints: Tensor
    gains: Tensor
    weights: Tensor


class AdjointMatchingTrainer(RewardGradientTrainer[AdjointMatchingRollout, AdjointMatchingRecord]):
    """Fine-tunes a flow model to raise a differentiable reward, by truncated or by memoryless adjoint matching."""

    _name: ClassVar[str] = "Adjoint Matching"
    _tag_names: ClassVar[list[str]] = ["adjoint-matching"]
    _paper: ClassVar[dict[str, str] | None] = {
        "title": "Improved techniques for fine-tuning flow models via adjoint matching: "
        "a deterministic control pipeline",
        "id": "2605.06583",
        "authors": "Guo, Z. and Sheng, J. and Yao, D. D. and Tang, W.",
        "note": ", as reconstructed from its abstract",
    }
    config_class = AdjointMatchingConfig
    record_class = AdjointMatchingRecord

    args: AdjointMatchingConfig

    def check_arguments(self, args: Any, peft_config: LoraConfig | None) -> None:
        """Raises `ValueError` for a pool of prefixes where processes share the network."""
        super().check_arguments(args, peft_config)
        if args.prefix_pool_size is not None and asks_for_sharding():
            raise ValueError(
                f"`prefix_pool_size` is {args.prefix_pool_size}, but all processes must call a sharded network "
                "together, and one that has its states already would not: leave it out, or take "
                "`--accelerate_config ddp`."
            )

    def set_up(self) -> None:
        """The window of controlled steps; raises `ValueError` if it opens where nothing is left to learn."""
        super().set_up()
        steps, self.window_sigmas = self.args.adjoint_steps, self.sigmas[-self.args.adjoint_steps - 1 :]
        self.dynamics = DYNAMICS[self.args.dynamics]
        self.cost = (self.args.control_cost_order, self.args.control_cost_weight)
        sigma, sigma_next = self.window_sigmas[:-1], self.window_sigmas[1:]
        h = sigma - sigma_next
        self.gains = self.dynamics.gain(sigma, sigma_next)
        hamiltonian = self.args.loss_type == "hamiltonian"
        self.weights = h / h.mean() if hamiltonian else self.dynamics.weight(sigma, sigma_next)
        opening = float(self.window_sigmas[0])
        if opening < SMALLEST_OPENING:
            raise ValueError(
                f"`adjoint_steps` ({steps}) opens its window at sigma {opening:.3f}, below {SMALLEST_OPENING}, where "
                "nothing is left to learn: take more adjoint steps."
            )
        if self.is_world_process_zero():
            number = self.args.num_inference_steps
            logger.info("The last %d of %d steps are tuned: those from noise level %.3f on.", steps, number, opening)
        self.first_controlled = self.args.num_inference_steps - steps
        self.prefixes: PrefixPool | None = None
        if self.args.prefix_pool_size is not None:
            self.prefixes = PrefixPool(self.sampler.pool(), self.args.per_device_train_batch_size, self._prefixes)

    @property
    def num_trained_states(self) -> int:
        """As many as the dynamics train."""
        return len(self.dynamics.trained_steps(self.args.adjoint_steps, Generator()))

    # ---- the rollout -----------------------------------------------------------------------------------------------

    def rollout(self, conditioning: Conditioning, keys: list[ImageKey]) -> AdjointMatchingRollout:
        """Steps with guidance; keeps the states before the last `adjoint_steps` steps, and the final one."""
        if self.prefixes is None:
            x, first = self.initial_latents(keys), 0
        else:
            x, first = self.prefixes.states(keys, self.args.device), self.first_controlled
        walk = self._walk(x, range(first, self.args.num_inference_steps), conditioning, keys)
        *states, final = deque(walk, maxlen=self.args.adjoint_steps + 1)
        return AdjointMatchingRollout(states=torch.stack(states, dim=1), final=final)

    def _prefixes(self, keys: list[ImageKey]) -> Tensor:
        """The states (B, ...) that open the window, as the base model draws them."""
        conditioning = self.condition([self.train_dataset[key] for key in keys])
        with self.model.reference():
            walk = self._walk(self.initial_latents(keys), range(self.first_controlled), conditioning, keys)
            return deque(walk, maxlen=1).pop()

    def _walk(self, x: Tensor, steps: range, conditioning: Conditioning, keys: list[ImageKey]) -> Iterator[Tensor]:
        """The state before the first of some guided steps, and after each of them, (B, ...).

        Args:
            x: (B, ...), the first state.
            steps: Numbers of consecutive sampler steps.
            conditioning: Of B prompts.
            keys: Of the images.
        """
        yield x
        for step in steps:
            sigma, sigma_next = self.sigmas[step], self.sigmas[step + 1]
            level, guided = sigma.expand(len(x)), {"conditioning": conditioning, "guidance": True}
            if self.dynamics.controlled(sigma_next):
                velocity = self.model(x, level, **guided)
            else:
                with self.model.reference():
                    velocity = self.model(x, level, **guided)
            x, std = self.dynamics.step(x, velocity, sigma, sigma_next)
            if std is not None:
                generators = keyed_generators(self.args.seed, keys, f"noise of step {step}")
                x = x + std * noise(generators, x.shape[1:], x.device)
            yield x

    # ---- once per rollout ------------------------------------------------------------------------------------------

    def prepare(self, rollout: list[MicroBatch[AdjointMatchingRollout]]) -> list[MicroBatch[AdjointMatchingRecord]]:
        """Reward gradients and their clipping, the reward scale on the first rollout, the adjoint (2) or (4)."""
        with self.metrics.timed("reward_gradient"):
            rollout, gradients = self._reward_gradients(rollout)
        with self.metrics.timed("adjoint"):
            if self.reward_scale is None:
                self.reward_scale = self._find_reward_scale(rollout, gradients)
            key = ImageKey(
                0, 0, rollout[0].keys[0].rollout
            )  # the trained steps are the same for all images of a rollout
            generator = keyed_generator(self.args.seed, key, "earlier steps")
            trained = self.dynamics.trained_steps(self.args.adjoint_steps, generator)
            terminals = [self.known_scale * gradient for gradient in gradients]
            found = self._adjoints(rollout, terminals, self.args.adjoint)
            batches = [
                batch.with_record(self._record(batch.record.states, adjoints, base, trained)).zero_not_finite()
                for batch, (adjoints, base) in zip(rollout, found, strict=True)
            ]
        self.count_bad_samples("adjoint", ~torch.cat([batch.good for batch in batches]))
        if self.args.adjoint_clip_quantile is not None:
            batches = self._clip_adjoints(batches, self.args.adjoint_clip_quantile)
        self.metrics.note("reward_scale", self.known_scale)
        if self.args.control_cost_weight > 0:
            controls = [self._target_control(batch.record.adjoints, batch.record.gains, 2) for batch in batches]
            self.metrics.note("target_control_rms", math.sqrt(self.mean_square(controls, 2)))
        return batches

    def _reward_gradients(
        self, rollout: list[MicroBatch[AdjointMatchingRollout]]
    ) -> tuple[list[MicroBatch[AdjointMatchingRollout]], list[Tensor]]:
        """The batches, in which images without a gradient are left out, and the clipped gradients (B, ...) of each."""
        final, sizes = torch.cat([batch.record.final for batch in rollout]), [len(batch.examples) for batch in rollout]
        scores, gradient, good = self.reward_gradient(final, [e for batch in rollout for e in batch.examples])
        rollout = [batch.keeping(part) for batch, part in zip(rollout, good.split(sizes), strict=True)]
        self.log_rewards(scores, rollout)
        self.show_samples(final, scores, rollout)
        self.count_bad_samples("reward_gradient", ~torch.cat([batch.good for batch in rollout]))
        threshold = self.clip_threshold(gradient.flatten(1).norm(dim=1))
        return rollout, list(self.clip(gradient, threshold).split(sizes))

    def _record(
        self, states: Tensor, adjoints: Tensor, base_velocities: Tensor, trained: Sequence[int]
    ) -> AdjointMatchingRecord:
        """The record of the trained ones of K steps, (B, K, ...) each."""

        def of_images(table: Tensor) -> Tensor:
            return table[trained].expand(len(states), -1)

        return AdjointMatchingRecord(
            states=states[:, trained],
            sigmas=of_images(self.window_sigmas),
            base_velocities=base_velocities[:, trained],
            adjoints=adjoints[:, trained],
            gains=of_images(self.gains),
            weights=of_images(self.weights),
        )

    def _adjoints(
        self, rollout: list[MicroBatch[AdjointMatchingRollout]], terminals: list[Tensor], kind: str
    ) -> list[tuple[Tensor, ...]]:
        """Of each batch the adjoints g_{k+1} and the base velocities at all K states, (B, K, ...) each.

        Args:
            rollout: Its batches.
            terminals: g_N of each, (B, ...).
            kind: Whose Jacobian carries the adjoint; see `args.adjoint`.
        """
        states, at_once = [batch.record.states for batch in rollout], self.args.products_at_once
        found = self.at_once(partial(self._carried, kind), rollout, states, terminals, images=at_once)
        return [both.unbind(1) for both in found]

    def _carried(self, kind: str, states: Tensor, terminal: Tensor, examples: list[Example]) -> Tensor:
        """Adjoints and base velocities, as above, of states (B, K, ...) with g_N (B, ...), as (B, 2, K, ...)."""
        conditioning, states = self.condition(examples), states.transpose(0, 1)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return self.model(x, sigma, conditioning, guidance=False)

        def full_product(x: Tensor, sigma: Tensor, sigma_next: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
            """The bracket of (4); what is computed with the adapter off is differentiated with it off."""
            with torch.no_grad():
                current = velocity(x, sigma)
            with self.model.reference():
                base_x = x.detach().requires_grad_()
                base = velocity(base_x, sigma)
                pull = control_cost_gradient(base.detach() - current, *self.cost)
                (from_base,) = torch.autograd.grad(base, base_x, grad_outputs=pull)
            from_model, _ = vector_jacobian_product(velocity, x, sigma, g - pull)
            return from_base + from_model, base.detach()

        match kind:
            case "lean":
                with self.model.reference():
                    adjoints, known = self.dynamics.carry(velocity, states, self.window_sigmas, terminal)
            case "full":
                adjoints, known = carry_adjoint(full_product, states, self.window_sigmas, terminal)
            case _:  # "current" meets no base velocity
                adjoints, known = self.dynamics.carry(velocity, states, self.window_sigmas, terminal)[0], states[:0]
        with torch.no_grad(), self.model.reference():
            unknown = zip(states[: len(states) - len(known)], self.window_sigmas, strict=False)
            first = torch.stack([velocity(x, sigma.expand(len(x))) for x, sigma in unknown])
        return torch.stack([adjoints, torch.cat([first, known])], dim=1).transpose(0, 2)

    def _target_control(self, adjoints: Tensor, gains: Tensor, batch_dims: int = 1) -> Tensor:
        """Grad L*(gain g) of adjoints (B, ...) and gains (B,), or of (B, T, ...) and (B, T)."""
        return best_control(expand_like(gains, adjoints) * adjoints, *self.cost, batch_dims=batch_dims)

    def _find_reward_scale(self, rollout: list[MicroBatch[AdjointMatchingRollout]], gradients: list[Tensor]) -> float:
        """The lambda for which RMS(target control) / RMS(v_base) is `control_to_velocity_ratio` on this rollout."""
        self.refuse_zero_gradient(gradients)
        # The lean adjoint is linear in the gradient; at a scale near one it does not underflow in half precision.
        unit = 1 / math.sqrt(self.mean_square(gradients))
        found = self._adjoints(rollout, [unit * gradient for gradient in gradients], "lean")
        wanted = self.args.control_to_velocity_ratio * math.sqrt(self.mean_square([base for _, base in found], 2))
        rms = torch.cat([(root_mean_square(adjoints, 2) * self.gains).flatten() for adjoints, _ in found])
        adjoint = self.accelerator.gather(rms).double()
        adjoint = adjoint[adjoint.isfinite()]
        low, high = -80.0, 80.0  # of log lambda; the control grows with it, so halving the interval finds it
        for _ in range(100):
            middle = (low + high) / 2
            too_large = float(best_rms(adjoint * math.exp(middle), *self.cost).square().mean().sqrt()) > wanted
            low, high = (low, middle) if too_large else (middle, high)
        return unit * math.exp(low)

    def _clip_adjoints(
        self, batches: list[MicroBatch[AdjointMatchingRecord]], quantile: float
    ) -> list[MicroBatch[AdjointMatchingRecord]]:
        """Step by step, scale adjoints down to the quantile of their norms over the images of all processes."""
        adjoints = torch.cat([batch.record.adjoints for batch in batches])
        norms = self.accelerator.gather(adjoints.flatten(2).norm(dim=2))
        good = self.accelerator.gather(torch.cat([batch.good for batch in batches]))
        if not good.any():
            return batches
        thresholds = torch.quantile(norms[good], quantile, dim=0)
        return [
            batch.with_record(replace(batch.record, adjoints=self.clip(batch.record.adjoints, thresholds, 2)))
            for batch in batches
        ]

    # ---- the loss --------------------------------------------------------------------------------------------------

    def micro_batch_losses(
        self, model: nn.Module, batch: MicroBatch[AdjointMatchingRecord], conditioning: Conditioning, state: int
    ) -> Tensor:
        """(3) or (5) at one state, or the Hamiltonian form of (3)."""
        record = batch.record
        x, sigma, g, gain = (t[:, state] for t in (record.states, record.sigmas, record.adjoints, record.gains))
        weight = record.weights[:, state]
        v, v_base = model(x, sigma, conditioning, guidance=False), record.base_velocities[:, state]
        self.note_norm_ratios(v, root_mean_square(v_base), sigma, batch.good)
        u = v_base - v
        if self.args.loss_type == "hamiltonian":
            return 2 * weight * (control_cost(u, *self.cost) - (u * g).flatten(1).mean(dim=1))
        losses = weight * (u - self._target_control(g, gain)).flatten(1).square().mean(dim=1)
        if self.args.dynamics == "ode" or self.args.memoryless_loss_clip is None:
            return losses
        largest = self.args.memoryless_loss_clip * self.known_scale**2 / u[0].numel()
        self.metrics.note("clipped_losses", self.mean_of_good((losses > largest).float(), batch.good))
        return losses.clamp(max=largest)

    # ---- the card --------------------------------------------------------------------------------------------------

    def card_settings(self) -> dict[str, Any]:
        """What the card shows of the method."""
        args = self.args
        opening = float(self.window_sigmas[0])
        pool = {}
        if args.prefix_pool_size is not None:
            pool["rollouts"] = (
                f"from {args.prefix_pool_size} pairs of prompt and noise, by the base model up to sigma {opening:.3f}"
            )
        return {
            "controlled steps": f"{args.adjoint_steps} of {args.num_inference_steps}, from sigma {opening:.3f}",
            "dynamics, adjoint, loss": f"{args.dynamics}, {args.adjoint}, {args.loss_type}",
            "cost": f"order {args.control_cost_order}, weight {args.control_cost_weight:g}",
            **pool,
        } | super().card_settings()
