"""`RewardGradientConfig`: the settings of trainers that differentiate the reward."""

from dataclasses import dataclass, replace
from typing import Annotated

from transformers.hf_argparser import HfArg

from ..cost import Call, Drawing, Kind
from .base_config import FlowRLConfig
from .config_checks import Range


@dataclass
class RewardGradientConfig(FlowRLConfig):
    r"""Settings shared by the trainers that differentiate the reward, beside those of `FlowRLConfig`."""

    reward_scale: Annotated[float, Range(above=0)] | None = HfArg(
        default=None,
        help="The factor on the reward in the control problem (lambda, or beta for VGG-Flow), which sets how far "
        "control departs from the base model. Default: found on the first rollout from `control_to_velocity_ratio`.",
    )
    control_to_velocity_ratio: Annotated[float, Range(above=0)] = HfArg(
        default=0.1,
        help="The root mean square of the target control over that of the base velocity, on the first rollout; sets "
        "`reward_scale` where that is not given, because gradients of rewards differ by orders of magnitude. Our "
        "choice.",
    )
    reward_gradient_clip_quantile: Annotated[float, Range(above=0, at_most=1)] | None = HfArg(
        default=None,
        help="Reward gradients whose L2 norm over a whole latent exceeds this quantile of the rollout's norms are "
        "scaled down to it. Above 0 and at most 1. Default: no clipping.",
    )
    reward_decoder: str | None = HfArg(
        default=None,
        help="The Hub id or folder of an `AutoencoderTiny` of diffusers, such as 'madebyollin/taesd3', through which "
        "the gradient of the reward is taken in place of the model's own autoencoder, for less memory and time. An "
        "object is passed to the trainer instead. The first rollout takes both gradients and logs their cosine as "
        "`reward_decoder_cosine`. Default: the model's own.",
    )
    product_batch_size: Annotated[int, Range(at_least=1)] | None = HfArg(
        default=None,
        help="The number of images per device whose vector-Jacobian products, those of adjoints and of VGG-Flow's "
        "consistency loss, are taken at a time, a multiple of `per_device_train_batch_size`. They hold activations "
        "nearly as an update of so many images does. Default: `rollout_batch_size`.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole_micro_batches("product_batch_size")

    @property
    def products_at_once(self) -> int:
        """The images per device whose vector-Jacobian products are taken at a time."""
        return self.product_batch_size or self.images_at_once

    @property
    def reward_decoder_name(self) -> str | None:
        """`reward_decoder`."""
        return self.reward_decoder

    def first_calls(self, drawing: Drawing) -> list[Call]:
        """The gradients of the first rollout through the model's own decoder, beside those through another."""
        if self.reward_decoder is None:
            return []
        taken = [call for call in self.calls(drawing) if call.kind == Kind.REWARD_GRADIENT]
        return [replace(call, kind=Kind.OWN_REWARD_GRADIENT) for call in taken]
