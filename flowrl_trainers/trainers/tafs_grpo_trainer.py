"""TAFS-GRPO: GRPO on a few-step sampler that re-noises its own results, as reconstructed from the abstract of arXiv 2602.01591.

With N levels 1 = sigma_0 > ... > sigma_N = 0, `s = sigma_k`, `s' = sigma_{k+1}`, and the velocity v at (x_k, s):

    x0_k = x_k - s v,    noise_k = x_k + (1 - s) v                                                                              (1)
    mean_k = (1 - s') x0_k + s' cos(pi eta / 2) noise_k,    std_k = s' sin(pi eta / 2)                                         (2)
    x_{k+1} = mean_k + std_k e_k    for k < N - 1; the last x0 is delivered                                                    (3)
    A_k = credit of the rewards R_j of the clean estimates x0_j, j > k, compared within the prompt; see `flow.step_advantages`   (4)
    ratio_k = p_theta(x_{k+1} | x_k) / p_rollout(x_{k+1} | x_k)                                                                (5)
    loss_k = max( -A_k ratio_k, -A_k clip(ratio_k, 1 - epsilon, 1 + epsilon) )  +  beta mean_d (mean_k - mean_k^base)^2 / (2 std_k^2)
                                                                                                                               (6)

Draw k is credited with rewards of step k + 1 or later: x0_k was settled before e_k was drawn, and its expected policy gradient is zero. The
second term of (6) is the exact KL divergence, as both Gaussians have the same variance.

Only the abstract and the first lines of 2602.01591 could be read. They name: a few-step sampler that takes the result of a one-step sample,
adds noise that adapts to time, and repeats; rewards for each step that need no gradient, integrated into the advantage step by step; and
GRPO. All else is our choice: (2) with eta = 1 as the sampler, a uniform grid through the pipeline's own shift, the credit rules, the last
step without noise, the clipped objective and the KL divergence of the Flow-GRPO family, the noise that a prompt's images share.
Flow-GRPO (arXiv 2505.05470) is `kernel="flow_grpo"` with `credit_rule="final"`, but for its last step, which here draws no noise.
"""

import logging
from typing import Any, ClassVar

import torch
from torch import nn

from ..flow import clean_estimate, flow_grpo_step, log_probability, renoise, step_advantages
from ..pipelines import Conditioning
from ..sampling.draws import keyed_generator
from ..sampling.micro_batch import MicroBatch
from ..sampling.prompt_groups import ImageKey
from .base_trainer import FlowRLTrainer
from .evaluation import Sampler
from .tafs_grpo_config import TAFSGRPOConfig

logger = logging.getLogger(__name__)

KERNELS = {"renoise": renoise, "flow_grpo": flow_grpo_step}
LEAST_LEVEL = 0.05  # below it, the factor (1 - s') / s' of the Gaussian score drowns everything else
NO_ADVANTAGE = 1e-3  # what rounding leaves of equal rewards is below it
SAME_RATIO = 1e-6  # of two float32 computations of one thing
SAME_RATIO_IN_HALF_PRECISION = 1e-3


