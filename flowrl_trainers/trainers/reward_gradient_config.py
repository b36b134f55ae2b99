"""`RewardGradientConfig`: the settings of trainers that differentiate the reward."""

from dataclasses import dataclass, field

from .base_config import FlowRLConfig


@dataclass
class RewardGradientConfig(FlowRLConfig):
    r"""Settings that trainers share which differentiate the reward, beside those of `FlowRLConfig`."""

    reward_scale: float | None = field(
        default=None,
        metadata={
            "help": "The factor on the reward in the control problem (lambda, or beta for VGG-Flow), which sets how far control departs "
            "from the base model. Default: found on the first rollout from `control_to_velocity_ratio`."
        },
    )
    control_to_velocity_ratio: float = field(
        default=0.1,
        metadata={
            "help": "The root mean square of the target control over that of the base velocity, on the first rollout; sets `reward_scale` "
            "where that is not given, because gradients of rewards differ by orders of magnitude. Our choice."
        },
    )
    reward_gradient_clip_quantile: float | None = field(
        default=None,
        metadata={
            "help": "Reward gradients whose L2 norm over a whole latent exceeds this quantile of the rollout's norms are scaled down to "
            "it. Above 0 and at most 1. Default: no clipping."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_not_positive("reward_scale", "control_to_velocity_ratio")
        quantile = self.reward_gradient_clip_quantile
        if quantile is not None and not 0 < quantile <= 1:
            raise ValueError(f"`reward_gradient_clip_quantile` ({quantile}) must be above 0 and at most 1.")
