"""`RenoisingTrainer`: what the methods share that match the flow on their own images, noised again.

With images x of the sampling policy, fresh noise e and a level sigma:

    state      z = (1 - sigma) x + sigma e,    u = e - x, the velocity of its path
    reward     r~ = clip( (r - mean of its prompt) / std of all, +-reward_clip )
    old        theta_old <- d theta_old + (1 - d) theta before every rollout, d = `RenoisingConfig.old_decay`
    guard      norm_guard relu( |v(z)| / |v_base(z)| - 1 )^2
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..flow import euler_steps, interpolate, shape_rewards
from ..pipelines import Conditioning
from ..sampling.buffer import MicroBatch, Record
from ..sampling.draws import ImageKey, keyed_generators, noise
from .base_trainer import FlowRLTrainer
from .lagged_weights import LaggedWeights
from .renoising_config import RenoisingConfig

RecordT = TypeVar("RecordT", bound=Record)


@dataclass(frozen=True)
class RenoisingRollout(Record):
    """What a rollout keeps.

    Attributes:
        final: The images' latents x, (B, ...).
    """

    final: Tensor


@dataclass(frozen=True)
class Returns(Record):
    """Images and what they earned.

    Attributes:
        final: x, (B, ...).
        returns: r~, summed over the rewards with their weights, (B,).
    """

    final: Tensor
    returns: Tensor


class RenoisingTrainer(FlowRLTrainer[RenoisingRollout, RecordT]):
    """The base of trainers that regress the velocity at re-noised states of their own images, whose reward needs no
    gradient.

    A method overrides `prepare` and `micro_batch_losses`.
    """

    config_class: ClassVar[type[RenoisingConfig]] = RenoisingConfig

    args: RenoisingConfig

    def set_up(self) -> None:
        """The weights of the old policy, where they are not simply the present ones at the rollout."""
        trained = {n: p for n, p in self.model.trained_tensors().items() if isinstance(p, nn.Parameter)}
        self.old = LaggedWeights(trained) if self.args.keeps_old_policy else None

    @property
    def num_trained_states(self) -> int:
        """One per bin."""
        return self.args.timestep_bins

    # ---- the rollout -----------------------------------------------------------------------------------------------

    def before_rollout(self) -> None:
        """Let the old policy follow."""
        if self.old is not None:
            decay = self.args.old_decay(self.state.global_step)
            self.old.move(decay)
            self.metrics.note("old_decay", decay)

    def old_policy(self) -> AbstractContextManager[None]:
        """A context in which the model is the old policy, for rollouts and `prepare`: until the first update after a
        rollout, a policy that is copied before it is the model as it stands.
        """
        return nullcontext() if self.old is None else self.old.standing_in()

    def rollout(self, conditioning: Conditioning, keys: list[ImageKey]) -> RenoisingRollout:
        """The Euler ODE with guidance; keeps its end."""

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return self.model(x, sigma, conditioning, guidance=True)

        *_, (_, _, final) = euler_steps(velocity, self.initial_latents(keys), self.sigmas)
        return RenoisingRollout(final)

    # ---- rewards ---------------------------------------------------------------------------------------------------

    def _shape(self, rollout: list[MicroBatch[RenoisingRollout]]) -> list[MicroBatch[Returns]]:
        """Score the images of all processes, and shape what they earned."""
        final = torch.cat([batch.record.final for batch in rollout])
        mine = self.scorer.score(final, [e for batch in rollout for e in batch.examples])
        self.log_rewards(mine, rollout)
        self.show_samples(final, mine, rollout)
        bad = mine.isinf().any(dim=1) | ~final.flatten(1).isfinite().all(dim=1)
        absent = mine.isnan().all(dim=1)
        returns = self._shaped(torch.where(mine.isinf(), torch.nan, mine), self.prompt_rows(rollout))
        self.count_bad_samples("reward", bad)
        sizes = [len(batch.examples) for batch in rollout]
        parts = zip(rollout, returns.split(sizes), (~(bad | absent)).split(sizes), strict=True)
        return [
            batch.with_record(Returns(batch.record.final, part), good).zero_not_finite() for batch, part, good in parts
        ]

    def _shaped(self, scores: Tensor, rows: Tensor) -> Tensor:
        """r~ (B,), summed over the rewards with their weights, from scores and prompts of this process's images.

        Args:
            scores: (B, R), NaN for what is absent or invalid.
            rows: (B,), equal numbers for images of one prompt.
        """
        count = len(scores)
        if self.args.reward_shaping == "standardise":
            everyone, groups = self.accelerator.gather(scores), self.accelerator.gather(rows)
            clip = torch.inf if self.args.reward_clip is None else self.args.reward_clip
            shaped = [shape_rewards(column, groups, clip, self.args.reward_std) for column in everyone.unbind(dim=1)]
            scores = torch.stack(shaped, dim=1)[self.args.process_index * count :][:count]
        return (scores.nan_to_num(0.0) * self.reward_weights).sum(dim=1)

    def _has_signal(self, shaped: list[MicroBatch[Returns]]) -> bool:
        """Whether any shaped reward differs from its prompt's mean: else every image would be imitated alike."""
        returns = self.accelerator.gather(torch.cat([batch.record.returns for batch in shaped]))
        return self.args.reward_shaping == "none" or bool(returns.any())

    def _without_bad(
        self, shaped: list[MicroBatch[Returns]], batches: list[MicroBatch[RecordT]]
    ) -> list[MicroBatch[RecordT]]:
        """Leave out images whose targets are not finite, and count them.

        Args:
            shaped: The images as they were scored.
            batches: The same images with what the loss needs of them.
        """
        batches = [batch.zero_not_finite() for batch in batches]
        known = torch.cat([batch.good for batch in shaped])  # images without a reward are left out, but not bad
        self.count_bad_samples("target", known & ~torch.cat([batch.good for batch in batches]))
        return batches

    # ---- states ----------------------------------------------------------------------------------------------------

    def _renoised(self, batch: MicroBatch[Returns], purpose: str) -> tuple[Tensor, Tensor, Tensor]:
        """One state of every bin for every image: states (B, K, ...), noise (B, K, ...) and levels (B, K)."""
        final, bins = batch.record.final, self.args.timestep_bins
        generators = keyed_generators(self.args.seed, batch.keys, purpose)
        within = [torch.rand(bins, generator=g) for g in generators]
        if self.args.timestep_sampling == "steps":  # evenly spaced shares fall on different levels
            within = [draws[:1] for draws in within]
        share = torch.stack([(torch.arange(bins) + draws) / bins for draws in within])
        sigma = self._levels(share).to(final.device)
        e = noise(generators, (bins, *final.shape[1:]), final.device)
        return interpolate(final[:, None], e, sigma), e, sigma

    def _levels(self, share: Tensor) -> Tensor:
        """The noise levels below which so large a share of all levels lies; share: in [0, 1], any shape."""
        steps = self.args.num_inference_steps
        match self.args.timestep_sampling:
            case "uniform":
                return share
            case "logit_normal":
                return torch.sigmoid(torch.special.ndtri(share.clamp(1e-4, 1 - 1e-4)))
            case "pipeline":
                # Of the sampler's own number of steps, on which the shift of some pipelines depends.
                levels = self.flow.sigmas(steps, "uniform").flip(0)
                below = (share * steps).long().clamp(max=steps - 1)
                return torch.lerp(levels[below], levels[below + 1], share * steps - below)
            case "noisy":
                return share.sqrt()  # the density is 2 sigma
            case "steps":
                return self._sampler_levels()[(share * steps).long().clamp(max=steps - 1)]
            case "noisy_steps":
                levels = self._sampler_levels()
                below = torch.searchsorted(levels.cumsum(0) / levels.sum(), share, right=True)
                return levels[below.clamp(max=steps - 1)]

    def _sampler_levels(self) -> Tensor:
        """The levels at which the sampler asks for a velocity, from the lowest to 1."""
        return self.sigmas[:-1].flip(0).cpu()

    # ---- what ties the velocity ------------------------------------------------------------------------------------

    def _distance_to_base(self, v: Tensor, v_base: Tensor, good: Tensor) -> Tensor:
        """The mean squared distances (B,) of velocities (B, ...) to the base's; notes the relative one of `good`."""
        distance, length = (t.flatten(1).square().mean(dim=1) for t in (v - v_base, v_base))
        moved, of = (self.mean_of_good(t, good) for t in (distance, length))
        self.metrics.note("velocity_distance", (moved / of.clamp(min=1e-12)).sqrt())
        return distance

    def _norm_guard(self, v: Tensor, base_lengths: Tensor, sigma: Tensor, good: Tensor) -> Tensor:
        """`norm_guard` relu( |v| / |v_base| - 1 )^2, (B,); notes the ratios of `good`, see `note_norm_ratios`.

        Args:
            v: Velocities (B, ...).
            base_lengths: The root mean squares (B,) of the base's.
            sigma: Their levels (B,).
            good: (B,).
        """
        self.note_norm_ratios(v, base_lengths, sigma, good)
        if self.args.norm_guard == 0:
            return torch.zeros_like(base_lengths)
        return self.args.norm_guard * self._excess_length(v, base_lengths)

    def _excess_length(self, v: Tensor, base_lengths: Tensor) -> Tensor:
        """relu( |v| / |v_base| - 1 )^2 of velocities (B, ...), with the root mean squares (B,) of the base's."""
        length = v.flatten(1).square().mean(dim=1).clamp(min=1e-12).sqrt()
        return (length / base_lengths.clamp(min=1e-6) - 1).relu().square()

    # ---- files -----------------------------------------------------------------------------------------------------

    def algorithm_state(self) -> dict[str, Any]:
        """The weights of the old policy; how far it lags is a function of the number of updates."""
        return {} if self.old is None else {"old": self.old.state_dict()}

    def load_algorithm_state(self, state: Mapping[str, Any]) -> None:
        """Take them up."""
        if self.old is not None:
            self.old.load_state_dict(state["old"])

    def card_old_policy(self, draws: bool) -> dict[str, Any]:
        """What the card shows of the old policy; draws: whether it draws the rollouts."""
        if self.old is None:
            return {}
        args = self.args
        ramp = "" if args.old_policy_ramp is None else f", ramp {args.old_policy_ramp:g}"
        flat = f", flat for {args.old_policy_flat} updates" if args.old_policy_flat else ""
        drawn = "; it drew the rollouts, and their rewards" if draws else ""
        return {"old policy": f"decay {args.old_policy_decay:g}{ramp}{flat}{drawn}"}
