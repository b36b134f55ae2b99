"""`TAFSGRPOConfig`."""

from dataclasses import dataclass, field
from typing import Literal

from ..flow.advantages import CREDIT_RULES, SCALES, CreditRule, Scale
from .base_config import FlowRLConfig


@dataclass
class TAFSGRPOConfig(FlowRLConfig):
    r"""Settings of `TAFSGRPOTrainer`, beside those of `FlowRLConfig`. All defaults are our choice: the paper's could
    not be read.

    Flow-GRPO is `kernel="flow_grpo"`, `eta=0.7`, `credit_rule="final"`, `log_prob_form="gaussian"`, `epsilon=1e-4`,
    `share_initial_noise=False`, `num_inference_steps=10`.
    Different from `FlowRLConfig`: `num_inference_steps` 4, `num_generations` 16 and `per_device_train_batch_size` 16.
    """

    num_inference_steps: int = field(
        default=4,
        metadata={
            "help": "The number of sampler steps in training and in evaluation; all but the last one draw noise."
        },
    )
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "The number of images per device and micro-step."}
    )
    num_generations: int = field(
        default=16,
        metadata={
            "help": "The number of images per prompt in a rollout, among which rewards are compared; at least 2."
        },
    )
    ode_num_inference_steps: int = field(
        default=20,
        metadata={
            "help": "The number of steps of the ODE whose row every evaluation reports beside that of the own sampler."
        },
    )
    kernel: Literal["renoise", "flow_grpo"] = field(
        default="renoise",
        metadata={
            "help": "How a step draws noise: 'renoise' keeps the noise level that the model is told, 'flow_grpo' is the Euler-Maruyama "
            "step of Flow-GRPO."
        },
    )
    eta: float = field(
        default=1.0,
        metadata={
            "help": "How much noise a step draws, above 0. With 'renoise' at most 1, where all noise is drawn afresh; with 'flow_grpo' the "
            "noise level a of that paper, 0.7 there."
        },
    )
    credit_rule: CreditRule = field(
        default="mixed",
        metadata={
            "help": "Which rewards the draw of a step is credited with: 'final' the delivered image's, 'level' that of the clean estimate "
            "after the draw, 'gain' its rise over the one before, 'return' all from then on, discounted, 'mixed' "
            "final and level."
        },
    )
    credit_mix: float = field(
        default=0.5, metadata={"help": "The share of the final reward in `credit_rule='mixed'`, between 0 and 1."}
    )
    credit_discount: float = field(
        default=0.9, metadata={"help": "The discount per step in `credit_rule='return'`, between 0 and 1."}
    )
    scale_rewards: Scale = field(
        default="batch",
        metadata={
            "help": "What divides rewards once the mean of their prompt is taken: 'batch' the standard deviation over the rollout, 'group' "
            "that of the prompt, 'none' nothing. Per step, and per reward before they are summed."
        },
    )
    advantage_clip: float = field(default=5.0, metadata={"help": "Advantages are clipped to plus and minus this."})
    log_prob_form: Literal["coefficients_preserving", "gaussian"] = field(
        default="coefficients_preserving",
        metadata={
            "help": "The log-probability of a step, a mean over latent dimensions: 'gaussian' is exact, 'coefficients_preserving' leaves "
            "out the variance, so that late steps do not outweigh early ones."
        },
    )
    epsilon: float = field(
        default=1e-5,
        metadata={
            "help": "The probability ratio is clipped to 1 plus and minus this; 1e-5 suits 'coefficients_preserving', 1e-4 'gaussian'. "
            "Without effect as long as each rollout serves one update."
        },
    )
    beta: float = field(
        default=0.01,
        metadata={
            "help": "The weight of the exact KL divergence of each step to the base model's, which keeps diversity; 0 for none."
        },
    )
    share_initial_noise: bool = field(
        default=True,
        metadata={
            "help": "Whether the images of a prompt start from the same noise, whose first velocity is computed once."
        },
    )
    max_velocity_distance: float | None = field(
        default=None,
        metadata={
            "help": "Training stops once the root mean square of the velocity's distance to the base model's, relative to that velocity, "
            "passes this on a rollout's states. Default: never."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_unknown(
            kernel=("renoise", "flow_grpo"),
            credit_rule=CREDIT_RULES,
            scale_rewards=SCALES,
            log_prob_form=("coefficients_preserving", "gaussian"),
        )
        self.refuse_below(2, "num_inference_steps", "num_generations")
        self.refuse_below(1, "ode_num_inference_steps")
        self.refuse_below(0, "beta", "credit_mix", "credit_discount")
        self.refuse_not_positive("eta", "epsilon", "advantage_clip", "max_velocity_distance")
        for name in ("credit_mix", "credit_discount"):
            if getattr(self, name) > 1:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must be at most 1.")
        if self.kernel == "renoise" and self.eta > 1:
            raise ValueError(
                f"`eta` ({self.eta}) must be at most 1 with `kernel='renoise'`, where 1 draws all noise afresh."
            )
        if self.eval_num_inference_steps not in (None, self.num_inference_steps):
            raise ValueError(
                f"`eval_num_inference_steps` ({self.eval_num_inference_steps}) must be left out: evaluation takes the "
                "trained sampler with `num_inference_steps`, and the ODE with `ode_num_inference_steps` beside it."
            )
