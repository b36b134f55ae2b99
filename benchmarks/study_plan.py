"""What the study runs: methods, settings, seeds, how long each run is, and in which order.

One table (`METHODS`) names the methods by their changes to a demo of `flowrl demo`; `plan` makes runs of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from variants import LINEAR, VARIANTS

from flowrl_trainers.cli.demo import METHODS as DEMOS
from flowrl_trainers.cli.demo import SHARED

REWARDS = {"differentiable": "shapes", "black box": "checker"}
"""The reward of each setting. The other one only judges."""
BOTH, BLACK_BOX, DIFFERENTIABLE = ("differentiable", "black box"), ("black box",), ("differentiable",)

SEEDS = (0, 1, 2)
GRID_SEED = 100  # not among the seeds: what is chosen on it is not chosen on them
GRID = (0.5, 1.0, 2.0)  # times the learning rate of the demo: every method's tuning budget
STAGES = ("grid", "main", "calls", "critic", "long", "ablation")
CALLS = 8000  # scored pictures of a run of the stage "calls"
CALLS_IMAGES = 128  # of an update
# Of updates without gradients of the reward: fewer than the demos', so that there are enough updates.
FEWER_IMAGES = {"per_device_train_batch_size": 64}
LONG_UPDATES = 400
LONG_IMAGES = 32  # of an update: fewer than the demos', so that 400 updates fit
MOST_UPDATES = 1000  # of a run that ends by its time

# Seconds of one core, by which runs are planned.
SET_UP = 20.0  # of a run before its first update, imports included
SECONDS_PER_PICTURE = 0.06  # of an evaluation in 20 steps
SECONDS_PER_IMAGE = 0.07  # of an update of the stages that end by their updates
# Beside 8 passes of the rollout, 4 of the base and 4 to weights, which count three times, a critic of the network's
# size takes 8 and, in four updates on four levels, 16 to weights.
BACKBONE_CALLS = (24 + 8 + 3 * 16) / 24


@dataclass(frozen=True)
class Method:
    """A row of the study.

    Attributes:
        demo: The demo from which its settings come.
        changes: Those in which it differs from `BASES`.
        settings: The settings, keys of `REWARDS`, in which it runs.
        steps: Of the ODE that judges it.
    """

    demo: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = BOTH
    steps: int = 20

    @property
    def tables(self) -> set[int]:
        """The steps in which the rows of its tables are drawn: 20, or 4; both for a renoising sampler of four steps,
        beside which every evaluation has the ODE.
        """
        renoises_in_four = self.demo == "tafs_grpo" and "num_inference_steps" not in self.changes
        return {self.steps, 4} if renoises_in_four else {self.steps}


# The last steps alone, as the trainer's defaults have it; the demo controls all of them. One alone is refused.
WINDOW = {"adjoint_steps": 3, "adjoint_clip_quantile": None}
DRAFT = {"adjoint": "full", "loss_type": "hamiltonian", "control_cost_weight": 0.0, "reward_scale": 1.0}
# What every row starts from: its demo, but for AC-Flow's trainer signed weights, as that demo has the fixed target.
BASES = DEMOS | {
    "ac_flow": LINEAR | {"num_inference_steps": 8} | FEWER_IMAGES,
    "diffusion_nft": DEMOS["diffusion_nft"] | FEWER_IMAGES,
    "tafs_grpo": DEMOS["tafs_grpo"] | FEWER_IMAGES,
}
# The recipes of docs/ac_flow.md, with the pictures and the learning rate of the embedded model.
CRITIC = {"critic": "reward_of_estimate"}  # the one that sees something of the checker's reward on shapes
BACKBONE = {"critic": "backbone"}
NO_CRITIC = {"critic": "none", "critic_warmup_max_steps": 0}
UNSET = {"weighting": None, "normalize_weights": None, "wasserstein_coefficient": None}  # of AC-Flow
RAM = NO_CRITIC | UNSET | {
    "target": "fixed", "reward_multiplier": 100.0, "reward_std": "raw", "reward_clip": None, "advantage_clip": None,
    "rollout_policy": "old", "old_policy_decay": 0.9, "old_policy_ramp": 0.01, "timestep_sampling": "noisy",
    "loss_guidance": False,
}  # fmt: skip
AWM = NO_CRITIC | UNSET | {
    "weighting": "linear", "temperature": 5.0, "advantage_clip": 5.0, "normalize_weights": False,
    "loss_weighting": "huber", "wasserstein_coefficient": 0.001, "old_policy_coefficient": 1.0,
    "old_policy_decay": 0.3, "old_policy_ramp": 0.001, "reward_std": "raw", "timestep_sampling": "steps",
    "loss_guidance": False,
}  # fmt: skip
# The rewards of shapes lie between 0 and 1, so that a temperature of 1 would hardly tell them apart: our choice.
ORW = NO_CRITIC | {
    "reward_shaping": "none", "advantage_clip": None, "weighting": "exponential", "normalize_weights": False,
    "temperature": 0.2, "wasserstein_coefficient": 0.3,
}  # fmt: skip
FEW = {"num_inference_steps": 4}
FLOW_GRPO = VARIANTS["tafs_grpo"]["Flow-GRPO"]

METHODS: dict[str, Method] = {
    "adjoint matching, K = 2": Method(
        "adjoint_matching", WINDOW | {"adjoint_steps": 2}, DIFFERENTIABLE
    ),  # 1 is refused
    "adjoint matching, K = 3": Method("adjoint_matching", WINDOW, DIFFERENTIABLE),
    "adjoint matching, all steps": Method("adjoint_matching", {}, DIFFERENTIABLE),
    "adjoint matching, K = 3, order 4": Method(
        "adjoint_matching", WINDOW | {"control_cost_order": "4"}, DIFFERENTIABLE
    ),
    "adjoint matching, K = 3, order 2+4": Method(
        "adjoint_matching", WINDOW | {"control_cost_order": "2+4"}, DIFFERENTIABLE
    ),
    "adjoint matching, memoryless": Method(
        "adjoint_matching", {"dynamics": "memoryless", "adjoint_clip_quantile": None}, DIFFERENTIABLE
    ),
    "VGG-Flow": Method("vgg_flow", {}, DIFFERENTIABLE),
    "VGG-Flow, no value network": Method("vgg_flow", {"value_network": "none"}, DIFFERENTIABLE),
    "DRaFT-3": Method("adjoint_matching", WINDOW | DRAFT, DIFFERENTIABLE),
    "AC-Flow": Method("ac_flow", CRITIC),
    "RAM": Method("ac_flow", RAM, BLACK_BOX),
    "AWM": Method("ac_flow", AWM, BLACK_BOX),
    "DiffusionNFT": Method("diffusion_nft", settings=BLACK_BOX),
    "ORW-CFM-W2": Method("ac_flow", ORW, BLACK_BOX),
    "TAFS-GRPO, final": Method("tafs_grpo", {"credit_rule": "final"}, BLACK_BOX),
    "TAFS-GRPO, level": Method("tafs_grpo", {"credit_rule": "level"}, BLACK_BOX),
    "TAFS-GRPO, mixed": Method("tafs_grpo"),
    "Flow-GRPO": Method("tafs_grpo", FLOW_GRPO | {"num_inference_steps": 10}),
    "Flow-GRPO, 4 steps": Method("tafs_grpo", FLOW_GRPO, BLACK_BOX),
    "DiffusionNFT, 4 steps": Method("diffusion_nft", FEW, BLACK_BOX, steps=4),
    "AWM, 4 steps": Method("ac_flow", AWM | FEW | {"timestep_bins": 4}, BLACK_BOX, steps=4),
}

LONG: dict[str, Method] = {label: METHODS[label] for label in ("AC-Flow", "RAM", "DiffusionNFT", "Flow-GRPO")}
LONG["TAFS-GRPO"] = METHODS["TAFS-GRPO, mixed"]
WITHOUT = VARIANTS["ac_flow"]
EXPONENTIAL = CRITIC | {"weighting": "exponential", "normalize_weights": True}
# The abstract's three claims: shaping, clipping with a warm-up, and weights from the critic; and the anchor, all
# beside both weightings. The critic that sees needs no warm-up, so that is left out of one that does. Nor does it take
# rewards as they are, so shaping is left out where there is no critic.
ABLATIONS: dict[str, Method] = {
    f"AC-Flow, {label}": Method("ac_flow", changes)
    for label, changes in {
        "no clipping of advantages": CRITIC | WITHOUT["no clipping of advantages"],
        "no critic": NO_CRITIC,
        "no critic, no shaping": NO_CRITIC | {"reward_shaping": "none"},
        "anchor of 0.01 for 0.5": CRITIC | WITHOUT["anchor of 0.01 for 0.5"],
        "backbone critic": BACKBONE,
        "backbone critic, no warm-up": BACKBONE | WITHOUT["no warm-up of the critic"],
        "exponential": EXPONENTIAL,
        "exponential, no clipping of advantages": EXPONENTIAL | WITHOUT["no clipping of advantages"],
        "exponential, no critic": EXPONENTIAL | NO_CRITIC,
        "exponential, no anchor": EXPONENTIAL | {"wasserstein_coefficient": 0.0},
        "exponential, backbone critic": EXPONENTIAL | BACKBONE,
        "exponential, backbone critic, no warm-up": EXPONENTIAL | BACKBONE | WITHOUT["no warm-up of the critic"],
    }.items()
}

# At equal scored pictures, at the demo's learning rate. The critic that scores clean estimates would spend five times
# as many, so AC-Flow stands here with the convolutional one.
SCORED: dict[str, Method] = {
    "AC-Flow, linear": Method("ac_flow", {"critic": "convolutional"}),
    "RAM": METHODS["RAM"],
    "AWM": METHODS["AWM"],
    "DiffusionNFT": METHODS["DiffusionNFT"],
    "Flow-GRPO": METHODS["Flow-GRPO"],
    "Flow-GRPO, 4 steps": METHODS["Flow-GRPO, 4 steps"],
}
# Where E[u|z] is not the old policy's velocity, which is what a critic is for; judged as it is drawn.
SHIFTED = {"guidance 2": {"guidance_scale": 2.0}, "4 steps": FEW}
CRITICS: dict[str, Method] = {
    f"RAM, {how}, {label}": Method(
        "ac_flow", RAM | changes | critic, BLACK_BOX, changes.get("num_inference_steps", 20)
    )
    for how, changes in SHIFTED.items()
    for label, critic in (("no critic", {}), ("critic", CRITIC))
}


@dataclass(frozen=True)
class Length:
    """How long a run is, and how often and on what it is judged.

    Attributes:
        seconds: Of training, without evaluations; None for a run that ends by its updates.
        updates: At most.
        evaluations: Evenly spaced, the last one at the end.
        prompts: Held-out ones, with `pictures` of each.
        pictures: Of each prompt, at least 2, so that there is diversity.
        images: Of an update; None for those of the demo.
    """

    seconds: float | None
    updates: int
    evaluations: int
    prompts: int
    pictures: int
    images: int | None = None

    @property
    def pictures_drawn(self) -> int:
        """By all evaluations, with those of the base model."""
        return (self.evaluations + 1) * self.prompts * self.pictures


GRID_LENGTH = Length(seconds=120, updates=MOST_UPDATES, evaluations=1, prompts=64, pictures=2)
LENGTH = Length(seconds=240, updates=MOST_UPDATES, evaluations=3, prompts=64, pictures=4)
LONG_LENGTH = Length(None, updates=LONG_UPDATES, evaluations=10, prompts=64, pictures=4, images=LONG_IMAGES)
CALLS_LENGTH = Length(None, updates=CALLS // CALLS_IMAGES, evaluations=2, prompts=64, pictures=4, images=CALLS_IMAGES)
# At half of its pictures, as guided rollouts take twice the calls, and a critic of estimates as many scores again.
CRITIC_LENGTH = replace(CALLS_LENGTH, evaluations=1, images=CALLS_IMAGES // 2)
QUICK_LENGTH = Length(seconds=20, updates=MOST_UPDATES, evaluations=2, prompts=16, pictures=2, images=32)
QUICK = ("adjoint matching, K = 3", "VGG-Flow", "AC-Flow", "DiffusionNFT", "TAFS-GRPO, mixed")


@dataclass(frozen=True)
class Run:
    """One run of the study.

    Attributes:
        stage: One of `STAGES`; "quick" in the quick study.
        setting: A key of `REWARDS`.
        label: Of the method.
        seed: Of the run.
        length: How long it is.
        method: What runs.
        factor: On the learning rate of the demo; None where the grid decides.
    """

    stage: str
    setting: str
    label: str
    seed: int
    length: Length
    method: Method
    factor: float | None = None

    @property
    def name(self) -> str:
        """By which it is known in the results file."""
        grid = f"/rate x {self.factor:g}" if self.stage == "grid" else ""
        return f"{self.stage}/{self.setting}/{self.label}{grid}/seed {self.seed}"

    @property
    def estimated_seconds(self) -> float:
        """What it will take one core."""
        calls = BACKBONE_CALLS if self.method.changes.get("critic") == "backbone" else 1.0
        long = self.length.updates * (self.length.images or 0) * SECONDS_PER_IMAGE * calls
        training = long if self.length.seconds is None else self.length.seconds
        return SET_UP + training + SECONDS_PER_PICTURE * self.length.pictures_drawn

    def settings(self, factor: float) -> dict[str, Any]:
        """All that `flowrl` is told.

        Args:
            factor: On the learning rate.
        """
        reward = REWARDS[self.setting]
        judges = [name for name in REWARDS.values() if name != reward]
        found = SHARED | BASES[self.method.demo] | dict(self.method.changes)
        found |= {
            "seed": self.seed,
            "max_steps": self.length.updates,
            "learning_rate": factor * found["learning_rate"],
        }
        found |= {"reward_funcs": [reward], "eval_reward_funcs": judges, "logging_steps": 1, "log_images": 0}
        if self.method.demo != "tafs_grpo":  # which judges by its own sampler, with the ODE of 20 steps beside it
            found["eval_num_inference_steps"] = self.method.steps
        if self.length.images is not None:
            found["per_device_train_batch_size"] = self.length.images
        return found


def plan(quick: bool = False) -> list[Run]:
    """All runs in their order: method by method the grid and the seeds, then the long ones, other seeds last.

    Args:
        quick: One seed of one method of each trainer, without a grid.
    """
    if quick:
        return [
            Run("quick", setting, label, SEEDS[0], QUICK_LENGTH, METHODS[label], 1.0)
            for label in QUICK
            for setting in METHODS[label].settings
        ]
    runs = []
    for label, method in METHODS.items():
        tuned_in = method.settings[-1]  # the black box, where it runs there
        runs += [Run("grid", tuned_in, label, GRID_SEED, GRID_LENGTH, method, factor) for factor in GRID]
        runs += [Run("main", setting, label, seed, LENGTH, method) for setting in method.settings for seed in SEEDS]
    for stage, methods, length in (("calls", SCORED, CALLS_LENGTH), ("critic", CRITICS, CRITIC_LENGTH)):
        runs += [
            Run(stage, "black box", label, seed, length, method, 1.0)
            for seed in SEEDS
            for label, method in methods.items()
        ]
    long = [
        Run("long", "black box", label, seed, LONG_LENGTH, method, 1.0)
        for seed in SEEDS
        for label, method in LONG.items()
    ]
    ablations = [
        Run("ablation", "black box", label, SEEDS[0], LONG_LENGTH, method, 1.0) for label, method in ABLATIONS.items()
    ]
    return [*runs, *long[: len(LONG)], *ablations, *long[len(LONG) :]]
