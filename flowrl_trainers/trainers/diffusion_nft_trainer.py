"""DiffusionNFT (arXiv 2509.16117): the forward process learns from good images and unlearns bad ones, for any reward.

With images x of the old policy, at the states z of `RenoisingTrainer`, u = e - x, and the shaped reward A:

    (1)  r = clip(A, +-c) / (2 c) + 1/2,    c = advantage_clip
    (2)  v+ = v_old + beta (v_theta - v_old),    v- = v_old - beta (v_theta - v_old),    beta = branch_beta
    (3)  L+- = sigma^2 mean_d (v+- - u)^2 / W+-,    W+- = sigma mean_d |v+- - u|, at least 1e-5
    (4)  loss = c / beta [ r L+ + (1 - r) L- ] + reference_coefficient mean_d (v_theta - v_base)^2

(3) is the error of the clean estimate z - sigma v+-, over its own mean absolute value. Without `adaptive_weighting`
it is the paper's mean_d (v+- - u)^2, whose minimum is v_old + (2 / beta) Cov(r, u | z) where v_old is the mean of u.
In all of it v_old, v_base, r and W are not differentiated.

Near v_theta = v_old the *value* of the loss does not depend on r, but its gradient does; there it is free of beta.

From the code (NVlabs/DiffusionNFT) and not from the paper: W, the factor c / beta, the term to the base model. Ours:
the Euler sampler where the code has a second-order solver; levels that an evenly spaced draw picks from the sampler's,
which leaves each out as often; a `reference_coefficient` of 1e-2 for 1e-4; float32 where the code computes W in
float64; rewards shaped one by one, as in all our trainers; and exact resumption of the old policy.

The paper's loss holds in our time direction as it stands: sigma = t, v = e - x.
"""

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..flow import root_mean_square, velocity_between
from ..pipelines import Conditioning
from ..pipelines.checkpoints import CHECKPOINTS
from ..sampling.buffer import MicroBatch, Record
from .diffusion_nft_config import DiffusionNFTConfig
from .renoising_trainer import RenoisingRollout, RenoisingTrainer, Returns

logger = logging.getLogger(__name__)

SMALLEST_WEIGHT = 1e-5  # of W, as in the published code


@dataclass(frozen=True)
class DiffusionNFTRecord(Record):
    """What the loss needs, at K re-noised states of each image.

    Attributes:
        states: z, (B, K, ...).
        sigmas: Their levels, (B, K).
        targets: u = e - x, (B, K, ...).
        probabilities: r of (1), (B,).
        old_velocities: v_old at the states, (B, K, ...).
        base_velocities: v_base at the states, (B, K, ...); None without an anchor.
        base_lengths: |v_base| at the states, (B, K); None where nothing asks for v_base.
    """

    states: Tensor
    sigmas: Tensor
    targets: Tensor
    probabilities: Tensor
    old_velocities: Tensor
    base_velocities: Tensor | None
    base_lengths: Tensor | None