class TAFSGRPOTrainer(FlowRLTrainer):
    """Makes a flow model a good few-step generator under any reward, by GRPO on the draws of its sampler."""

    _name: ClassVar[str] = "TAFS-GRPO"
    _tag_names: ClassVar[list[str]] = ["tafs-grpo"]
    _paper: ClassVar[dict[str, str]] = {
        "title": "Know Your Step: Faster and Better Alignment for Flow Matching Models via Step-aware Advantages",
        "id": "2602.01591",
        "note": ", as reconstructed from its abstract",
    }
    config_class = TAFSGRPOConfig

    replayed_settings = (
        *FlowRLTrainer.replayed_settings, "kernel", "eta", "credit_rule", "credit_mix", "credit_discount", "scale_rewards",
        "advantage_clip", "log_prob_form", "share_initial_noise", "beta", "max_velocity_distance",
    )  # fmt: skip

    args: TAFSGRPOConfig

    def set_up(self) -> None:
        """The sampler's own grid. Raises `ValueError` for dropout, and for a grid whose last draw is too small to learn from."""
        self.num_trained_states = self.args.num_inference_steps - 1
        self.sigmas = self.flow.sigmas(self.args.num_inference_steps, spacing="uniform").to(self.args.device)
        if float(self.sigmas[-2]) < LEAST_LEVEL:
            raise ValueError(
                f"`num_inference_steps` ({self.args.num_inference_steps}) ends with a draw at sigma {float(self.sigmas[-2]):.3f}, below "
                f"{LEAST_LEVEL}, where ratios explode: take fewer steps."
            )
        if self.peft_config is not None and self.peft_config.lora_dropout > 0:
            raise ValueError(
                f"`lora_dropout` ({self.peft_config.lora_dropout}) must be 0: the rollout could not be replayed, and ratios would be noise."
            )
        self.exact = self.args.mixed_precision == "no" and all(p.dtype == torch.float32 for p in self.model.transformer.parameters())
        self.moved = torch.zeros(2, device=self.args.device)  # squares of the distance to the base, and of the base, of this rollout
        self.velocity_distance: float | None = None
        levels = ", ".join(f"{level:.3f}" for level in self.sigmas.tolist())
        logger.info("The sampler's levels: %s.", levels)

    # ---- the sampler ------------------------------------------------------------------------------------------------------

    def rollout(self, latents: torch.Tensor, conditioning: Conditioning, keys: list[ImageKey]) -> dict[str, torch.Tensor]:
        """(1) to (3); keeps the clean estimates (B, N, ...), the states (B, N, ...) and the log-probabilities (B, N - 1)."""
        if self.args.share_initial_noise:
            latents = self.initial_latents([ImageKey(k.row, 0, k.rollout) for k in keys], "initial latents")
        generators = [keyed_generator(self.args.seed, k.row, k.image, k.rollout, "step noise") for k in keys]

        def velocity(x: torch.Tensor, sigma: torch.Tensor, step: int) -> torch.Tensor:
            return self._velocity(self.model, x, sigma, conditioning, step, keys)

        estimates, states, log_probabilities = self._sample(velocity, latents, generators)
        return {"estimates": estimates, "states": states, "log_probabilities": log_probabilities}

    def _sample(self, velocity: Any, x: torch.Tensor, generators: list[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The clean estimates and states (B, N, ...), and log-probabilities (B, N - 1), from initial latents x (B, ...).

        velocity: called with latents (B, ...), levels (B,) and the number of the step. generators: one per image.
        """
        estimates, states, log_probabilities = [], [x], []
        for step, sigma in enumerate(self.sigmas[:-1]):
            level = sigma.expand(len(x))
            v = velocity(x, level, step)
            estimates.append(clean_estimate(x, v, level))
            if step == self.num_trained_states:
                break
            mean, std = self._step(x, v, step)
            noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x.device)
            x = mean + std * noise
            states.append(x)
            log_probabilities.append(log_probability(x, mean, std, self.args.log_prob_form))
        return torch.stack(estimates, dim=1), torch.stack(states, dim=1), torch.stack(log_probabilities, dim=1)

    def _step(self, x: torch.Tensor, velocity: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(2): mean (B, ...) and standard deviation (B, 1, ...)."""
        sigma, sigma_next = (level.expand(len(x)) for level in self.sigmas[step : step + 2])
        return KERNELS[self.args.kernel](x, velocity, sigma, sigma_next, self.args.eta)

    def _velocity(
        self, model: nn.Module, x: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning, step: int, keys: list[ImageKey]
    ) -> torch.Tensor:
        """The velocity (B, ...); once per prompt where its images still are at their common initial noise."""
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
        ode = self.ode_sampler(self.flow.sigmas(self.args.ode_num_inference_steps).to(self.args.device))
        return {"": self._own_sampler, "ode": ode}

    def _own_sampler(
        self, transformer: nn.Module, latents: torch.Tensor, conditioning: Conditioning, generators: list[torch.Generator]
    ) -> torch.Tensor:
        def velocity(x: torch.Tensor, sigma: torch.Tensor, step: int) -> torch.Tensor:
            return self.flow.velocity(transformer, x, sigma, conditioning)

        estimates, _, _ = self._sample(velocity, latents, generators)
        return estimates[:, -1]

    # ---- rewards and advantages -------------------------------------------------------------------------------------------

    def prepare(self, rollout: list[MicroBatch]) -> None:
        """(4), and the base model's velocities where they are needed."""
        with self.timed("rewards"):
            scores = torch.cat([self._score_steps(batch) for batch in rollout])
        self.log_rewards(scores[:, -1])
        bad, absent = scores.isinf().any(dim=2).any(dim=1), scores[:, -1].isnan().all(dim=1)
        scores = torch.where(scores.isinf(), torch.nan, scores)
        rows = torch.tensor([e.key.row for batch in rollout for e in batch.examples], device=scores.device)
        everyone, groups = self.accelerator.gather(scores), self.accelerator.gather(rows)
        self._log_steps(everyone)
        args = self.args
        separate = [
            step_advantages(column, groups, args.credit_rule, args.scale_rewards, args.credit_mix, args.credit_discount)
            for column in everyone.unbind(dim=2)
        ]
        advantages = (torch.stack(separate, dim=2) * self.reward_weights).sum(dim=2).clamp(-args.advantage_clip, args.advantage_clip)
        self.log_metric("zero_advantage_share", (advantages.abs() < NO_ADVANTAGE).all(dim=1).float().mean())
        own = advantages[args.process_index * len(scores) :][: len(scores)]
        sizes = [len(batch.examples) for batch in rollout]
        for batch, part, left_out in zip(rollout, own.split(sizes), (bad | absent).split(sizes), strict=True):
            batch.tensors["advantages"] = part
            batch.good &= ~left_out
            if self._needs_base:
                batch.tensors["base_velocities"] = self._base_velocities(batch)
            common = batch.tensors["states"][:, 0].clone()
            batch.leave_out_what_is_not_finite()
            batch.tensors["states"][:, 0] = common  # an image that is left out may be the one whose first call its group shares
        self.count_bad_samples("reward", bad)
        self.moved = torch.zeros(2, device=self.args.device)

    def _score_steps(self, batch: MicroBatch) -> torch.Tensor:
        """Scores (B, N, number of rewards) of the clean estimates that the credit rule asks for; NaN elsewhere."""
        estimates = batch.tensors.pop("estimates")
        steps = estimates.shape[1]
        first = {"final": steps - 1, "gain": 0}.get(self.args.credit_rule, 1)
        scores = torch.full((len(estimates), steps, len(self.rewards)), torch.nan, device=estimates.device)
        examples = [example for example in batch.examples for _ in range(first, steps)]
        scores[:, first:] = self.score(estimates[:, first:].flatten(0, 1), examples).unflatten(0, (-1, steps - first))
        scores[~estimates.flatten(1).isfinite().all(dim=1)] = torch.inf  # a fault, whatever a reward made of it
        return scores

    def _log_steps(self, scores: torch.Tensor) -> None:
        for step, column in enumerate(scores.unbind(dim=1)):
            for reward, values in zip(self.rewards, column.unbind(dim=1), strict=True):
                if values.isfinite().any():
                    self.log_metric(f"reward_of_step_{step}/{reward.name}", values.nanmean())

    @property
    def _needs_base(self) -> bool:
        return self.args.beta > 0 or self.args.max_velocity_distance is not None

    @torch.no_grad()
    def _base_velocities(self, batch: MicroBatch) -> torch.Tensor:
        """(B, N - 1, ...) at the states of the rollout."""
        conditioning, keys = self.condition(batch.examples), [e.key for e in batch.examples]
        states = batch.tensors["states"]
        with self.model.reference():
            columns = [
                self._velocity(self.model, states[:, k], self.sigmas[k].expand(len(states)), conditioning, k, keys)
                for k in range(self.num_trained_states)
            ]
        return torch.stack(columns, dim=1)

    # ---- the loss ---------------------------------------------------------------------------------------------------------

    def micro_batch_losses(self, model: nn.Module, batch: MicroBatch, conditioning: Conditioning, state: int) -> torch.Tensor:
        """(6) for one draw."""
        args, tensors = self.args, batch.tensors
        x, x_next, advantage = tensors["states"][:, state], tensors["states"][:, state + 1], tensors["advantages"][:, state]
        keys = [e.key for e in batch.examples]
        velocity = self._velocity(model, x, self.sigmas[state].expand(len(x)), conditioning, state, keys)
        mean, std = self._step(x, velocity, state)
        log_p = log_probability(x_next, mean, std, args.log_prob_form)
        ratio = (log_p - tensors["log_probabilities"][:, state]).exp()
        self._watch_ratio(ratio.detach(), batch.good)
        losses = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - args.epsilon, 1 + args.epsilon))
        if not self._needs_base:
            return losses
        base = tensors["base_velocities"][:, state]
        self._note_distance(velocity.detach(), base, batch.good)
        if args.beta == 0:
            return losses
        base_mean, _ = self._step(x, base, state)
        divergence = ((mean - base_mean).square() / (2 * std**2)).flatten(1).mean(dim=1)
        seen = self.accelerator.gather(torch.where(batch.good, divergence.detach(), torch.nan))
        if not seen.isnan().all():
            self.log_metric("kl", seen.nanmean())
        return losses + args.beta * divergence

    def _watch_ratio(self, ratio: torch.Tensor, good: torch.Tensor) -> None:
        """Log how often the clip bites; where nothing was trained since the rollout, every ratio must be 1, or the run stops."""
        distance = self.accelerator.gather(torch.where(good, (ratio - 1).abs(), 0.0))
        self.log_metric("clipped_share", (distance > self.args.epsilon).float().mean())
        if (self._micro_step - 1) % (self.args.micro_steps_per_rollout * self.args.num_iterations) > 0:
            return
        largest = float(distance.max())
        self.log_metric("replay_ratio_error", largest)
        allowed = SAME_RATIO if self.exact else SAME_RATIO_IN_HALF_PRECISION
        if not largest <= allowed:
            raise RuntimeError(
                f"The probability ratio of a rollout that was just made is off by {largest:.1e}, more than {allowed:.0e}: replay and "
                "rollout differ (dropout, batch statistics, random layers?), so every ratio would be noise."
            )
        if largest > self.args.epsilon:
            logger.warning(
                "The probability ratio of a rollout that was just made is off by %.1e, more than `epsilon` (%.0e): half precision clips at "
                "random. Raise `epsilon` or train in float32.", largest, self.args.epsilon,
            )  # fmt: skip

    def _note_distance(self, velocity: torch.Tensor, base: torch.Tensor, good: torch.Tensor) -> None:
        """The root mean square of the distance to the base velocities, relative to these, over what the present rollout has shown."""
        own = torch.stack([(velocity - base)[good].square().sum(), base[good].square().sum()])
        self.moved += self.accelerator.reduce(own, "sum")
        self.velocity_distance = float((self.moved[0] / self.moved[1].clamp(min=1e-12)).sqrt())
        self.log_metric("velocity_distance", self.velocity_distance)

    def reason_to_stop(self) -> str | None:
        """Also where the velocity has moved further than `max_velocity_distance` from the base model's."""
        budget, distance = self.args.max_velocity_distance, self.velocity_distance
        if budget is not None and distance is not None and distance > budget:
            return f"the velocity is {distance:.3f} from the base model's, more than `max_velocity_distance` ({budget})"
        return super().reason_to_stop()

    def algorithm_state(self) -> dict[str, Any]:
        """How far the velocity has moved, as the present rollout shows so far."""
        return {"moved": self.moved, "velocity_distance": self.velocity_distance}

    def load_algorithm_state(self, state: dict[str, Any]) -> None:
        """Take it up."""
        self.moved, self.velocity_distance = state["moved"], state["velocity_distance"]

    def card_sampling(self) -> dict[str, Any]:
        """The stock scheduler can re-noise, but no other kernel: for those the card shows the ODE."""
        args, call = self.args, self.flow.call_arguments()
        own, ode = f"{args.num_inference_steps} steps of the trained sampler", f"{args.ode_num_inference_steps} steps of the ODE"
        note = f"{own}; the rows `base_ode` and `tuned_ode`: {ode}"
        if not self.renoises:
            return {"sampling": call | {"num_inference_steps": args.ode_num_inference_steps}, "sampling_note": note}
        steps = args.num_inference_steps
        grid = [round(level, 4) for level in torch.linspace(1, 1 / steps, steps).tolist()]
        return {"sampling": call | {"num_inference_steps": steps, "sigmas": grid}, "sampling_note": note}

    @property
    def renoises(self) -> bool:
        """With the kernel and the eta that the stock scheduler has too."""
        return self.args.kernel == "renoise" and self.args.eta == 1

    def card_settings(self) -> dict[str, Any]:
        """What the card shows of the method."""
        args = self.args
        return {
            "kernel, eta": f"{args.kernel}, {args.eta:g}",
            "credit rule": args.credit_rule,
            "KL weight beta": f"{args.beta:g}",
            "images per prompt": args.num_generations,
        }
