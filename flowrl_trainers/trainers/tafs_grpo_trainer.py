"""TAFS-GRPO (arXiv 2602.01591, as reconstructed from its abstract): GRPO on a few-step sampler that re-noises.

With N levels 1 = sigma_0 > ... > sigma_N = 0, `s = sigma_k`, `s' = sigma_{k+1}`, and the velocity v at (x_k, s):

    (1)  x0_k = x_k - s v,    noise_k = x_k + (1 - s) v
    (2)  mean_k = (1 - s') x0_k + s' cos(pi eta / 2) noise_k,    std_k = s' sin(pi eta / 2)
    (3)  x_{k+1} = mean_k + std_k e_k    for k < N - 1; the last x0 is delivered
    (4)  A_k = credit of the rewards R_j of the clean estimates x0_j, j > k, compared within the prompt
    (5)  ratio_k = p_theta(x_{k+1} | x_k) / p_rollout(x_{k+1} | x_k)
    (6)  loss_k = max( -A_k ratio_k, -A_k clip(ratio_k, 1 - epsilon, 1 + epsilon) )
                  + beta mean_d (mean_k - mean_k^base)^2 / (2 std_k^2)

The credit of (4) is `flow.step_advantages`. Draw k is credited with rewards of step k + 1 or later: x0_k was settled
before e_k was drawn, and its expected policy gradient is zero. The second term of (6) is the exact KL divergence, as
both Gaussians have the same variance.

Only the abstract and the first lines of 2602.01591 could be read. They name: a few-step sampler that takes the result
of a one-step sample, adds noise that adapts to time, and repeats; rewards for each step that need no gradient,
integrated into the advantage step by step; and GRPO. All else is our choice: (2) with eta = 1 as the sampler, a
uniform grid through the pipeline's own shift, the credit rules, the last step without noise, the clipped objective and
the KL divergence of the Flow-GRPO family, the noise that a prompt's images share. Rewards of clean estimates were
credited step by step before, by SDPO (arXiv 2411.11727), whose credit of a draw has the reward of its own step in it.
`kernel="precise"` puts `flow.precise_step` (arXiv 2605.23522) in the place of (2). Flow-GRPO (arXiv 2505.05470) is
`kernel="flow_grpo"` with `credit_rule="final"`, but for its last step, which here draws no noise.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from torch import Generator, Tensor, nn

from ..flow import (
    clean_estimate,
    flow_grpo_step,
    log_probability,
    precise_step,
    renoise,
    root_mean_square,
    step_advantages,
)
from ..pipelines import Conditioning
from ..sampling.buffer import MicroBatch, Record
from ..sampling.draws import ImageKey, keyed_generators, noise
from ..sampling.evaluator import Sampler, ode_sampler
from ..sampling.flow_model import FlowModel
from ..sampling.prompt_groups import Example
from .base_config import FlowRLConfig
from .base_trainer import FlowRLTrainer
from .tafs_grpo_config import TAFSGRPOConfig

logger = logging.getLogger(__name__)

KERNELS = {"renoise": renoise, "precise": precise_step, "flow_grpo": flow_grpo_step}
LEAST_LEVEL = 0.05  # below it, the factor (1 - s') / s' of the Gaussian score drowns everything else
NO_ADVANTAGE = 1e-3  # rewards of equal pictures may differ by a rounding
SAME_RATIO = 1e-6  # of two float32 computations of one thing
SAME_RATIO_IN_HALF_PRECISION = 1e-3

StepVelocity = Callable[[Tensor, Tensor, int], Tensor]
"""Maps latents (B, ...), levels (B,) and the number of the step to a velocity (B, ...)."""


@dataclass(frozen=True)
class TAFSGRPORollout(Record):
    """What a rollout of N steps keeps.

    Attributes:
        states: x_k, (B, N, ...).
        estimates: x0_k, (B, N, ...).
        log_probabilities: Of the draws, (B, N - 1).
    """

    states: Tensor
    estimates: Tensor
    log_probabilities: Tensor


@dataclass(frozen=True)
class TAFSGRPORecord(Record):
    """What the loss needs of N - 1 draws.

    Attributes:
        states: x_k, (B, N, ...).
        log_probabilities: log p_rollout(x_{k+1} | x_k), (B, N - 1).
        advantages: A_k, (B, N - 1).
        base_velocities: v_base at x_k, (B, N - 1, ...); None where nothing is compared with the base.
    """

    states: Tensor
    log_probabilities: Tensor
    advantages: Tensor
    base_velocities: Tensor | None


class TAFSGRPOTrainer(FlowRLTrainer[TAFSGRPORollout, TAFSGRPORecord]):
    """Makes a flow model a good few-step generator under any reward, by GRPO on the draws of its sampler."""

    _name: ClassVar[str] = "TAFS-GRPO"
    _tag_names: ClassVar[list[str]] = ["tafs-grpo"]
    _paper: ClassVar[dict[str, str] | None] = {
        "title": "Know Your Step: Faster and Better Alignment for Flow Matching Models via Step-aware Advantages",
        "id": "2602.01591",
        "authors": "Yue, Z. and Ni, Z. and Ye, F. and Zhang, J. and Shen, S. and Mi, Z.",
        "note": ", as reconstructed from its abstract",
    }
    config_class = TAFSGRPOConfig
    record_class = TAFSGRPORecord
    replays_rollout = True

    args: TAFSGRPOConfig

    def check_arguments(self, args: FlowRLConfig, peft_config: LoraConfig | None) -> None:
        """Raises `ValueError` for dropout, and for branches of guidance in one call."""
        super().check_arguments(args, peft_config)
        _refuse_what_cannot_be_replayed(bool(args.guidance_in_one_call), peft_config)

    def set_up(self) -> None:
        """The sampler's own grid; raises `ValueError` for dropout, and for a last draw too small to learn from."""
        steps = self.args.num_inference_steps
        self.sigmas = self.flow.sigmas(steps, spacing="uniform").to(self.args.device)
        last = float(self.sigmas[-2])
        if last < LEAST_LEVEL:
            raise ValueError(
                f"`num_inference_steps` ({steps}) ends with a draw at sigma {last:.3f}, below {LEAST_LEVEL}, where "
                "ratios explode: take fewer steps."
            )
        _refuse_what_cannot_be_replayed(self.flow.guidance_in_one_call, self.peft_config)
        in_float32 = all(p.dtype == torch.float32 for p in self.model.transformer.parameters())
        self.exact = self.args.mixed_precision == "no" and in_float32
        # Squares of the distance to the base, and of the base, that the present rollout has shown.
        self.moved = torch.zeros(2, device=self.args.device)
        self.velocity_distance: Tensor | None = None
        logger.info("The sampler's levels: %s.", ", ".join(f"{level:.3f}" for level in self.sigmas.tolist()))

    @property
    def num_trained_states(self) -> int:
        """One per draw."""
        return self.args.num_inference_steps - 1

    # ---- the sampler -----------------------------------------------------------------------------------------------

    def rollout(self, conditioning: Conditioning, keys: list[ImageKey]) -> TAFSGRPORollout:
        """(1) to (3); the images of a prompt may start from the noise of its first one."""
        shared = [ImageKey(k.row, 0, k.rollout) for k in keys] if self.args.share_initial_noise else keys

        def velocity(x: Tensor, sigma: Tensor, step: int) -> Tensor:
            return self._velocity(self.model, x, sigma, conditioning, step, keys)

        generators = keyed_generators(self.args.seed, keys, "step noise")
        return self._sample(velocity, self.initial_latents(shared), generators)

    def _sample(self, velocity: StepVelocity, x: Tensor, generators: list[Generator]) -> TAFSGRPORollout:
        """States, clean estimates and log-probabilities from initial latents x (B, ...); generators: one per image."""
        estimates, states, log_probabilities = [], [x], []
        for step, sigma in enumerate(self.sigmas[:-1]):
            level = sigma.expand(len(x))
            v = velocity(x, level, step)
            estimates.append(clean_estimate(x, v, level))
            if step == self.num_trained_states:
                break
            mean, std = self._step(x, v, step)
            x = mean + std * noise(generators, x.shape[1:], x.device)
            states.append(x)
            log_probabilities.append(log_probability(x, mean, std, self.args.log_prob_form))
        return TAFSGRPORollout(
            states=torch.stack(states, dim=1),
            estimates=torch.stack(estimates, dim=1),
            log_probabilities=torch.stack(log_probabilities, dim=1),
        )

    def _step(self, x: Tensor, velocity: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(2): mean (B, ...) and standard deviation (B, 1, ...)."""
        sigma, sigma_next = (level.expand(len(x)) for level in self.sigmas[step : step + 2])
        return KERNELS[self.args.kernel](x, velocity, sigma, sigma_next, self.args.eta)

    def _velocity(
        self, model: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning, step: int, keys: list[ImageKey]
    ) -> Tensor:
        """The velocity (B, ...); computed once per prompt where its images still are at their common initial noise.

        Args:
            model: The trained one, as Trainer wrapped it.
            x: (B, ...).
            sigma: (B,).
            conditioning: Of B prompts.
            step: The number of the step.
            keys: B of them.
        """
        if step > 0 or not self.args.share_initial_noise:
            return model(x, sigma, conditioning, guidance=True)
        rows = [key.row for key in keys]
        prompts = list(dict.fromkeys(rows))
        first = torch.tensor([rows.index(row) for row in prompts], device=x.device)
        member = torch.tensor([prompts.index(row) for row in rows], device=x.device)
        once = {name: value[first] for name, value in conditioning.items()}
        return model(x[first], sigma[first], once, guidance=True)[member]

    def evaluation_samplers(self) -> dict[str, Sampler]:
        """The trained sampler, and beside it the ODE with `ode_num_inference_steps`."""
        sigmas = self.flow.sigmas(self.args.ode_num_inference_steps).to(self.args.device)
        return {"": self._trained_sampler, "ode": ode_sampler(sigmas)}

    def _trained_sampler(
        self, model: FlowModel, latents: Tensor, conditioning: Conditioning, generators: list[Generator]
    ) -> Tensor:
        def velocity(x: Tensor, sigma: Tensor, step: int) -> Tensor:
            return model(x, sigma, conditioning, guidance=True)

        return self._sample(velocity, latents, generators).estimates[:, -1]

    def sampler_settings(self) -> dict[str, Any]:
        """Of the noise of the trained sampler."""
        return {"kernel": self.args.kernel, "eta": self.args.eta, "sigmas": self.sigmas.tolist()}

    # ---- rewards and advantages ------------------------------------------------------------------------------------

    def prepare(self, rollout: list[MicroBatch[TAFSGRPORollout]]) -> list[MicroBatch[TAFSGRPORecord]]:
        """(4), and the base model's velocities where they are needed."""
        with self.metrics.timed("rewards"), self.placement.network_away():  # once for all micro-batches
            at_once = [rollout] if self.scorer.compares else [[batch] for batch in rollout]
            scores = torch.cat([self._score_steps(batches) for batches in at_once])
        self.log_rewards(scores[:, -1], rollout)
        self.show_samples(torch.cat([batch.record.estimates[:, -1] for batch in rollout]), scores[:, -1], rollout)
        bad, absent = scores.isinf().any(dim=2).any(dim=1), scores[:, -1].isnan().all(dim=1)
        rows = self.prompt_rows(rollout)
        advantages = self._advantages(torch.where(scores.isinf(), torch.nan, scores), rows)
        sizes = [len(batch.examples) for batch in rollout]
        parts = zip(rollout, advantages.split(sizes), (~(bad | absent)).split(sizes), strict=True)
        base_velocities: list[Tensor] | list[None] = [None] * len(rollout)
        if self.args.compares_with_base:
            base_velocities = self.at_once(self._base_velocities, rollout, [batch.record.states for batch in rollout])
        batches = [
            self._finite(
                batch.with_record(
                    TAFSGRPORecord(
                        states=batch.record.states,
                        log_probabilities=batch.record.log_probabilities,
                        advantages=part,
                        base_velocities=base,
                    ),
                    good,
                )
            )
            for (batch, part, good), base in zip(parts, base_velocities, strict=True)
        ]
        self.count_bad_samples("reward", bad)
        self.moved = torch.zeros(2, device=self.args.device)
        return batches

    @staticmethod
    def _finite(batch: MicroBatch[TAFSGRPORecord]) -> MicroBatch[TAFSGRPORecord]:
        """`zero_not_finite` but for the first states: a group may share the call of an image that is left out."""
        states = batch.record.states
        batch = batch.zero_not_finite()
        first_kept = torch.cat([states[:, :1], batch.record.states[:, 1:]], dim=1)
        return batch.with_record(replace(batch.record, states=first_kept))

    def _score_steps(self, batches: list[MicroBatch[TAFSGRPORollout]]) -> Tensor:
        """Scores (B, N, number of rewards) of the clean estimates that the credit rule asks for; NaN elsewhere."""
        estimates = torch.cat([batch.record.estimates for batch in batches])
        steps = estimates.shape[1]
        first = {"final": steps - 1, "gain": 0}.get(self.args.credit_rule, 1)
        scores = torch.full((len(estimates), steps, len(self.rewards)), torch.nan, device=estimates.device)
        examples = [example for batch in batches for example in batch.examples for _ in range(first, steps)]
        found = self.scorer.score(estimates[:, first:].flatten(0, 1), examples)
        scores[:, first:] = found.unflatten(0, (-1, steps - first))
        scores[~estimates.flatten(1).isfinite().all(dim=1)] = torch.inf  # a fault, whatever a reward made of it
        return scores

    def _advantages(self, scores: Tensor, rows: Tensor) -> Tensor:
        """A (B, N - 1) of this process's images, compared with those of all processes.

        Args:
            scores: (B, N, number of rewards), NaN where there is none.
            rows: (B,), those of the prompts.
        """
        args = self.args
        everyone, groups = self.accelerator.gather(scores), self.accelerator.gather(rows)
        self._log_steps(everyone)
        separate = [
            step_advantages(
                column, groups, args.credit_rule, args.scale_rewards, args.credit_mix, args.credit_discount
            )
            for column in everyone.unbind(dim=2)
        ]
        advantages = (torch.stack(separate, dim=2) * self.reward_weights).sum(dim=2)
        advantages = advantages.clamp(-args.advantage_clip, args.advantage_clip)
        self.metrics.note("zero_advantage_share", (advantages.abs() < NO_ADVANTAGE).all(dim=1).float().mean())
        return advantages[args.process_index * len(scores) :][: len(scores)]

    def _log_steps(self, scores: Tensor) -> None:
        for step, column in enumerate(scores.unbind(dim=1)):
            for reward, values in zip(self.rewards, column.unbind(dim=1), strict=True):
                if values.isfinite().any():
                    self.metrics.note(f"reward_of_step_{step}/{reward.name}", values.nanmean())

    @torch.no_grad()
    def _base_velocities(self, states: Tensor, examples: list[Example]) -> Tensor:
        """(B, N - 1, ...) at the states (B, N, ...) of the rollout."""
        conditioning, keys = self.condition(examples), [example.key for example in examples]
        with self.model.reference():
            columns = [
                self._velocity(self.model, states[:, k], sigma.expand(len(states)), conditioning, k, keys)
                for k, sigma in enumerate(self.sigmas[: self.num_trained_states])
            ]
        return torch.stack(columns, dim=1)

    # ---- the loss --------------------------------------------------------------------------------------------------

    def has_signal(self, batch: MicroBatch[TAFSGRPORecord]) -> bool:
        """Whether anything is compared with the base, or any process has an advantage."""
        record = batch.record
        return record.base_velocities is not None or bool(self.accelerator.gather(record.advantages).any())

    def micro_batch_losses(
        self, model: nn.Module, batch: MicroBatch[TAFSGRPORecord], conditioning: Conditioning, state: int
    ) -> Tensor:
        """(6) for one draw."""
        args, record = self.args, batch.record
        x, x_next, A = record.states[:, state], record.states[:, state + 1], record.advantages[:, state]
        sigma = self.sigmas[state].expand(len(x))
        v = self._velocity(model, x, sigma, conditioning, state, batch.keys)
        mean, std = self._step(x, v, state)
        log_p = log_probability(x_next, mean, std, args.log_prob_form)
        ratio = (log_p - record.log_probabilities[:, state]).exp()
        self._watch_ratio(ratio.detach(), batch.good)
        losses = torch.maximum(-A * ratio, -A * ratio.clamp(1 - args.epsilon, 1 + args.epsilon))
        if record.base_velocities is None:
            return losses
        v_base = record.base_velocities[:, state]
        self._note_distance(v.detach(), v_base, batch.good)
        self.note_norm_ratios(v, root_mean_square(v_base), sigma, batch.good)
        if args.beta == 0:
            return losses
        mean_base, _ = self._step(x, v_base, state)
        divergence = ((mean - mean_base).square() / (2 * std**2)).flatten(1).mean(dim=1)
        seen = self.accelerator.gather(torch.where(batch.good, divergence.detach(), torch.nan))
        self.metrics.note("kl", seen.nanmean(), unless_nan=True)
        return losses + args.beta * divergence

    def _watch_ratio(self, ratio: Tensor, good: Tensor) -> None:
        """Log how often the clip bites; stop the run where nothing was trained yet and a ratio is not 1."""
        distance = self.accelerator.gather(torch.where(good, (ratio - 1).abs(), 0.0))
        self.metrics.note("clipped_share", (distance > self.args.epsilon).float().mean())
        if not self.buffer.is_at_first:
            return
        largest = float(distance.max())
        self.metrics.note("replay_ratio_error", largest)
        allowed = SAME_RATIO if self.exact else SAME_RATIO_IN_HALF_PRECISION
        if not largest <= allowed:
            raise RuntimeError(
                f"The probability ratio of a rollout that was just made is off by {largest:.1e}, more than "
                f"{allowed:.0e}: replay and rollout differ (dropout, batch statistics, random layers?), so every "
                "ratio would be noise."
            )
        if largest > self.args.epsilon:
            logger.warning(
                "The probability ratio of a rollout that was just made is off by %.1e, more than `epsilon` (%.0e): "
                "half precision clips at random. Raise `epsilon` or train in float32.",
                largest,
                self.args.epsilon,
            )

    def _note_distance(self, v: Tensor, v_base: Tensor, good: Tensor) -> None:
        """The root mean square of the distance to v_base, relative to it, over what the present rollout has shown."""
        mine = torch.stack([(v - v_base)[good].square().sum(), v_base[good].square().sum()])
        self.moved += self.accelerator.reduce(mine, "sum")
        self.velocity_distance = (self.moved[0] / self.moved[1].clamp(min=1e-12)).sqrt()
        self.metrics.note("velocity_distance", self.velocity_distance)

    def reason_to_stop(self) -> str | None:
        """Also where the velocity has moved further than `max_velocity_distance` from the base model's."""
        budget = self.args.max_velocity_distance
        distance = None if budget is None else self._distance_as_number()
        if budget is not None and distance is not None and distance > budget:
            return (
                f"the velocity is {distance:.3f} from the base model's, more than `max_velocity_distance` ({budget})"
            )
        return super().reason_to_stop()

    def _distance_as_number(self) -> float | None:
        """Waits for a GPU, which `_note_distance` does not."""
        return None if self.velocity_distance is None else float(self.velocity_distance)

    # ---- files -----------------------------------------------------------------------------------------------------

    def algorithm_state(self) -> dict[str, Any]:
        """How far the velocity has moved, as the present rollout shows so far."""
        return {"moved": self.moved, "velocity_distance": self._distance_as_number()}

    def load_algorithm_state(self, state: Mapping[str, Any]) -> None:
        """Take it up."""
        self.moved, distance = state["moved"], state["velocity_distance"]
        self.velocity_distance = None if distance is None else torch.tensor(distance)

    def card_sampling(self) -> dict[str, Any]:
        """The stock scheduler can re-noise, but no other kernel: for those the card shows the ODE."""
        args, call = self.args, self.flow.call_arguments()
        trained = f"{args.num_inference_steps} steps of the trained sampler"
        note = f"{trained}; the rows `base_ode` and `tuned_ode`: {args.ode_num_inference_steps} steps of the ODE"
        if args.kernel != "renoise" or args.eta != 1:
            return {"sampling": call | {"num_inference_steps": args.ode_num_inference_steps}, "sampling_note": note}
        steps = args.num_inference_steps
        grid = [round(level, 6) for level in torch.linspace(1, 1 / steps, steps).tolist()]
        return {
            "sampling": call | {"num_inference_steps": steps} | self.flow.grid_arguments(grid),
            "sampling_note": note,
            "scheduler": self.flow.scheduler_code(renoises=True),
        }

    def card_settings(self) -> dict[str, Any]:
        """What the card shows of the method."""
        args = self.args
        return {
            "kernel, eta": f"{args.kernel}, {args.eta:g}",
            "credit rule": args.credit_rule,
            "KL weight beta": f"{args.beta:g}",
            "images per prompt": args.num_generations,
        }


def _refuse_what_cannot_be_replayed(branches_in_one_call: bool, lora: LoraConfig | None) -> None:
    """Raises `ValueError` for settings with which the loss would compute something else than the rollout did."""
    if branches_in_one_call:
        raise ValueError(
            "`guidance_in_one_call` (True) does not suit TAFS-GRPO, whose loss computes the rollout's branches "
            "again, with a gradient and one by one: leave it out."
        )
    if lora is not None and lora.lora_dropout > 0:
        raise ValueError(
            f"`lora_dropout` ({lora.lora_dropout}) must be 0: the rollout could not be replayed, and ratios would be "
            "noise."
        )
