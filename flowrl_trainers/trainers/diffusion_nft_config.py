"""`DiffusionNFTConfig`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from transformers.hf_argparser import HfArg

from ..cost import Call, Drawing
from .config_checks import Range
from .renoising_config import RenoisingConfig


@dataclass
class DiffusionNFTConfig(RenoisingConfig):
    r"""Settings of `DiffusionNFTTrainer`, beside those of `RenoisingConfig`.

    Different from `RenoisingConfig`: `guidance_scale` 1, `timestep_sampling` "steps", `loss_guidance` False,
    `old_policy_decay` 0.5 with an `old_policy_ramp` of 0.001. The published runs on Stable Diffusion 3.5 Medium have
    24 images per prompt, 9 of 10 levels, a learning rate of 3e-4, `reward_std="raw"` and a `reference_coefficient` of
    1e-4.
    """

    learning_rate: float = HfArg(default=1e-4, help="The learning rate. Published: 3e-4.")
    guidance_scale: Annotated[float, Range(at_least=0)] | None = HfArg(
        default=1.0,
        help="The guidance scale of rollouts and evaluation; 1, the default, is off, as published: with guidance, "
        "learning is reported to be slow or to fail. 0 for Z-Image. None for the pipeline's default.",
    )
    timestep_sampling: Literal["uniform", "logit_normal", "pipeline", "noisy", "steps", "noisy_steps"] = HfArg(
        default="steps",
        help="The distribution of noise levels: 'steps', as published, takes `timestep_bins` different ones of the "
        "sampler's own levels; for the others see `RenoisingConfig`.",
    )
    loss_guidance: bool = HfArg(
        default=False,
        help="Whether loss, anchor and old policy take the guided velocity; as published, they take the conditional "
        "one.",
    )
    old_policy_decay: Annotated[float, Range(at_least=0, below=1)] = HfArg(
        default=0.5,
        help="The largest share d of the old policy's weights that stays when it follows the trained ones, before "
        "each rollout. Published: 0.5, and 0.999 for OCR; 0 copies the weights.",
    )
    old_policy_ramp: Annotated[float, Range(above=0)] | None = HfArg(
        default=0.001,
        help="After n updates the share is at most this times n, less `old_policy_flat`; None for `old_policy_decay` "
        "from the start. Published: 0.001, and 0.0075 for OCR, there after 75 updates of copies.",
    )
    branch_beta: Annotated[float, Range(at_least=1e-3)] = HfArg(
        default=1.0,
        help="The paper's beta: how far the positive and the negative branch lie from the old policy, as multiples "
        "of v - v_old. Where the loss is smallest v is 2 / beta times the reinforcement direction away, so smaller is "
        "faster and less stable. Published: 1, and 0.1 for OCR and for several rewards.",
    )
    advantage_clip: Annotated[float, Range(at_least=1e-3)] = HfArg(
        default=5.0,
        help="The advantage c at which an image is wholly positive, and -c at which it is wholly negative, in "
        "standard deviations of the reward: r = clip(A, -c, c) / (2 c) + 1/2.",
    )
    adaptive_weighting: bool = HfArg(
        default=True,
        help="Whether the error of each branch is that of the clean estimate, divided by its own mean absolute error, "
        "as in the published code; no takes the plain squared error of the velocity.",
    )
    reference_coefficient: Annotated[float, Range(at_least=0)] = HfArg(
        default=1e-2,
        help="The weight of the mean squared distance to the base velocity; 0 for none. Published: 1e-4, which is "
        "reported to change nothing.",
    )

    @property
    def keeps_old_policy(self) -> bool:
        """It draws every rollout."""
        return self.old_policy_decay > 0

    @property
    def needs_base(self) -> bool:
        """Whether (4) or the guard asks for the base velocity."""
        return self.reference_coefficient > 0 or self.norm_guard > 0

    @property
    def latents_kept(self) -> int:
        """State, target and velocity of the old policy at every level; that of the base where the loss has it."""
        return (3 + (self.reference_coefficient > 0)) * self.timestep_bins

    def calls(self, drawing: Drawing) -> list[Call]:
        """N steps, r of (1), and at K = `timestep_bins` states v_old, v_base and (4)."""
        at_once = self.decode_batch_size or self.images_at_once
        calls = self.rollout_calls(drawing) + drawing.scores(self.images_per_device, at_once)
        return calls + self.matching_calls(drawing, needs_base=self.needs_base, needs_old=True)

    def __post_init__(self) -> None:
        if self.old_policy_decay == 0 and self.old_policy_ramp == type(self).old_policy_ramp:
            self.old_policy_ramp = None  # the default ramp belongs to the default decay
        super().__post_init__()
