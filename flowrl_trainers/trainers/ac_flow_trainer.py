"""AC-Flow (arXiv 2510.18072, as reconstructed from its abstract): actor-critic fine-tuning from any reward.

With images x of the current model, fresh noise e and a level sigma, at the state z = (1 - sigma) x + sigma e:

    (1)  r~ = clip( (r - mean of its prompt) / std of all, +-reward_clip )
    (2)  critic   V(z, sigma, prompt) regressed onto r~, which is the return of every state; by default, V = c s with
                  s the shaped reward of the clean estimate z - sigma v_old(z), and c fitted level by level
    (3)  A = clip( r~ - V, +-advantage_clip ),    w = f(A) / mean f(A)
    (4)  actor    mean_d w (v_theta(z) - (e - x))^2 + alpha mean_d (v_theta(z) - v_base(z))^2

whose minimum, state by state, is (E[w | z] u_w + alpha v_base) / (E[w | z] + alpha), u_w the weighted mean of e - x.
In (3) and (4), V, w and v_base are not differentiated.

With `target="fixed"`, (4) is a regression to a target that does not depend on v_theta, as in RAM (arXiv 2605.10759):

    (5)  1 / eta mean_d (v_theta(z) - [ v_anchor(z) + eta A / temperature ((e - x) - v_old(z)) ])^2

v_anchor is v_base, or v_old, which makes it the velocity form of DiffusionNFT (arXiv 2509.16117). Where v_old =
v_theta its gradient is that of (4) with linear weights and alpha = 1 / eta; it is bounded below for bad images too.

AWM (arXiv 2509.25050) is (4) with linear weights times a level weight that is not differentiated, and a pull towards
the old policy, `old_policy_coefficient` mean_d (v_theta(z) - v_old(z))^2:

    (6)  omega = sigma m^(huber_power - 1), m = mean_d (v_theta(z) - (e - x))^2, or sigma, or 1

Only the abstract and reviews of 2510.18072 could be read. They name: reward shaping for stable value learning, a
critic of intermediate states that is regressed onto the final reward, a bounded advantage, a warm-up of the critic,
weights from the critic, a Wasserstein-2 regulariser, and ORW-CFM-W2 as a special case (V = 0 and no shaping, clipping
or normalising). All else is our choice: the formulas (1) and (3); re-noised states (on the sampler's own path a
perfect critic leaves no advantage); the same noise levels for critic and actor; the critics, and the warm-up of those
that are networks, which lasts until their explained variance on a new rollout no longer rises; the velocity distance
as the Wasserstein term, as in ORW-CFM-W2; the guided velocity throughout, so that guidance is not distilled into the
weights.

The paper runs t = 1 - sigma with v_paper = -v; squares do not see the sign.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput

from ..flow import (
    advantage_weights,
    clean_estimate,
    expand_like,
    explained_variance,
    root_mean_square,
    velocity_between,
)
from ..networks import BackboneCritic, critic
from ..networks.warmup import Warmup
from ..pipelines import Conditioning
from ..sampling.buffer import MicroBatch, Record
from ..sampling.draws import ImageKey
from ..sampling.sharding import asks_for_sharding
from .ac_flow_config import ACFlowConfig
from .estimate_fit import EstimateFit
from .renoising_trainer import RenoisingRollout, RenoisingTrainer, Returns

logger = logging.getLogger(__name__)

MAX_CRITIC_GRAD_NORM = 1.0
SMALLEST_ERROR = 1e-10  # added to a mean squared error before its power is taken, as in the code of arXiv 2509.25050


@dataclass(frozen=True)
class ACFlowRecord(Record):
    """What the loss needs, at K re-noised states of each image.

    Attributes:
        states: z, (B, K, ...).
        sigmas: Their levels, (B, K).
        targets: e - x, or the fixed target of (5), (B, K, ...).
        weights: w of (3), (B, K); None with a fixed target, which holds the advantage.
        base_velocities: v_base at the states, (B, K, ...); None without an anchor.
        old_velocities: v_old at the states, (B, K, ...); None where no term pulls towards it.
        base_lengths: |v_base| at the states, (B, K); None where nothing asks for v_base.
    """

    states: Tensor
    sigmas: Tensor
    targets: Tensor
    weights: Tensor | None
    base_velocities: Tensor | None
    old_velocities: Tensor | None = None
    base_lengths: Tensor | None = None


class ACFlowTrainer(RenoisingTrainer[ACFlowRecord]):
    """Fine-tunes a flow model to raise any reward, by flow matching on its own images, weighted by a critic's
    advantage.

    Args:
        critic: Beside the arguments of `FlowRLTrainer`, a module called with latents (B, ...), sigma (B,), prompt
            features (B, L, D) and their mask (B, L), which returns values (B,); it comes with `critic="module"` in
            `args`.
    """

    _name: ClassVar[str] = "AC-Flow"
    _tag_names: ClassVar[list[str]] = ["ac-flow"]
    _paper: ClassVar[dict[str, str] | None] = {
        "title": "Fine-tuning Flow Matching Generative Models with Intermediate Feedback",
        "id": "2510.18072",
        "authors": "Fan, J. and Cheng, C. and Shen, S. and Zhou, X. and Liu, G.",
        "note": ", as reconstructed from its abstract",
    }
    config_class = ACFlowConfig
    record_class = ACFlowRecord

    args: ACFlowConfig

    def __init__(self, *args: Any, critic: nn.Module | None = None, **kwargs: Any) -> None:
        self.given_critic = critic
        super().__init__(*args, **kwargs)

    def check_arguments(self, args: Any, peft_config: LoraConfig | None) -> None:
        """Raises `ValueError` for a critic that is passed where the settings name another, and for one that they ask
        for and that is not passed.
        """
        super().check_arguments(args, peft_config)
        if self.given_critic is not None and args.critic != "module":
            raise ValueError(
                f"`critic` is passed, but `args.critic` is {args.critic!r}: set it to 'module', or leave `critic` out."
            )
        if self.given_critic is None and args.critic == "module":
            raise ValueError(
                "`args.critic` is 'module', but no `critic` is passed: pass one to the trainer in Python, or choose "
                "'reward_of_estimate', 'backbone', 'convolutional' or 'none'."
            )
        if args.critic == "backbone" and asks_for_sharding():
            raise ValueError(
                "`critic` ('backbone') shares the weights of the whole network, which FSDP2 spreads over the "
                "processes: take another one, such as 'reward_of_estimate', or `--accelerate_config ddp`."
            )

    def set_up(self) -> None:
        """The old policy; the critic, its warm-up and its optimizer. Trainer does not see the critic, as it takes
        steps of its own.
        """
        super().set_up()
        self.critic = self._make_critic()
        of_estimates = self.args.critic == "reward_of_estimate"
        self.estimate_fit = EstimateFit(self.args.device) if of_estimates else None
        self.warmup = Warmup(0 if self.critic is None else self.args.critic_warmup_max_steps)
        if self.critic is not None:
            self.same_on_all_processes(self.critic)
            self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), lr=self.args.critic_learning_rate)

    def _make_critic(self) -> nn.Module | None:
        if self.args.critic in ("none", "reward_of_estimate"):
            return None
        if self.model.is_sharded and self.flow.features_need_network:
            raise ValueError(
                f"`critic` ({self.args.critic!r}) reads what the network makes of a class, which FSDP2 spreads over "
                "the processes: take 'reward_of_estimate' or 'none', or `--accelerate_config ddp`."
            )
        if self.given_critic is not None:
            return self.tried("critic", self.given_critic, ())
        if self.args.critic == "convolutional":
            return critic(*self.latent_and_prompt_sizes()).to(self.args.device)
        key = ImageKey(0, 0, 0)
        made = BackboneCritic(
            self.model.transformer if self.model.frozen is None else self.model.frozen,
            partial(self.flow.velocity, guidance=False),
            self.flow.last_layer,
            (self.initial_latents([key], "shape"), self.condition([self.train_dataset[key]])),
            self.flow.lora_target_modules,
            self.flow.lora_exclude_modules,
            self._tokens if self.flow.last_layer_varies else None,
        )
        if self.args.activation_checkpointing:
            made.backbone.enable_gradient_checkpointing()
        return made.to(self.args.device)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """See `FlowRLTrainer.train`; says so where the run ended before the critic's warm-up did."""
        output = super().train(*args, **kwargs)
        if self.warmup.running and self.best_step is None:
            logger.warning(
                "The run ended while the critic still warmed up, which takes %d rollouts at most: the model is as it "
                "was. Raise `max_steps`, or lower `critic_warmup_max_steps`.",
                self.args.critic_warmup_max_steps,
            )
        elif self.warmup.running:
            logger.warning("The best checkpoint is one of the critic's warm-up: the model is as it was.")
        return output

    # ---- the rollout -----------------------------------------------------------------------------------------------

    def drawing_policy(self) -> AbstractContextManager[None]:
        """The one that `rollout_policy` names."""
        return self.old_policy() if self.args.rollout_policy == "old" else super().drawing_policy()

    # ---- once per rollout ------------------------------------------------------------------------------------------

    def prepare(self, rollout: list[MicroBatch[RenoisingRollout]]) -> list[MicroBatch[ACFlowRecord]]:
        """(1) to (3): scores, the critic's steps, and the states, targets, weights and anchors of (4).

        Nothing is returned while the critic warms up, and where no prompt's images earned differently.
        """
        shaped = self._shape(rollout)
        if self.critic is not None:
            with self.metrics.timed("critic"):
                self._judge_critic(shaped)
                for step in range(self.args.critic_steps):
                    self._critic_step(shaped, f"critic step {step}")
            self.critic.eval()
        self.metrics.note("critic/warming_up", float(self.warmup.running))
        if self.warmup.running or not self._has_signal(shaped):
            return []
        return self._without_bad(shaped, self._actor_batches(shaped))

    # ---- the critic ------------------------------------------------------------------------------------------------

    def _values(self, states: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """V (B, K) at states (B, K, ...) and levels (B, K); zero without a critic."""
        if self.critic is None:
            return torch.zeros_like(sigma)
        if self.args.critic_bins_in_one_call:
            repeated = {name: value.repeat_interleave(sigma.shape[1], dim=0) for name, value in conditioning.items()}
            return self._judged(states.flatten(0, 1), sigma.flatten(), repeated).unflatten(0, sigma.shape)
        columns = zip(states.unbind(1), sigma.unbind(1), strict=True)
        return torch.stack([self._judged(z, s, conditioning) for z, s in columns], dim=1)

    def _judged(self, z: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """V (B,) at states (B, ...) and levels (B,)."""
        assert self.critic is not None
        if isinstance(self.critic, BackboneCritic):
            with self.accelerator.autocast():
                return self.critic(z, sigma, conditioning)
        features, mask = self.flow.prompt_features(conditioning)
        return self.critic(z, sigma, features.float(), mask)

    def _tokens(self, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Which tokens (B, L) of B prompts count."""
        return self.flow.prompt_features(dict(conditioning))[1]

    def _critic_step(self, shaped: list[MicroBatch[Returns]], purpose: str) -> None:
        """One update of (2) on freshly re-noised images of all processes."""
        assert self.critic is not None
        self.critic.train()
        self.critic_optimizer.zero_grad()  # of a step that an error broke off
        parameters, losses = list(self.critic.parameters()), []
        for loss in self._critic_losses(shaped, purpose):
            loss.backward()
            losses.append(loss.detach())
        if self.args.world_size > 1:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            bucket = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
            for gradient, mean in zip(gradients, bucket.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_CRITIC_GRAD_NORM)
        if norm.isfinite():
            self.critic_optimizer.step()
        self.critic_optimizer.zero_grad()
        self.metrics.note("critic/loss", self.accelerator.gather(torch.stack(losses).sum()).mean())

    def _critic_losses(self, shaped: list[MicroBatch[Returns]], purpose: str) -> Iterator[Tensor]:
        """The share of each micro-batch in the mean squared error; of each bin, where these are called one by one."""
        for batch in shaped:
            states, _, sigma = self._renoised(batch, purpose)
            conditioning, bins = self.condition(batch.examples), sigma.shape[1]
            at_once = bins if self.args.critic_bins_in_one_call else 1
            for z, levels in zip(states.split(at_once, dim=1), sigma.split(at_once, dim=1), strict=True):
                values = self._values(z, levels, conditioning)
                error = (values - batch.record.returns[:, None]).square().sum(dim=1) / bins
                yield torch.where(batch.good, error, 0.0).mean() / len(shaped)

    @torch.no_grad()
    def _judge_critic(self, shaped: list[MicroBatch[Returns]]) -> None:
        """Explained variance, bin by bin, on a rollout that the critic has not learned from; steers the warm-up."""
        assert self.critic is not None
        self.critic.eval()
        found = []
        for batch in shaped:
            states, _, sigma = self._renoised(batch, "judge")
            found.append(self._values(states, sigma, self.condition(batch.examples)))
        values, returns = self._of_all(torch.cat(found), shaped)
        explained = self._note_explained(values, returns)
        was_running = self.warmup.running
        self.warmup.observe(None if explained is None else float(explained.mean()))
        if was_running:
            self.metrics.note("critic/warmup_rollouts", self.warmup.rollouts)

    def _of_all(self, values: Tensor, shaped: list[MicroBatch[Returns]]) -> tuple[Tensor, Tensor]:
        """Values (M, K) and returns (M,) of the good images of all processes, from the values of this one's."""
        good = self.accelerator.gather(torch.cat([batch.good for batch in shaped]))
        returns = self.accelerator.gather(torch.cat([batch.record.returns for batch in shaped]))
        return self.accelerator.gather(values)[good], returns[good]

    def _note_explained(self, values: Tensor, returns: Tensor) -> Tensor | None:
        """The explained variance of each bin (K,), which is noted; None where all returns are equal."""
        explained = explained_variance(returns[:, None].expand_as(values), values)
        if not explained.isfinite().all():
            return None
        for number, value in enumerate(explained.tolist()):
            self.metrics.note(f"critic/explained_variance_{number}", value)
        return explained

    def _values_of_estimates(
        self, fit: EstimateFit, shaped: list[MicroBatch[Returns]], estimates: list[Tensor], levels: list[Tensor]
    ) -> list[Tensor]:
        """V (B, K) of every micro-batch from the clean estimates (B, K, ...) at its states.

        Args:
            fit: Of earlier rollouts; it learns from this one afterwards.
            shaped: The images as they were scored.
            estimates: Of each micro-batch.
            levels: The noise levels (B, K) of each.
        """
        together = torch.cat(estimates)
        examples, rows = [e for batch in shaped for e in batch.examples], self.prompt_rows(shaped)
        with self.placement.network_away():  # once for all bins
            columns = [self.scorer.score(column, examples) for column in together.unbind(1)]
        unknown = [torch.where(scores.isinf(), torch.nan, scores) for scores in columns]
        seen = torch.stack([self._shaped(scores, rows) for scores in unknown], dim=1)
        sigma = torch.cat(levels)
        values = fit.factors(sigma) * seen
        self._note_explained(*self._of_all(values, shaped))
        fit.observe(*self._of_all(seen, shaped), self._of_all(sigma, shaped)[0])
        return list(values.split([len(batch.examples) for batch in shaped]))

    # ---- the actor -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _actor_batches(self, shaped: list[MicroBatch[Returns]]) -> list[MicroBatch[ACFlowRecord]]:
        """States, targets, weights and anchors; the images themselves are not needed any more."""
        renoised = [self._renoised(batch, "actor") for batch in shaped]
        columns = [states for states, _, _ in renoised], [sigma for _, _, sigma in renoised]
        base: list[Tensor] | list[None] = [None] * len(shaped)
        old: list[Tensor] | list[None] = [None] * len(shaped)
        guidance = self.args.loss_guidance
        if self.args.needs_base:
            base = self.at_once(partial(self.base_velocities, guidance=guidance), shaped, *columns)
        if self.args.needs_old:
            with self.old_policy():
                old = self.at_once(partial(self.velocities, guidance=guidance), shaped, *columns)
        if self.estimate_fit is not None:
            triples = zip(renoised, old, strict=True)
            estimates = [clean_estimate(z, v, sigma) for (z, _, sigma), v in triples if v is not None]
            values = self._values_of_estimates(self.estimate_fit, shaped, estimates, columns[1])
        else:
            values = [
                self._values(states, sigma, self.condition(batch.examples))
                for batch, (states, _, sigma) in zip(shaped, renoised, strict=True)
            ]
        pairs = zip(shaped, values, strict=True)
        advantages = torch.cat([batch.record.returns[:, None] - value for batch, value in pairs])
        weights = self._weights(advantages, torch.cat([batch.good for batch in shaped]))
        sizes = [len(batch.examples) for batch in shaped]
        parts = zip(shaped, renoised, weights.split(sizes), base, old, strict=True)
        return [
            batch.with_record(
                self._record(states, sigma, velocity_between(batch.record.final[:, None], e), part, of_base, of_old)
            )
            for batch, (states, e, sigma), part, of_base, of_old in parts
        ]

    def _record(
        self, states: Tensor, sigma: Tensor, u: Tensor, weights: Tensor, base: Tensor | None, old: Tensor | None
    ) -> ACFlowRecord:
        """What the loss needs of the images of a micro-batch.

        Args:
            states: z, (B, K, ...).
            sigma: Their levels, (B, K).
            u: e - x, (B, K, ...).
            weights: w of (3), (B, K).
            base: v_base at the states, (B, K, ...), where anything asks for it.
            old: v_old there.
        """
        args, fixed, targets = self.args, self.args.target == "fixed", u
        if fixed:
            anchor = base if args.target_anchor == "base" else old
            assert anchor is not None
            assert old is not None
            targets = anchor + args.reward_multiplier * expand_like(weights, u) * (u - old)
        return ACFlowRecord(
            states=states,
            sigmas=sigma,
            targets=targets,
            weights=None if fixed else weights,
            base_velocities=base if args.wasserstein_coefficient else None,
            old_velocities=old if args.old_policy_coefficient > 0 else None,
            base_lengths=None if base is None else root_mean_square(base, 2),
        )

    def _weights(self, advantages: Tensor, good: Tensor) -> Tensor:
        """(3), over the rollout of all processes: w (M, K) of this process's advantages (M, K); good: (M,)."""
        clip = self.args.advantage_clip
        clipped = advantages if clip is None else advantages.clamp(-clip, clip)
        assert self.args.weighting is not None  # resolved by the configuration
        weights = advantage_weights(clipped, self.args.weighting, self.args.temperature)
        good = self.accelerator.gather(good)
        everyone = self.accelerator.gather(weights)[good]
        if self.args.normalize_weights:
            weights = weights / everyone[everyone.isfinite()].mean().clamp(min=1e-12)
        share = 0.0 if clip is None else self.accelerator.gather((advantages.abs() > clip).float()).mean()
        spread = self.accelerator.gather(advantages)[good].std(dim=0, correction=0)
        self.metrics.note("advantage_clipped_share", share)
        for number, value in enumerate(spread.tolist()):
            self.metrics.note(f"advantage_std_{number}", value)
        self.metrics.note("weight_max", self.accelerator.gather(weights).max())
        return weights

    # ---- the loss --------------------------------------------------------------------------------------------------

    def micro_batch_losses(
        self, model: nn.Module, batch: MicroBatch[ACFlowRecord], conditioning: Conditioning, state: int
    ) -> Tensor:
        """(4), or (5) with a fixed target, at one state."""
        args, record = self.args, batch.record
        z, sigma, target = (t[:, state] for t in (record.states, record.sigmas, record.targets))
        v = model(z, sigma, conditioning, guidance=args.loss_guidance)
        error = (v - target).flatten(1).square().mean(dim=1)
        omega = None if args.loss_weighting == "none" else self._level_weights(sigma, error.detach())
        if record.weights is None:
            losses = error / args.reward_multiplier
        else:
            w = record.weights[:, state]
            losses = (w if omega is None else w * omega) * error
        if args.base_pull > 0:
            mean_omega = 1.0 if omega is None else self.mean_of_good(omega, batch.good)
            self.metrics.note("effective_eta", mean_omega / (args.temperature * args.base_pull))
        if record.base_velocities is not None:
            distance = self._distance_to_base(v, record.base_velocities[:, state], batch.good)
            losses = losses + (args.wasserstein_coefficient or 0.0) * distance
        if record.old_velocities is not None:
            distance = (v - record.old_velocities[:, state]).flatten(1).square().mean(dim=1)
            losses = losses + args.old_policy_coefficient * distance
        if record.base_lengths is not None:
            losses = losses + self._norm_guard(v, record.base_lengths[:, state], sigma, batch.good)
        return losses

    def _level_weights(self, sigma: Tensor, error: Tensor) -> Tensor:
        """The weights omega of (6), (B,), from the levels and the mean squared errors (B,)."""
        if self.args.loss_weighting == "sigma":
            return sigma
        return sigma * (error + SMALLEST_ERROR) ** (self.args.huber_power - 1)

    # ---- files -----------------------------------------------------------------------------------------------------

    def algorithm_state(self) -> dict[str, Any]:
        """The old policy, the critic, its optimizer and warm-up, and what was fitted to the rewards of estimates."""
        state = super().algorithm_state()
        if self.estimate_fit is not None:
            state["estimate_fit"] = self.estimate_fit.state_dict()
        if self.critic is not None:
            state |= {
                "critic": self.critic.state_dict(),
                "critic_optimizer": self.critic_optimizer.state_dict(),
                "warmup": self.warmup.state_dict(),
            }
        return state

    def load_algorithm_state(self, state: Mapping[str, Any]) -> None:
        """Take them up."""
        super().load_algorithm_state(state)
        if self.estimate_fit is not None:
            self.estimate_fit.load_state_dict(state["estimate_fit"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
            self.warmup.load_state_dict(state["warmup"])

    def extra_networks(self) -> dict[str, nn.Module]:
        """The critic, in `critic/`."""
        return {} if self.critic is None else {"critic": self.critic}

    def card_settings(self) -> dict[str, Any]:
        """What the card shows of the method."""
        args, warmup = self.args, self.warmup.rollouts
        shown: dict[str, Any] = {
            "weighting, temperature": f"{args.weighting}, {args.temperature:g}",
            "advantage clip, anchor": f"{args.advantage_clip}, {args.wasserstein_coefficient:g}",
            "critic": args.critic.replace("_", " ")
            if self.critic is None
            else f"{type(self.critic).__name__}, warm-up of {warmup} rollouts",
            "images per prompt": args.num_generations,
        }
        if args.target == "fixed":
            shown["fixed target"] = (
                f"from the {args.target_anchor} velocity, reward multiplier {args.reward_multiplier:g}"
            )
        return shown | self.card_old_policy(args.rollout_policy == "old")
