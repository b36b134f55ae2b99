"""`RenoisingConfig`: the settings of trainers that noise their own images again."""

from dataclasses import dataclass
from typing import Annotated, Literal

from transformers.hf_argparser import HfArg

from ..cost import Call, Drawing, Kind, Phase
from ..flow.advantages import Spread
from .base_config import FlowRLConfig
from .config_checks import Range


@dataclass
class RenoisingConfig(FlowRLConfig):
    r"""Settings shared by the trainers that match the flow on their own, re-noised images, beside those of
    `FlowRLConfig`.

    Different from `FlowRLConfig`: `num_generations` 8.
    """

    num_generations: Annotated[int, Range(at_least=1)] = HfArg(
        default=8,
        help="The number of images per prompt in a rollout, over which rewards are centred; at least 2 with shaping.",
    )
    reward_shaping: Literal["standardise", "none"] = HfArg(
        default="standardise",
        help="'standardise' takes the mean of its prompt's images from each reward, divides by the standard "
        "deviation of the rollout and clips; several rewards are shaped one by one, then summed with their weights. "
        "'none' leaves rewards as they are.",
    )
    reward_std: Spread = HfArg(
        default="centred",
        help="The standard deviation that shaping divides by: 'centred' of the rewards less the mean of their "
        "prompt, 'raw' of the rewards as they came, as in the code of RAM, AWM and DiffusionNFT. The second is larger "
        "by what prompts differ, so that learning is slower.",
    )
    reward_clip: Annotated[float, Range(above=0)] | None = HfArg(
        default=5.0,
        help="Shaped rewards are clipped to plus and minus this many standard deviations; None for no bound.",
    )
    timestep_bins: Annotated[int, Range(at_least=1)] = HfArg(
        default=4,
        help="The re-noised states per image: the noise levels are split into so many bins, and one is drawn from "
        "each.",
    )
    timestep_sampling: Literal["uniform", "logit_normal", "pipeline", "noisy", "steps", "noisy_steps"] = HfArg(
        default="uniform",
        help="The distribution of noise levels, everywhere alike: uniform; the logit-normal one of Stable Diffusion "
        "3; 'pipeline', as many between any two neighbouring steps of the sampler, uniform in between; 'noisy', with "
        "a density that grows in proportion to the level; 'steps', `timestep_bins` different ones of the sampler's "
        "own levels; 'noisy_steps', those levels with probabilities in proportion to them, repeats included.",
    )
    loss_guidance: bool = HfArg(
        default=True,
        help="Whether loss, anchors and old policy take the guided velocity, so that guidance is not distilled into "
        "the weights, or the conditional one alone, as in the papers of RAM, AWM and DiffusionNFT.",
    )
    old_policy_decay: Annotated[float, Range(at_least=0, below=1)] = HfArg(
        default=0.0,
        help="The share d of the old policy's weights that stays when it follows the trained ones, before each "
        "rollout: old = d old + (1 - d) present. 0 copies them, and needs no memory.",
    )
    old_policy_ramp: Annotated[float, Range(above=0)] | None = HfArg(
        default=None,
        help="After n updates the share is at most this times n, less `old_policy_flat`, until it reaches "
        "`old_policy_decay`; None for that share from the start.",
    )
    old_policy_flat: Annotated[int, Range(at_least=0)] = HfArg(
        default=0, help="The number of updates during which the old policy is copied before that."
    )
    norm_guard: Annotated[float, Range(at_least=0)] = HfArg(
        default=0.0,
        help="The weight of a penalty on velocities that are longer than the base's, relu(|v| / |v_base| - 1)^2 at "
        "each state: rewards inflate them by 5 to 15 percent. 0 for none. Our form of the idea of arXiv 2606.27771.",
    )

    def old_decay(self, updates: int) -> float:
        """The share of the old policy's weights that stays before the rollout after so many updates."""
        since = updates - self.old_policy_flat
        if since < 0 or updates == 0:
            return 0.0
        return (
            self.old_policy_decay
            if self.old_policy_ramp is None
            else min(self.old_policy_ramp * since, self.old_policy_decay)
        )

    def matching_calls(self, drawing: Drawing, *, needs_base: bool, needs_old: bool) -> list[Call]:
        """The velocities at the K = `timestep_bins` re-noised states of every image: of base, old policy and model.

        Args:
            drawing: See `Drawing`.
            needs_base: Whether that of the base is needed.
            needs_old: Whether that of the old policy is.
        """
        size, states = self.per_device_train_batch_size, self.timestep_bins * self.micro_steps_per_rollout
        calls: list[Call] = []
        for kind, needed in ((Kind.BASE, needs_base), (Kind.FORWARD, needs_old)):
            if needed:
                calls += drawing.velocities(
                    kind,
                    self.images_per_device,
                    self.images_at_once,
                    self.timestep_bins,
                    Phase.TARGET,
                    guidance=self.loss_guidance,
                )
        updates = states * self.num_iterations
        return calls + drawing.velocity(Kind.TRAIN, size, updates, Phase.UPDATE, guidance=self.loss_guidance)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_shaping == "standardise" and self.num_generations < 2:
            raise ValueError(
                f"`num_generations` ({self.num_generations}) must be at least 2: shaped rewards are measured against "
                "the other images of their prompt."
            )
        if self.timestep_sampling == "steps" and self.timestep_bins > self.num_inference_steps:
            raise ValueError(
                f"`timestep_bins` ({self.timestep_bins}) must be at most `num_inference_steps` "
                f"({self.num_inference_steps}) with `timestep_sampling='steps'`, which draws different levels of the "
                "sampler: lower it, or take 'noisy_steps'."
            )
        if self.old_policy_decay == 0 and (self.old_policy_ramp is not None or self.old_policy_flat > 0):
            raise ValueError(
                "`old_policy_ramp` and `old_policy_flat` have no effect with an `old_policy_decay` of 0, which copies "
                "the weights before every rollout: leave them out, or raise it."
            )
