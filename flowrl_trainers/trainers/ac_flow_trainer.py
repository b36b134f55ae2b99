"""AC-Flow: actor-critic fine-tuning of flow models from any reward, as reconstructed from the abstract of arXiv 2510.18072.

With images x of the current model, fresh noise e and a level sigma, at the re-noised state z = (1 - sigma) x + sigma e:

    r~ = clip( (r - mean of its prompt) / std of all, +-reward_clip )                                                          (1)
    critic   V(z, sigma, prompt) regressed onto r~, which is the return of every state                                       (2)
    A = clip( r~ - V, +-advantage_clip ),    w = f(A) / mean f(A)                                                               (3)
    actor    mean_d w (v_theta(z) - (e - x))^2 + alpha mean_d (v_theta(z) - v_base(z))^2                                        (4)

whose minimum, state by state, is (E[w | z] u_w + alpha v_base) / (E[w | z] + alpha), u_w the weighted mean of e - x. In (3) and (4), V,
w and v_base are not differentiated.

Only the abstract and reviews of 2510.18072 could be read. They name: reward shaping for stable value learning, a critic of intermediate
states that is regressed onto the final reward, a bounded advantage, a warm-up of the critic, weights from the critic, a Wasserstein-2
regulariser, and ORW-CFM-W2 as a special case (V = 0 and no shaping, clipping or normalising). All else is our choice: the formulas (1)
and (3); re-noised states (on the sampler's own path a perfect critic leaves no advantage); the same noise levels for critic and actor;
the critic's network, and its warm-up, which lasts until its explained variance on a new rollout no longer rises; the velocity distance
as the Wasserstein term, as in ORW-CFM-W2; the guided velocity throughout, so that guidance is not distilled into the weights.

The paper runs t = 1 - sigma with v_paper = -v; squares do not see the sign.
"""

import logging
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.trainer_utils import TrainOutput

from ..flow import advantage_weights, euler_step, explained_variance, interpolate, shape_rewards, velocity_between
from ..networks import critic
from ..pipelines import Conditioning
from ..sampling.draws import keyed_generator
from ..sampling.micro_batch import MicroBatch
from ..sampling.prompt_groups import ImageKey
from .ac_flow_config import ACFlowConfig
from .base_trainer import FlowRLTrainer

logger = logging.getLogger(__name__)

RISE = 0.01  # of the explained variance: what counts as rising
PATIENCE = 3  # rollouts without a rise
MAX_CRITIC_GRAD_NORM = 1.0