class DiffusionNFTTrainer(RenoisingTrainer[DiffusionNFTRecord]):
    """Fine-tunes a flow model to raise any reward, by matching the flow on its own images towards the better and away
    from the worse ones.
    """

    _name: ClassVar[str] = "DiffusionNFT"
    _tag_names: ClassVar[list[str]] = ["diffusion-nft"]
    _paper: ClassVar[dict[str, str] | None] = {
        "title": "DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
        "id": "2509.16117",
        "authors": "Zheng, K. and Chen, H. and Ye, H. and Wang, H. and Zhang, Q. and Jiang, K. and Su, H. and "
        "Ermon, S. and Zhu, J. and Liu, M.-Y.",
    }
    config_class = DiffusionNFTConfig
    record_class = DiffusionNFTRecord

    args: DiffusionNFTConfig

    def set_up(self) -> None:
        """The old policy, and advice."""
        super().set_up()
        if self.flow.guided:
            logger.warning(
                "The rollouts are guided, but DiffusionNFT is made for rollouts without guidance: with it, learning "
                "is reported to be slow or to fail. Set `guidance_scale` to 1.0 (0.0 for Z-Image)."
            )
        known = CHECKPOINTS.get(self.flow.name or "")
        if known is not None and known.distilled:
            logger.warning(
                "%s is distilled, which DiffusionNFT was not made for: its velocity is not the mean of e - x, so that "
                "pictures may blur. Prefer an undistilled checkpoint, or `ACFlowTrainer` with `target='fixed'` and a "
                "critic.",
                known.id,
            )

    def drawing_policy(self) -> AbstractContextManager[None]:
        """The old one."""
        return self.old_policy()

    # ---- once per rollout ------------------------------------------------------------------------------------------

    def prepare(self, rollout: list[MicroBatch[RenoisingRollout]]) -> list[MicroBatch[DiffusionNFTRecord]]:
        """(1), and the states, the targets and the velocities of the old policy and of the base model there.

        Nothing is returned where no prompt's images earned differently.
        """
        shaped = self._shape(rollout)
        if not self._has_signal(shaped):
            return []
        batches = self._without_bad(shaped, self._records(shaped))
        r = torch.cat([batch.record.probabilities for batch in batches])
        good = torch.cat([batch.good for batch in batches])
        self.metrics.note("reward_probability", self.mean_of_good(r, good))
        decided = ((r == 0) | (r == 1)).to(r.dtype)
        self.metrics.note("advantage_clipped_share", self.mean_of_good(decided, good))
        return batches

    @torch.no_grad()
    def _records(self, shaped: list[MicroBatch[Returns]]) -> list[MicroBatch[DiffusionNFTRecord]]:
        """The images with what the loss needs of them."""
        args, c = self.args, self.args.advantage_clip
        probabilities = [batch.record.returns.clamp(-c, c) / (2 * c) + 0.5 for batch in shaped]
        renoised = [self._renoised(batch, "states") for batch in shaped]
        columns = [states for states, _, _ in renoised], [sigma for _, _, sigma in renoised]
        with self.old_policy():
            old = self.at_once(partial(self.velocities, guidance=args.loss_guidance), shaped, *columns)
        base: list[Tensor] | list[None] = [None] * len(shaped)
        if args.needs_base:
            base = self.at_once(partial(self.base_velocities, guidance=args.loss_guidance), shaped, *columns)
        return [
            batch.with_record(
                DiffusionNFTRecord(
                    states=states,
                    sigmas=sigma,
                    targets=velocity_between(batch.record.final[:, None], e),
                    probabilities=r,
                    old_velocities=of_old,
                    base_velocities=of_base if args.reference_coefficient > 0 else None,
                    base_lengths=None if of_base is None else root_mean_square(of_base, 2),
                )
            )
            for batch, r, (states, e, sigma), of_old, of_base in zip(
                shaped, probabilities, renoised, old, base, strict=True
            )
        ]

    # ---- the loss --------------------------------------------------------------------------------------------------

    def micro_batch_losses(
        self, model: nn.Module, batch: MicroBatch[DiffusionNFTRecord], conditioning: Conditioning, state: int
    ) -> Tensor:
        """(4) at one state."""
        args, record, r = self.args, batch.record, batch.record.probabilities
        z, sigma, u, v_old = (
            t[:, state] for t in (record.states, record.sigmas, record.targets, record.old_velocities)
        )
        v = model(z, sigma, conditioning, guidance=args.loss_guidance)
        step = args.branch_beta * (v - v_old)
        positive, negative = (self._branch_loss(step * sign - (u - v_old), sigma) for sign in (1, -1))
        losses = args.advantage_clip / args.branch_beta * (r * positive + (1 - r) * negative)
        moved, of = (self.mean_of_good(t.flatten(1).square().mean(dim=1), batch.good) for t in (v - v_old, v_old))
        self.metrics.note("old_distance", (moved / of.clamp(min=1e-12)).sqrt())
        if record.base_velocities is not None:
            distance = self._distance_to_base(v, record.base_velocities[:, state], batch.good)
            losses = losses + args.reference_coefficient * distance
            omega = sigma / (u - v_old).flatten(1).abs().mean(dim=1) if args.adaptive_weighting else sigma.new_ones(1)
            self.metrics.note("effective_eta", self.mean_of_good(omega, batch.good) / args.reference_coefficient)
        if record.base_lengths is not None:
            losses = losses + self._norm_guard(v, record.base_lengths[:, state], sigma, batch.good)
        return losses

    def _branch_loss(self, error: Tensor, sigma: Tensor) -> Tensor:
        """(3), (B,), from v+- - u, (B, ...), and the levels (B,)."""
        square = error.flatten(1).square().mean(dim=1)
        if not self.args.adaptive_weighting:
            return square
        weight = (sigma * error.detach().flatten(1).abs().mean(dim=1)).clamp(min=SMALLEST_WEIGHT)
        return sigma**2 * square / weight

    # ---- files -----------------------------------------------------------------------------------------------------

    def card_settings(self) -> dict[str, Any]:
        """What the card shows of the method."""
        args = self.args
        return {
            "beta of the branches": args.branch_beta,
            "advantage clip, reference coefficient": f"{args.advantage_clip:g}, {args.reference_coefficient:g}",
            "error": "adaptive" if args.adaptive_weighting else "of the velocity",
            "images per prompt": args.num_generations,
        } | self.card_old_policy(draws=True)
