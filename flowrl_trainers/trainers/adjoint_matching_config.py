"""`AdjointMatchingConfig`."""

from dataclasses import dataclass, field
from typing import Literal

from ..flow.control_costs import ORDERS
from .base_config import FlowRLConfig


@dataclass
class AdjointMatchingConfig(FlowRLConfig):
    r"""Settings of [`AdjointMatchingTrainer`], beside those of [`FlowRLConfig`]."""

    adjoint_steps: int = field(
        default=3,
        metadata={
            "help": "The number of sampler steps, counted from the end, that are controlled: the adjoint is carried back over them and "
            "the loss is taken at them. Between 1 (the reward gradient alone) and `num_inference_steps` (no truncation). Our choice of "
            "default, after the label of a figure of arXiv 2605.06583."
        },
    )
    adjoint: Literal["lean", "full", "current"] = field(
        default="lean",
        metadata={
            "help": "Whose Jacobian carries the adjoint back: 'lean' the frozen base's (one vector-Jacobian product a step; its fixed "
            "point is the optimum), 'full' the current model's and the cost's (the gradient of the regularised objective; two products), "
            "'current' the current model's alone (biased towards too little control)."
        },
    )
    loss_type: Literal["regression", "hamiltonian"] = field(
        default="regression",
        metadata={
            "help": "'regression' is the squared distance of the control to the best one; 'hamiltonian' is twice the cost of the control "
            "minus its product with the adjoint, which has the same minimum and, at order 2 and weight 1, the same gradient."
        },
    )
    control_cost_order: Literal["2", "4", "2+4"] = field(
        default="2",
        metadata={
            "help": "The power of the control's root mean square that is paid for: 2, the quadratic cost; 4, which compresses large "
            "adjoints; or their sum. Our reconstruction of the polynomial costs of arXiv 2605.06583."
        },
    )
    control_cost_weight: float = field(default=1.0, metadata={"help": "The weight c of the control's cost, above 0."})
    reward_scale: float | None = field(
        default=None,
        metadata={
            "help": "The factor lambda on the reward in the control problem, which sets how far control departs from the base model. "
            "Default: found on the first rollout from `control_to_velocity_ratio`."
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
        self.control_cost_order = str(self.control_cost_order)  # type: ignore[assignment]  # YAML reads 2 as a number
        for name, choices in (
            ("adjoint", ("lean", "full", "current")),
            ("loss_type", ("regression", "hamiltonian")),
            ("control_cost_order", ORDERS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}: choose {', '.join(map(repr, choices))}.")
        if not 1 <= self.adjoint_steps <= self.num_inference_steps:
            raise ValueError(
                f"`adjoint_steps` ({self.adjoint_steps}) must be between 1 and `num_inference_steps` ({self.num_inference_steps})."
            )
        for name in ("reward_scale", "control_to_velocity_ratio", "control_cost_weight"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` ({value}) must be above 0.")
        quantile = self.reward_gradient_clip_quantile
        if quantile is not None and not 0 < quantile <= 1:
            raise ValueError(f"`reward_gradient_clip_quantile` ({quantile}) must be above 0 and at most 1.")