class ACFlowTrainer(FlowRLTrainer):
    """Fine-tunes a flow model to raise any reward, by flow matching on its own images, weighted by a critic's advantage.

    Args beside those of `FlowRLTrainer`:
        critic: a module called with latents (B, ...), sigma (B,), prompt features (B, L, D) and their mask (B, L), which returns values
            (B,); None for the one that `args.critic` names.
    """

    _name: ClassVar[str] = "AC-Flow"
    _tag_names: ClassVar[list[str]] = ["ac-flow"]
    _paper: ClassVar[dict[str, str]] = {
        "title": "Fine-tuning Flow Matching Generative Models with Intermediate Feedback",
        "id": "2510.18072",
        "note": ", as reconstructed from its abstract",
    }
    config_class = ACFlowConfig

    replayed_settings = (
        *FlowRLTrainer.replayed_settings, "timestep_bins", "timestep_sampling", "critic", "critic_steps", "critic_learning_rate",
        "critic_warmup_max_steps",
    )  # fmt: skip

    args: ACFlowConfig

    def __init__(self, *args: Any, critic: nn.Module | None = None, **kwargs: Any) -> None:
        self.given_critic = critic
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """See `FlowRLTrainer.train`; says so where the run ended before the critic's warm-up did."""
        output = super().train(*args, **kwargs)
        if self.warming_up and self._best_step is None:
            logger.warning("The run ended while the critic still warmed up: the model is as it was. Raise `max_steps`.")
        elif self.warming_up:
            logger.warning("The best checkpoint is one of the critic's warm-up: the model is as it was.")
        return output

    def set_up(self) -> None:
        """The critic and its optimizer. They are no part of the model that Trainer sees, as they take steps of their own."""
        self.num_trained_states = self.args.timestep_bins
        self.critic = self._make_critic()
        self.warming_up = self.critic is not None and self.args.critic_warmup_max_steps > 0
        if self.warming_up and self.args.fp16:
            raise ValueError("`fp16` cannot scale the gradients that a warm-up does not make: take `bf16`, or `critic_warmup_max_steps=0`.")
        self.warmup_rollouts, self.best_explained, self.rollouts_without_rise = 0, -math.inf, 0
        if self.critic is not None:
            self.same_on_all_processes(self.critic)
            self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), lr=self.args.critic_learning_rate)

    def _make_critic(self) -> nn.Module | None:
        if self.given_critic is not None:
            return self.given_critic.to(self.args.device)
        if self.args.critic == "none":
            return None
        latent = self.initial_latents([ImageKey(0, 0, 0)], "shape")
        features, _ = self.flow.prompt_features(self.condition([self.train_dataset[ImageKey(0, 0, 0)]]))
        return critic(latent.shape[1:], features.shape[-1]).to(self.args.device)

    def rollout(self, latents: torch.Tensor, conditioning: Conditioning, keys: list[ImageKey]) -> dict[str, torch.Tensor]:
        """The Euler ODE with guidance; keeps the end (B, ...)."""
        for sigma, sigma_next in pairwise(self.sigmas):
            velocity = self.model(latents, sigma.expand(len(latents)), conditioning, guidance=True)
            latents = euler_step(latents, velocity, sigma, sigma_next)
        return {"final": latents}

    def prepare(self, rollout: list[MicroBatch]) -> None:
        """(1) to (3): scores, the critic's steps, and the states, targets, weights and anchors of (4)."""
        self._shape(rollout)
        if self.critic is not None:
            with self.timed("critic"):
                self._judge_critic(rollout)
                for step in range(self.args.critic_steps):
                    self._critic_step(rollout, f"critic step {step}")
            self.critic.eval()
        self.log_metric("critic/warming_up", float(self.warming_up))
        if self.warming_up:
            return
        for batch in rollout:
            self._actor_states(batch)
        self._weigh(rollout)
        known = torch.cat([batch.good for batch in rollout])  # images without a reward are left out, but not bad
        for batch in rollout:
            batch.leave_out_what_is_not_finite()
        self.count_bad_samples("target", known & ~torch.cat([batch.good for batch in rollout]))

    @property
    def learns(self) -> bool:
        """Not while the critic warms up."""
        return not self.warming_up

    def _shape(self, rollout: list[MicroBatch]) -> None:
        """(1), over the images of all processes; leaves `returns` (B,)."""
        final = torch.cat([batch.tensors["final"] for batch in rollout])
        own = self.score(final, [e for batch in rollout for e in batch.examples])
        self.log_rewards(own)
        bad, absent = own.isinf().any(dim=1) | ~final.flatten(1).isfinite().all(dim=1), own.isnan().all(dim=1)
        scores = torch.where(own.isinf(), torch.nan, own)
        if self.args.reward_shaping == "standardise":
            rows = torch.tensor([e.key.row for batch in rollout for e in batch.examples], device=own.device)
            everyone, groups = self.accelerator.gather(scores), self.accelerator.gather(rows)
            shaped = torch.stack([shape_rewards(column, groups, self.args.reward_clip) for column in everyone.unbind(dim=1)], dim=1)
            first = self.args.process_index * len(own)
            scores = shaped[first : first + len(own)]
        returns = (scores.nan_to_num(0.0) * self.reward_weights).sum(dim=1)
        start = 0
        for batch in rollout:
            count = len(batch.examples)
            batch.good &= ~(bad | absent)[start : start + count]
            batch.tensors["returns"] = returns[start : start + count]
            batch.leave_out_what_is_not_finite()
            start += count
        self.count_bad_samples("reward", bad)

    # ---- states -----------------------------------------------------------------------------------------------------------

    def _renoised(self, batch: MicroBatch, purpose: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One state of every bin for every image: states (B, K, ...), noise (B, K, ...) and levels (B, K)."""
        final, bins = batch.tensors["final"], self.args.timestep_bins
        generators = [keyed_generator(self.args.seed, e.key.row, e.key.image, e.key.rollout, purpose) for e in batch.examples]
        share = torch.stack([(torch.arange(bins) + torch.rand(bins, generator=g)) / bins for g in generators])
        sigma = self._levels(share)
        noise = torch.stack([torch.randn(bins, *final.shape[1:], generator=g) for g in generators]).to(final.device)
        sigma = sigma.to(final.device)
        data = final[:, None].expand_as(noise)
        states = interpolate(data.flatten(0, 1), noise.flatten(0, 1), sigma.flatten()).unflatten(0, sigma.shape)
        return states, noise, sigma

    def _levels(self, share: torch.Tensor) -> torch.Tensor:
        """The noise levels below which so large a share of all levels lies; share: in [0, 1], any shape."""
        match self.args.timestep_sampling:
            case "uniform":
                return share
            case "logit_normal":
                return torch.sigmoid(torch.special.ndtri(share.clamp(1e-4, 1 - 1e-4)))
            case "pipeline":
                # Of the sampler's own number of steps, on which the shift of some pipelines depends.
                steps = self.args.num_inference_steps
                levels = self.flow.sigmas(steps, "uniform").flip(0)
                below = (share * steps).long().clamp(max=steps - 1)
                return torch.lerp(levels[below], levels[below + 1], share * steps - below)

    def _values(self, states: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """V (B, K) at states (B, K, ...) and levels (B, K); zero without a critic."""
        if self.critic is None:
            return torch.zeros_like(sigma)
        features, mask = self.flow.prompt_features(conditioning)
        columns = zip(states.unbind(1), sigma.unbind(1), strict=True)
        return torch.stack([self.critic(z, s, features.float(), mask) for z, s in columns], dim=1)

    # ---- the critic -------------------------------------------------------------------------------------------------------

    def _critic_step(self, rollout: list[MicroBatch], purpose: str) -> None:
        """One update of (2) on freshly re-noised images of all processes."""
        assert self.critic is not None
        self.critic.train()
        parameters, losses = list(self.critic.parameters()), []
        for loss in self._critic_losses(rollout, purpose):
            loss.backward()
            losses.append(loss.detach())
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_CRITIC_GRAD_NORM)
        if norm.isfinite():
            self.critic_optimizer.step()
        self.critic_optimizer.zero_grad()
        self.log_metric("critic/loss", self.accelerator.gather(torch.stack(losses).sum()).mean())

    def _critic_losses(self, rollout: list[MicroBatch], purpose: str) -> Iterator[torch.Tensor]:
        """The share of each micro-batch in the mean squared error."""
        for batch in rollout:
            states, _, sigma = self._renoised(batch, purpose)
            error = (self._values(states, sigma, self.condition(batch.examples)) - batch.tensors["returns"][:, None]).square().mean(dim=1)
            yield torch.where(batch.good, error, 0.0).mean() / len(rollout)

    @torch.no_grad()
    def _judge_critic(self, rollout: list[MicroBatch]) -> None:
        """Explained variance, bin by bin, on a rollout that the critic has not learned from; ends the warm-up where it no longer rises."""
        assert self.critic is not None
        self.critic.eval()
        found = []
        for batch in rollout:
            states, _, sigma = self._renoised(batch, "judge")
            found.append(self._values(states, sigma, self.condition(batch.examples)))
        good = self.accelerator.gather(torch.cat([batch.good for batch in rollout]))
        values = self.accelerator.gather(torch.cat(found))[good]
        returns = self.accelerator.gather(torch.cat([batch.tensors["returns"] for batch in rollout]))[good]
        explained = explained_variance(returns[:, None].expand_as(values), values)
        if explained.isfinite().all():  # else all rewards were equal, which tells nothing of the critic
            for number, value in enumerate(explained.tolist()):
                self.log_metric(f"critic/explained_variance_{number}", value)
            rose = float(explained.mean()) > self.best_explained + RISE
            self.best_explained = max(float(explained.mean()), self.best_explained)
            # A critic that explains nothing yet has not stopped rising: it has not begun.
            self.rollouts_without_rise = 0 if rose or self.best_explained <= RISE else self.rollouts_without_rise + 1
        if not self.warming_up:
            return
        if self.rollouts_without_rise >= PATIENCE or self.warmup_rollouts >= self.args.critic_warmup_max_steps:
            self.warming_up = False
        else:
            self.warmup_rollouts += 1
        self.log_metric("critic/warmup_rollouts", self.warmup_rollouts)

    # ---- the actor --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _actor_states(self, batch: MicroBatch) -> None:
        """States, targets, advantages and anchors; the images themselves are not needed any more."""
        conditioning = self.condition(batch.examples)
        states, noise, sigma = self._renoised(batch, "actor")
        data = batch.tensors.pop("final")[:, None].expand_as(noise)
        advantages = batch.tensors.pop("returns")[:, None] - self._values(states, sigma, conditioning)
        batch.tensors |= {"latents": states, "sigmas": sigma, "targets": velocity_between(data, noise), "advantages": advantages}
        if self.args.wasserstein_coefficient > 0:
            with self.model.reference():
                columns = zip(states.unbind(1), sigma.unbind(1), strict=True)
                anchors = [self.model(z, s, conditioning, guidance=True) for z, s in columns]
            batch.tensors["anchors"] = torch.stack(anchors, dim=1)

    def _weigh(self, rollout: list[MicroBatch]) -> None:
        """(3), over the rollout of all processes."""
        advantages = torch.cat([batch.tensors.pop("advantages") for batch in rollout])
        clip = self.args.advantage_clip
        clipped = advantages if clip is None else advantages.clamp(-clip, clip)
        weights = advantage_weights(clipped, self.args.weighting, self.args.temperature)
        good = self.accelerator.gather(torch.cat([batch.good for batch in rollout]))
        everyone = self.accelerator.gather(weights)[good]
        if self.args.normalize_weights:
            weights = weights / everyone[everyone.isfinite()].mean().clamp(min=1e-12)
        share = 0.0 if clip is None else self.accelerator.gather((advantages.abs() > clip).float()).mean()
        spread = self.accelerator.gather(advantages)[good].std(dim=0, correction=0)
        self.log_metric("advantage_clipped_share", share)
        for number, value in enumerate(spread.tolist()):
            self.log_metric(f"advantage_std_{number}", value)
        self.log_metric("weight_max", self.accelerator.gather(weights).max())
        for batch, part in zip(rollout, weights.split([len(b.examples) for b in rollout]), strict=True):
            batch.tensors["weights"] = part

    def micro_batch_losses(self, model: nn.Module, batch: MicroBatch, conditioning: Conditioning, state: int) -> torch.Tensor:
        """(4) at one state."""
        z, sigma, target, weight = (batch.tensors[name][:, state] for name in ("latents", "sigmas", "targets", "weights"))
        velocity = model(z, sigma, conditioning, guidance=True)
        losses = weight * (velocity - target).flatten(1).square().mean(dim=1)
        if self.args.wasserstein_coefficient == 0:
            return losses
        anchor = batch.tensors["anchors"][:, state]
        distance, length = (v.flatten(1).square().mean(dim=1) for v in (velocity - anchor, anchor))
        moved, of = (self.mean_of_good(v, batch.good) for v in (distance, length))
        self.log_metric("velocity_distance", (moved / of.clamp(min=1e-12)).sqrt())
        return losses + self.args.wasserstein_coefficient * distance

    # ---- files ------------------------------------------------------------------------------------------------------------

    def algorithm_state(self) -> dict[str, Any]:
        """The critic, its optimizer, and how far its warm-up has come."""
        if self.critic is None:
            return {}
        names = ("warming_up", "warmup_rollouts", "best_explained", "rollouts_without_rise")
        return {
            "critic": self.critic.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "warmup": {name: getattr(self, name) for name in names},
        }

    def load_algorithm_state(self, state: dict[str, Any]) -> None:
        """Take them up."""
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
            for name, value in state["warmup"].items():
                setattr(self, name, value)

    def extra_networks(self) -> dict[str, nn.Module]:
        """The critic, in `critic/`."""
        return {} if self.critic is None else {"critic": self.critic}

    def card_settings(self) -> dict[str, Any]:
        """What the card shows of the method."""
        args = self.args
        return {
            "weighting, temperature": f"{args.weighting}, {args.temperature:g}",
            "advantage clip, anchor": f"{args.advantage_clip}, {args.wasserstein_coefficient:g}",
            "critic": "none" if self.critic is None else f"{type(self.critic).__name__}, warm-up of {self.warmup_rollouts} rollouts",
            "images per prompt": args.num_generations,
        }
