"""`VGGFlowConfig`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from transformers.hf_argparser import HfArg

from ..cost import Call, Drawing, Kind, Phase
from ..cost.calls import parts
from .config_checks import Range
from .reward_gradient_config import RewardGradientConfig


@dataclass
class VGGFlowConfig(RewardGradientConfig):
    r"""Settings of `VGGFlowTrainer`, beside those of `RewardGradientConfig` and `FlowRLConfig`.

    Different from them: `reward_gradient_clip_quantile` 0.8, the 80th percentile of arXiv 2512.05116, section 5.1.
    """

    reward_gradient_clip_quantile: Annotated[float, Range(above=0, at_most=1)] | None = HfArg(
        default=0.8,
        help="Reward gradients whose L2 norm over a whole latent exceeds this quantile of all states of the rollout "
        "are scaled down to it. Above 0 and at most 1; 1 keeps all. Default: the 80th percentile of arXiv 2512.05116.",
    )
    eta_schedule: Literal["quadratic", "linear", "constant"] = HfArg(
        default="quadratic",
        help="How much of the reward gradient at the clean estimate counts at noise level sigma: (1 - sigma)^2, the "
        "paper's default, 1 - sigma, which it found faster, or 1.",
    )
    timestep_bins: Annotated[int, Range(at_least=1)] = HfArg(
        default=5,
        help="The number of states of each trajectory that are trained: the steps after the first are split into so "
        "many bins, and one state of each is drawn. Between 1 and `num_inference_steps` - 1. Default: the paper's.",
    )
    value_network: Literal["unet", "none"] = HfArg(
        default="unet",
        help="The network of the residual of the value gradient: 'unet', sized by the latent (an MLP for vectors), "
        "or 'none', which trusts the scaled reward gradient alone. Pass a module of your own to the trainer.",
    )
    value_network_learning_rate: Annotated[float, Range(above=0)] | None = HfArg(
        default=None, help="The learning rate of the value network. Default: `learning_rate`, as in the paper."
    )
    boundary_coefficient: Annotated[float, Range(above=0)] = HfArg(
        default=1e4,
        help="The weight alpha of the boundary loss, the value network's mean square at final states. Default: the "
        "paper's.",
    )
    finite_difference_step: Annotated[float, Range(above=0)] = HfArg(
        default=1e-2,
        help="The step of the finite difference in the consistency loss, in units of sigma; near the end of a "
        "trajectory cut to what is left of sigma. Our choice: the paper gives none, and smaller ones drown in the "
        "rounding of half precision.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timestep_bins > self.num_inference_steps - 1:
            raise ValueError(
                f"`timestep_bins` ({self.timestep_bins}) must be between 1 and `num_inference_steps` - 1 "
                f"({self.num_inference_steps - 1})."
            )
        if self.product_batch_size is not None and self.value_network == "none":
            raise ValueError(
                f"`product_batch_size` ({self.product_batch_size}) has no effect without a value network, whose loss "
                "alone takes vector-Jacobian products: leave it out."
            )
        if self.value_network != "none" and self.ddp_find_unused_parameters is not False:  # Trainer makes True of None
            raise ValueError(
                "`ddp_find_unused_parameters` must be False: with a value network the model is called twice before "
                "each backward pass."
            )

    @property
    def head_kind(self) -> Literal["value_network"] | None:
        """The value network."""
        return None if self.value_network == "none" else "value_network"

    @property
    def latents_kept(self) -> int:
        """State, base velocity and reward term of every trained step; for (3) three more, and the final latent."""
        return 3 * self.timestep_bins + (0 if self.value_network == "none" else 3 * self.timestep_bins + 1)

    def calls(self, drawing: Drawing) -> list[Call]:
        """N steps, and at each of K = `timestep_bins` states: R of (1), v_base, (2); with a value network (3) and (4).

        (3) takes c, the velocity and R at the shifted point, the product J_base^T G, and c and c_eps with gradients;
        (4) adds c at the end to the last of these calls. The product meets v_base on its way; the final pictures are
        scored for the log alone. All with guidance.
        """
        size, micro_batches = self.per_device_train_batch_size, self.micro_steps_per_rollout
        states = self.timestep_bins * micro_batches
        calls = self.rollout_calls(drawing)
        at_once = self.decode_batch_size or self.images_at_once
        calls += drawing.scores(self.images_per_device, at_once, needed=False)
        together = self.timestep_bins * size
        calls += drawing.reward_gradients(together, micro_batches, self.decode_batch_size, self.images_at_once)
        if self.value_network == "none":
            calls += self._base_calls(drawing)
        else:
            images, bins = self.images_per_device, self.timestep_bins
            sizes = parts(images, self.images_at_once).items()
            calls += [Call(Kind.HEAD, batch, bins * count, Phase.TARGET) for batch, count in sizes]
            calls += drawing.velocities(Kind.FORWARD, images, self.images_at_once, bins, Phase.TARGET)
            calls += drawing.reward_gradients(together, micro_batches, self.decode_batch_size, self.images_at_once)
            calls += drawing.velocities(Kind.BASE_PRODUCT, images, self.products_at_once, bins, Phase.TARGET)
            last = micro_batches * self.num_iterations
            calls += [Call(Kind.HEAD_TRAIN, 3 * size, last, Phase.UPDATE)]
            calls += [Call(Kind.HEAD_TRAIN, 2 * size, (self.timestep_bins - 1) * last, Phase.UPDATE)]
        return calls + drawing.velocity(Kind.TRAIN, size, states * self.num_iterations, Phase.UPDATE)

    def first_calls(self, drawing: Drawing) -> list[Call]:
        """v_base at all states, from which the scale of the reward is found before the products are known."""
        calls = super().first_calls(drawing)
        if self.value_network == "none" or self.reward_scale is not None:
            return calls
        return calls + self._base_calls(drawing)

    def _base_calls(self, drawing: Drawing) -> list[Call]:
        images, at_once = self.images_per_device, self.images_at_once
        return drawing.velocities(Kind.BASE, images, at_once, self.timestep_bins, Phase.TARGET)
