"""`ACFlowConfig`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from transformers.hf_argparser import HfArg

from ..flow.advantages import Weighting
from .base_config import FlowRLConfig
from .config_checks import Range


@dataclass
class ACFlowConfig(FlowRLConfig):
    r"""Settings of `ACFlowTrainer`, beside those of `FlowRLConfig`.

    All defaults are our choice: the paper's could not be read.

    ORW-CFM-W2, the predecessor, is `critic="none"`, `reward_shaping="none"`, `advantage_clip=None`,
    `normalize_weights=False`; reward-weighted flow matching is that with `wasserstein_coefficient=0`. Different from
    `FlowRLConfig`: `num_generations` 8.
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
    reward_clip: Annotated[float, Range(above=0)] = HfArg(
        default=5.0, help="Shaped rewards are clipped to plus and minus this many standard deviations."
    )
    advantage_clip: Annotated[float, Range(above=0)] | None = HfArg(
        default=1.0,
        help="Advantages are clipped to plus and minus this, in standard deviations of the reward, which bounds the "
        "weights; None for no bound.",
    )
    weighting: Weighting = HfArg(
        default="exponential",
        help="How an advantage A weighs its image: 'exponential' exp(A / temperature), 'softplus' log(1 + exp(A / "
        "temperature)), 'positive' max(A, 0), 'indicator' 1 where A is above 0, 'linear' A / temperature, which is "
        "signed and needs the anchor.",
    )
    temperature: Annotated[float, Range(above=0)] = HfArg(
        default=1.0, help="The temperature tau of the weighting, above 0; small ones are greedy."
    )
    normalize_weights: bool = HfArg(
        default=True,
        help="Whether weights are divided by their mean over the rollout, so that the anchor's weight is relative.",
    )
    wasserstein_coefficient: Annotated[float, Range(at_least=0)] = HfArg(
        default=0.3,
        help="The weight alpha of the mean squared distance to the base velocity, a bound of the Wasserstein-2 "
        "distance that keeps diversity; 0 for no anchor.",
    )
    timestep_bins: Annotated[int, Range(at_least=1)] = HfArg(
        default=4,
        help="The re-noised states per image: the noise levels are split into so many bins, and one is drawn from "
        "each.",
    )
    timestep_sampling: Literal["uniform", "logit_normal", "pipeline"] = HfArg(
        default="uniform",
        help="The distribution of noise levels, for critic and actor alike: uniform, the logit-normal one of Stable "
        "Diffusion 3, or 'pipeline', as many between any two neighbouring steps of the sampler, uniform in between.",
    )
    critic: Literal["default", "none"] = HfArg(
        default="default",
        help="'default' is a small network sized by the latent; with 'none' every value is zero. Pass a module of "
        "your own to the trainer.",
    )
    critic_steps: Annotated[int, Range(at_least=1)] = HfArg(
        default=4, help="The updates of the critic per rollout, each on all of its images."
    )
    critic_bins_in_one_call: bool = HfArg(
        default=False,
        help="Whether the critic judges the states of all bins in one call instead of one call per bin: faster, and "
        "the same but for rounding, unless a critic of your own mixes the images of a batch.",
    )
    critic_learning_rate: Annotated[float, Range(above=0)] = HfArg(
        default=1e-3, help="The learning rate of the critic's AdamW."
    )
    critic_warmup_max_steps: Annotated[int, Range(at_least=0)] = HfArg(
        default=20,
        help="The most rollouts during which the critic learns alone, from the base model's images; 0 for no warm-up. "
        "It ends earlier if the critic's explained variance on unseen images stops rising. The updates of these "
        "rollouts count as updates of the run.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_only_model and self.load_best_model_at_end and self.critic != "none":
            raise ValueError(
                "`load_best_model_at_end` needs the critic of a checkpoint, which `save_only_model` leaves out: "
                "choose one."
            )
        if self.reward_shaping == "standardise" and self.num_generations < 2:
            raise ValueError(
                f"`num_generations` ({self.num_generations}) must be at least 2: shaped rewards are measured against "
                "the other images of their prompt."
            )
        if self.weighting == "linear" and self.wasserstein_coefficient == 0:
            raise ValueError(
                "`wasserstein_coefficient` must be above 0 with `weighting='linear'`: without it the loss has no "
                "minimum."
            )
        if self.weighting == "linear" and self.normalize_weights:
            raise ValueError(
                "`normalize_weights` must be False with `weighting='linear'`: signed weights have no mean to divide "
                "by."
            )
