"""`AdjointMatchingConfig`."""

from dataclasses import dataclass, field
from typing import Literal

from ..flow.control_costs import ORDERS
from .reward_gradient_config import RewardGradientConfig


@dataclass
class AdjointMatchingConfig(RewardGradientConfig):
    r"""Settings of `AdjointMatchingTrainer`, beside those of `RewardGradientConfig` and `FlowRLConfig`.

    DRaFT-K (arXiv 2309.17400), direct backpropagation through the last K steps, is `adjoint="full"`,
    `loss_type="hamiltonian"`, `control_cost_weight=0` and `adjoint_steps=K`, with `guidance_scale=1` and a
    `reward_scale`.
    """

    adjoint_steps: int = field(
        default=3,
        metadata={
            "help": "The number of sampler steps, counted from the end, that are controlled: the adjoint is carried back over them and "
            "the loss is taken at them. Between 1 (the reward gradient alone) and `num_inference_steps` (no "
            "truncation). Our choice of default, after the label of a figure of arXiv 2605.06583."
        },
    )
    adjoint: Literal["lean", "full", "current"] = field(
        default="lean",
        metadata={
            "help": "Whose Jacobian carries the adjoint back: 'lean' the frozen base's (one vector-Jacobian product a step; its fixed "
            "point is the optimum), 'full' the current model's and the cost's (the gradient of the regularised "
            "objective; two products), 'current' the current model's alone (biased towards too little control)."
        },
    )
    adjoint_clip_quantile: float | None = field(
        default=None,
        metadata={
            "help": "At every trained step, adjoints whose L2 norm exceeds this quantile of the rollout's norms are scaled down to it: "
            "over many steps an adjoint may grow without bound. Above 0 and at most 1. Default: no clipping."
        },
    )
    dynamics: Literal["ode", "memoryless"] = field(
        default="ode",
        metadata={
            "help": "What rollouts sample with: 'ode', the deterministic sampler of arXiv 2605.06583, or 'memoryless', the stochastic one "
            "of arXiv 2409.08861, whose optimum is the base distribution tilted by the reward; it takes "
            "`adjoint_steps` equal to `num_inference_steps`, 40 in the paper."
        },
    )
    memoryless_loss_clip: float | None = field(
        default=1.6,
        metadata={
            "help": "With memoryless dynamics, states whose squared control error (a sum over the latent, in the paper's units) is above "
            "this number times the square of `reward_scale` teach nothing in that update. Default: the paper's, "
            "appendix G, which holds for rewards whose gradient has a norm of about one; None keeps all."
        },
    )
    loss_type: Literal["regression", "hamiltonian"] = field(
        default="regression",
        metadata={
            "help": "'regression' is the squared distance of the control to the best one; 'hamiltonian' is twice the difference of the "
            "control's cost and its product with the adjoint, each state weighted by the size of its step: with the "
            "full adjoint, its gradient is that of the regularised objective."
        },
    )
    control_cost_order: Literal["2", "4", "2+4"] = field(
        default="2",
        metadata={
            "help": "The power of the control's root mean square that is paid for: 2, the quadratic cost; 4, which compresses large "
            "adjoints; or their sum. Our reconstruction of the polynomial costs of arXiv 2605.06583."
        },
    )
    control_cost_weight: float = field(
        default=1.0,
        metadata={
            "help": "The weight c of the control's cost, above 0; 0, no cost, goes with the Hamiltonian loss alone."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.control_cost_order = str(self.control_cost_order)  # type: ignore[assignment]  # YAML reads 2 as a number
        self.refuse_unknown(
            adjoint=("lean", "full", "current"),
            dynamics=("ode", "memoryless"),
            loss_type=("regression", "hamiltonian"),
            control_cost_order=ORDERS,
        )
        if not 1 <= self.adjoint_steps <= self.num_inference_steps:
            raise ValueError(
                f"`adjoint_steps` ({self.adjoint_steps}) must be between 1 and `num_inference_steps` "
                f"({self.num_inference_steps})."
            )
        if self.control_cost_weight < 0 or (self.control_cost_weight == 0 and self.loss_type != "hamiltonian"):
            raise ValueError(
                f"`control_cost_weight` ({self.control_cost_weight}) must be above 0; 0, which leaves no regression "
                "target, goes with `loss_type='hamiltonian'` alone."
            )
        if self.control_cost_weight == 0 and self.reward_scale is None:
            raise ValueError(
                "`reward_scale` must be given where `control_cost_weight` is 0: no cost sets a control to measure it "
                "by."
            )
        self.refuse_not_positive("memoryless_loss_clip")
        if self.adjoint_clip_quantile is not None and not 0 < self.adjoint_clip_quantile <= 1:
            raise ValueError(f"`adjoint_clip_quantile` ({self.adjoint_clip_quantile}) must be above 0 and at most 1.")
        if self.dynamics == "memoryless":
            for name, allowed in (
                ("adjoint", "lean"),
                ("loss_type", "regression"),
                ("control_cost_order", "2"),
                ("control_cost_weight", 1.0),
                ("adjoint_steps", self.num_inference_steps),
            ):
                if getattr(self, name) != allowed:
                    raise ValueError(
                        f"`{name}` ({getattr(self, name)!r}) must be {allowed!r} with `dynamics='memoryless'`: no "
                        "other form is known."
                    )
