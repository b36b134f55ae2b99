"""`TAFSGRPOConfig`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from transformers.hf_argparser import HfArg

from ..cost import Call, Drawing, Kind, Phase
from ..flow.advantages import CreditRule, Scale
from .base_config import FlowRLConfig
from .config_checks import Range


@dataclass
class TAFSGRPOConfig(FlowRLConfig):
    r"""Settings of `TAFSGRPOTrainer`, beside those of `FlowRLConfig`.

    All defaults are our choice: the paper's could not be read.

    Flow-GRPO is `kernel="flow_grpo"`, `eta=0.7`, `credit_rule="final"`, `log_prob_form="gaussian"`, `epsilon=1e-4`,
    `share_initial_noise=False`, `num_inference_steps=10`.
    Different from `FlowRLConfig`: `num_inference_steps` 4, `num_generations` 16 and `per_device_train_batch_size` 16.
    """

    num_inference_steps: Annotated[int, Range(at_least=2)] = HfArg(
        default=4, help="The number of sampler steps in training and in evaluation; all but the last one draw noise."
    )
    per_device_train_batch_size: int = HfArg(default=16, help="The number of images per device and micro-step.")
    num_generations: Annotated[int, Range(at_least=2)] = HfArg(
        default=16, help="The number of images per prompt in a rollout, among which rewards are compared; at least 2."
    )
    ode_num_inference_steps: Annotated[int, Range(at_least=1)] = HfArg(
        default=20,
        help="The number of steps of the ODE. Every evaluation reports its row beside the row of the trained sampler.",
    )
    kernel: Literal["renoise", "precise", "flow_grpo"] = HfArg(
        default="renoise",
        help="How a step draws noise: 'renoise' keeps the noise level that the model is given; 'precise' does too, "
        "with less fresh noise the smaller the step, so that the data keep their variance; 'flow_grpo' is the "
        "Euler-Maruyama step of Flow-GRPO.",
    )
    eta: Annotated[float, Range(at_least=1e-3)] = HfArg(
        default=1.0,
        help="How much noise a step draws, at least 0.001. With 'renoise' at most 1, where all noise is drawn afresh; "
        "with 'precise' any number, sqrt(2) for that of the reverse diffusion; with 'flow_grpo' the noise level a of "
        "that paper, 0.7 there.",
    )
    credit_rule: CreditRule = HfArg(
        default="mixed",
        help="Which rewards the draw of a step is credited with: 'final' the delivered image's, 'level' that of the "
        "clean estimate after the draw, 'gain' its rise over the one before, 'return' all from then on, discounted, "
        "'mixed' final and level.",
    )
    credit_mix: Annotated[float, Range(at_least=0, at_most=1)] = HfArg(
        default=0.5, help="The share of the final reward in `credit_rule='mixed'`, between 0 and 1."
    )
    credit_discount: Annotated[float, Range(at_least=0, at_most=1)] = HfArg(
        default=0.9, help="The discount per step in `credit_rule='return'`, between 0 and 1."
    )
    scale_rewards: Scale = HfArg(
        default="batch",
        help="What divides rewards once the mean of their prompt is taken: 'batch' the standard deviation over the "
        "rollout, 'group' that of the prompt, 'none' nothing. Per step, and per reward before they are summed.",
    )
    advantage_clip: Annotated[float, Range(above=0)] = HfArg(
        default=5.0, help="Advantages are clipped to plus and minus this."
    )
    log_prob_form: Literal["coefficients_preserving", "gaussian"] = HfArg(
        default="coefficients_preserving",
        help="The log-probability of a step, a mean over latent dimensions: 'gaussian' is exact, "
        "'coefficients_preserving' leaves out the variance, so that late steps do not outweigh early ones.",
    )
    epsilon: Annotated[float, Range(above=0)] = HfArg(
        default=1e-5,
        help="The probability ratio is clipped to 1 plus and minus this; 1e-5 suits 'coefficients_preserving', 1e-4 "
        "'gaussian'. Without effect as long as each rollout serves one update.",
    )
    beta: Annotated[float, Range(at_least=0)] = HfArg(
        default=0.01,
        help="The weight of the exact KL divergence of each step to the base model's, which keeps diversity; 0 for "
        "none.",
    )
    share_initial_noise: bool = HfArg(
        default=True,
        help="Whether the images of a prompt start from the same noise, whose first velocity is computed once.",
    )
    max_velocity_distance: Annotated[float, Range(above=0)] | None = HfArg(
        default=None,
        help="Training stops once the root mean square of the velocity's distance to the base model's, relative to "
        "that velocity, passes this on a rollout's states. Default: never.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge_adapter:
            raise ValueError(
                "`merge_adapter` is True, which does not suit TAFS-GRPO, whose loss computes the rollout again with "
                "the adapter beside the weights: leave it out."
            )
        if self.kernel == "renoise" and self.eta > 1:
            raise ValueError(
                f"`eta` ({self.eta}) must be at most 1 with `kernel='renoise'`, where 1 draws all noise afresh."
            )
        if self.eval_num_inference_steps not in (None, self.num_inference_steps):
            raise ValueError(
                f"`eval_num_inference_steps` ({self.eval_num_inference_steps}) must be left out: evaluation takes the "
                "trained sampler with `num_inference_steps`, and the ODE with `ode_num_inference_steps` beside it."
            )

    @property
    def scored_steps(self) -> int:
        """The clean estimates of each image that the credit rule asks for."""
        return {"final": 1, "gain": self.num_inference_steps}.get(self.credit_rule, self.num_inference_steps - 1)

    @property
    def latents_kept(self) -> int:
        """All states, and the base velocities of the draws where they are needed."""
        return self.num_inference_steps + (self.num_inference_steps - 1) * self.compares_with_base

    @property
    def compares_with_base(self) -> bool:
        """Whether the base model's velocities are needed."""
        return self.beta > 0 or self.max_velocity_distance is not None

    def calls(self, drawing: Drawing) -> list[Call]:
        """N velocities for (1) to (3), the scores of (4), and at N - 1 states v_base and the velocity of (5) and (6).

        Where a prompt's images start from the same noise, the first velocity is computed once per prompt.
        """
        size, draws = self.per_device_train_batch_size, self.num_inference_steps - 1
        calls: list[Call] = []

        def first(batch: int, prompts: int) -> int:
            return prompts if self.share_initial_noise else batch

        for prompts in self.prompts_of_batches(size):
            calls += drawing.velocity(Kind.FORWARD, first(size, prompts), 1, Phase.ROLLOUT)
            calls += drawing.velocity(Kind.FORWARD, size, draws, Phase.ROLLOUT)
            calls += drawing.scores(size * self.scored_steps, self.decode_batch_size or self.images_at_once)
            calls += drawing.velocity(Kind.TRAIN, first(size, prompts), self.num_iterations, Phase.UPDATE)
            calls += drawing.velocity(Kind.TRAIN, size, self.num_iterations * (draws - 1), Phase.UPDATE)
        if self.compares_with_base:
            images, at_once = self.images_per_device, self.images_at_once
            for number, prompts in enumerate(self.prompts_of_batches(at_once)):
                batch = min(at_once, images - number * at_once)
                calls += drawing.velocity(Kind.BASE, first(batch, prompts), 1, Phase.TARGET)
                calls += drawing.velocity(Kind.BASE, batch, draws - 1, Phase.TARGET)
        return [call for call in calls if call.count]
