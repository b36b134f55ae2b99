"""`AdjointMatchingConfig`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from transformers.hf_argparser import HfArg

from ..cost import Call, Drawing, Kind, Phase
from ..cost.calls import parts
from ..flow.control_costs import ControlCostOrder
from ..flow.dynamics import LATE_SHARE
from .config_checks import Range
from .reward_gradient_config import RewardGradientConfig


@dataclass
class AdjointMatchingConfig(RewardGradientConfig):
    r"""Settings of `AdjointMatchingTrainer`, beside those of `RewardGradientConfig` and `FlowRLConfig`.

    DRaFT-K (arXiv 2309.17400), direct backpropagation through the last K steps, is `adjoint="full"`,
    `loss_type="hamiltonian"`, `control_cost_weight=0` and `adjoint_steps=K`, with `guidance_scale=1` and a
    `reward_scale`.
    """

    adjoint_steps: Annotated[int, Range(at_least=1)] = HfArg(
        default=3,
        help="The number of sampler steps, counted from the end, that are controlled: the adjoint is carried back "
        "over them and the loss is taken at them. Between 1 (the reward gradient alone) and `num_inference_steps` "
        "(no truncation). Our choice of default, after the label of a figure of arXiv 2605.06583.",
    )
    prefix_pool_size: Annotated[int, Range(at_least=1)] | None = HfArg(
        default=None,
        help="The number of (prompt, noise) pairs that all rollouts are drawn from, a multiple of the images per "
        "rollout. Rollouts then take the steps before the controlled window with the base model, once for each pair: "
        "the states that open the window are kept and used again, in memory or, above 2 GiB, in a temporary file. "
        "Evaluations and pictures use the trained model in all steps. Default: no pool; every rollout draws new noise "
        "and takes all its steps with the trained model.",
    )
    adjoint: Literal["lean", "full", "current"] = HfArg(
        default="lean",
        help="Whose Jacobian carries the adjoint back: 'lean' the frozen base's (one vector-Jacobian product a step; "
        "its fixed point is the optimum), 'full' the current model's and the cost's (the gradient of the regularised "
        "objective; two products), 'current' the current model's alone (biased towards too little control).",
    )
    adjoint_clip_quantile: Annotated[float, Range(above=0, at_most=1)] | None = HfArg(
        default=None,
        help="At every trained step, adjoints whose L2 norm exceeds this quantile of the rollout's norms are scaled "
        "down to it: over many steps an adjoint may grow without bound. Above 0 and at most 1. Default: no clipping.",
    )
    dynamics: Literal["ode", "memoryless"] = HfArg(
        default="ode",
        help="What rollouts sample with: 'ode', the deterministic sampler of arXiv 2605.06583, or 'memoryless', the "
        "stochastic one of arXiv 2409.08861, whose optimum is the base distribution tilted by the reward; it takes "
        "`adjoint_steps` equal to `num_inference_steps`, 40 in the paper.",
    )
    memoryless_loss_clip: Annotated[float, Range(above=0)] | None = HfArg(
        default=1.6,
        help="With memoryless dynamics, states whose squared control error (a sum over the latent, in the paper's "
        "units) is above this number times the square of `reward_scale` teach nothing in that update. Default: the "
        "paper's, appendix G, which holds for rewards whose gradient has a norm of about one; None keeps all.",
    )
    loss_type: Literal["regression", "hamiltonian"] = HfArg(
        default="regression",
        help="'regression' is the squared distance of the control to the best one; 'hamiltonian' is twice the "
        "difference of the control's cost and its product with the adjoint, each state weighted by the size of its "
        "step: with the full adjoint, its gradient is that of the regularised objective.",
    )
    control_cost_order: ControlCostOrder = HfArg(
        default="2",
        help="The power of the control's root mean square in its cost: 2, the quadratic cost; 4, which compresses "
        "large adjoints; or 2+4, their sum. Our reconstruction of the polynomial costs of arXiv 2605.06583.",
    )
    control_cost_weight: Annotated[float, Range(at_least=0)] = HfArg(
        default=1.0,
        help="The weight c of the control's cost, above 0; 0, no cost, goes with the Hamiltonian loss alone.",
    )

    @property
    def pool_size(self) -> int | None:
        """That of the cached prefixes."""
        return self.prefix_pool_size

    def __post_init__(self) -> None:
        self.control_cost_order = str(self.control_cost_order)  # YAML reads 2 as a number
        super().__post_init__()
        if self.adjoint_steps > self.num_inference_steps:
            raise ValueError(
                f"`adjoint_steps` ({self.adjoint_steps}) must be between 1 and `num_inference_steps` "
                f"({self.num_inference_steps})."
            )
        if self.prefix_pool_size is not None and self.adjoint_steps == self.num_inference_steps:
            raise ValueError(
                f"`prefix_pool_size` ({self.prefix_pool_size}) keeps what comes before the controlled window, but "
                f"`adjoint_steps` ({self.adjoint_steps}) controls all `num_inference_steps`: leave it out, or take "
                "fewer adjoint steps."
            )
        if self.prefix_pool_size is not None and self.prefix_pool_size % self.images_per_rollout:
            below = self.prefix_pool_size // self.images_per_rollout * self.images_per_rollout
            nearest = " or ".join(str(n) for n in (below, below + self.images_per_rollout) if n)
            raise ValueError(
                f"`prefix_pool_size` ({self.prefix_pool_size}) must be a multiple of the images per rollout "
                f"({self.images_per_rollout}): make it {nearest}."
            )
        if self.control_cost_weight == 0 and self.loss_type != "hamiltonian":
            raise ValueError(
                f"`control_cost_weight` ({self.control_cost_weight}) must be above 0; 0, which leaves no regression "
                "target, goes with `loss_type='hamiltonian'` alone."
            )
        if self.control_cost_weight == 0 and self.reward_scale is None:
            raise ValueError(
                "`reward_scale` must be given where `control_cost_weight` is 0: no cost sets a control to measure it "
                "by."
            )
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

    @property
    def trained_steps(self) -> int:
        """The number of steps at which the loss is taken."""
        late = -(-self.adjoint_steps // LATE_SHARE)
        return min(2 * late, self.adjoint_steps) if self.dynamics == "memoryless" else self.adjoint_steps

    @property
    def latents_kept(self) -> int:
        """State, base velocity and adjoint of every trained step."""
        return 3 * self.trained_steps

    def calls(self, drawing: Drawing) -> list[Call]:
        """N steps of (1), grad r(x_N) of (2), the adjoint over K = `adjoint_steps` steps, the loss at T of them.

        g_N is known, and nobody needs g at the first state of the window: (2) takes K - 1 vector-Jacobian products,
        which meet v_base on the way, and v_base at the first state on its own. In (4) the current velocity is part of
        the vector, so it is computed before its product, which computes it again. Only the rollout is guided.
        """
        size, micro_batches = self.per_device_train_batch_size, self.micro_steps_per_rollout
        last_is_base = self.dynamics == "memoryless"
        steps = self.num_inference_steps if self.prefix_pool_size is None else self.adjoint_steps
        images, at_once = self.images_per_device, self.images_at_once
        calls = drawing.velocities(Kind.FORWARD, images, at_once, steps - last_is_base, Phase.ROLLOUT)
        if last_is_base:
            calls += drawing.velocities(Kind.BASE, images, at_once, 1, Phase.ROLLOUT)
        calls += drawing.reward_gradients(images, 1, self.decode_batch_size, at_once)
        calls += self._adjoint_calls(self.adjoint)
        losses = self.trained_steps * micro_batches * self.num_iterations
        return [*calls, Call(Kind.TRAIN, size, losses, Phase.UPDATE)]

    def first_calls(self, drawing: Drawing) -> list[Call]:
        """The lean adjoint of the first rollout, from which the scale of the reward is found, and cached prefixes."""
        calls = super().first_calls(drawing)
        calls += [] if self.reward_scale is not None else self._adjoint_calls("lean")
        if self.prefix_pool_size is not None:
            images, size = self.prefix_pool_size // self.world_size, self.per_device_train_batch_size
            steps = self.num_inference_steps - self.adjoint_steps
            calls += drawing.velocities(Kind.BASE, images, size, steps, Phase.ROLLOUT)
        return calls

    def _adjoint_calls(self, adjoint: str) -> list[Call]:
        carried = self.adjoint_steps - 1
        match adjoint:
            case "lean":
                counts = {Kind.BASE_PRODUCT: carried, Kind.BASE: 1}
            case "full":
                counts = {Kind.BASE_PRODUCT: carried, Kind.PRODUCT: carried, Kind.BASE: 1}
            case _:
                counts = {Kind.PRODUCT: carried, Kind.BASE: self.adjoint_steps}
        sizes = parts(self.images_per_device, self.products_at_once).items()
        calls = [Call(kind, size, n * count, Phase.TARGET) for kind, count in counts.items() for size, n in sizes]
        if adjoint == "full":
            calls += [Call(Kind.FORWARD, size, n * carried, Phase.TARGET, needed=False) for size, n in sizes]
        return calls
