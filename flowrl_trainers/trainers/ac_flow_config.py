"""`ACFlowConfig`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from transformers.hf_argparser import HfArg

from ..cost import Call, Drawing, Kind, Phase
from ..flow.advantages import Weighting
from .config_checks import Range
from .renoising_config import RenoisingConfig


@dataclass
class ACFlowConfig(RenoisingConfig):
    r"""Settings of `ACFlowTrainer`, beside those of `RenoisingConfig`.

    All defaults are our choice: the paper's could not be read.

    ORW-CFM-W2, the predecessor, is `critic="none"`, `reward_shaping="none"`, `advantage_clip=None`,
    `normalize_weights=False`; reward-weighted flow matching is that with `wasserstein_coefficient=0`. RAM is
    `target="fixed"` without a critic.
    """

    target: Literal["weighted", "fixed"] = HfArg(
        default="weighted",
        help="'weighted': the error to the velocity of the image's own path, weighted by the advantage; 'fixed': the "
        "error to a target that the advantage shifts, as in RAM, which stays bounded for bad images. It resolves the "
        "settings whose default is None.",
    )
    target_anchor: Literal["base", "old"] = HfArg(
        default="base",
        help="The velocity from which the advantage shifts the fixed target: that of the base model, or that of the "
        "old policy, which is the velocity form of DiffusionNFT.",
    )
    reward_multiplier: Annotated[float, Range(above=0)] = HfArg(
        default=100.0,
        help="The factor eta on the advantage in the fixed target, whose loss is divided by it: the pull to the "
        "anchor is 1 / eta of that of the reward. RAM has 100, and 1000 with PickScore.",
    )
    rollout_policy: Literal["current", "old"] = HfArg(
        default="current", help="Which policy draws the rollouts: the present one, or the old one, which lags behind."
    )
    old_policy_coefficient: Annotated[float, Range(at_least=0)] = HfArg(
        default=0.0,
        help="The weight of the mean squared distance to the velocity of the old policy; 1 in AWM, with advantages "
        "that are at most 1.",
    )
    loss_weighting: Literal["none", "sigma", "huber"] = HfArg(
        default="none",
        help="What multiplies the weighted error of a state at level sigma: 'none' 1, 'sigma' sigma, 'huber' sigma "
        "times the error to the power `huber_power` - 1, as in AWM; none is differentiated.",
    )
    huber_power: Annotated[float, Range(above=0, at_most=1)] = HfArg(
        default=0.25, help="The power q of the mean squared error in AWM's loss; 1 is 'sigma'."
    )
    advantage_clip: Annotated[float, Range(above=0)] | None = HfArg(
        default=1.0,
        help="Advantages are clipped to plus and minus this, in standard deviations of the reward, which bounds the "
        "weights; None for no bound.",
    )
    weighting: Weighting | None = HfArg(
        default=None,
        help="How an advantage A weighs its image: 'exponential' exp(A / temperature), 'softplus' log(1 + exp(A / "
        "temperature)), 'positive' max(A, 0), 'indicator' 1 where A is above 0, 'linear' A / temperature, which is "
        "signed and needs the anchor. Default: 'exponential'; 'linear' with a fixed target, which knows no other.",
    )
    temperature: Annotated[float, Range(above=0)] = HfArg(
        default=1.0, help="The temperature tau of the weighting, above 0; small ones are greedy."
    )
    normalize_weights: bool | None = HfArg(
        default=None,
        help="Whether weights are divided by their mean over the rollout, so that the anchor's weight is relative. "
        "Default: yes; no with a fixed target.",
    )
    wasserstein_coefficient: Annotated[float, Range(at_least=0)] | None = HfArg(
        default=None,
        help="The weight alpha of the mean squared distance to the base velocity, a bound of the Wasserstein-2 "
        "distance that keeps diversity; 0 for no anchor. Default: 0.3; 0 with a fixed target.",
    )
    critic: Literal["reward_of_estimate", "backbone", "convolutional", "module", "none"] = HfArg(
        default="reward_of_estimate",
        help="'reward_of_estimate' scores the clean estimate of every state, `timestep_bins` more of each image, "
        "times what fitted earlier rollouts best at its level; 'backbone' is the base network with an adapter of its "
        "own and a head at every place, which shares all other weights with it; 'convolutional' is a small network "
        "sized by the latent; 'module' is the one that is passed to the trainer; with 'none', which suits rewards "
        "that cost much, every value is zero.",
    )
    critic_steps: Annotated[int, Range(at_least=1)] = HfArg(
        default=4, help="The updates per rollout of a critic that is a network, each on all of its images."
    )
    critic_bins_in_one_call: bool = HfArg(
        default=False,
        help="Whether a critic that is a network judges the states of all bins in one call instead of one call per "
        "bin: faster, and the same but for rounding, unless one of your own mixes the images of a batch.",
    )
    critic_learning_rate: Annotated[float, Range(above=0)] = HfArg(
        default=1e-3, help="The learning rate of the AdamW of a critic that is a network."
    )
    critic_warmup_max_steps: Annotated[int, Range(at_least=0)] = HfArg(
        default=20,
        help="The most rollouts during which a critic that is a network learns alone, from the base model's images; 0 "
        "for no warm-up. It ends earlier if the critic's explained variance on unseen images stops rising. The "
        "updates of these rollouts count as updates of the run.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_only_model and self.load_best_model_at_end and self.critic != "none":
            raise ValueError(
                "`load_best_model_at_end` needs the critic of a checkpoint, which `save_only_model` leaves out: "
                "choose one."
            )
        if self.critic == "backbone" and self.fp16:
            raise ValueError(
                "`critic` ('backbone') cannot be trained with `fp16`, whose gradients are scaled for the model alone: "
                "take `bf16`."
            )
        if self.critic == "reward_of_estimate" and self.reward_shaping == "none":
            raise ValueError(
                "`reward_shaping` ('none') must be 'standardise' with `critic='reward_of_estimate'`, which compares "
                "estimates within their prompt as rewards are: leave it out, or set `critic` to 'none'."
            )
        self._refuse_idle_settings()
        if self.target == "fixed":
            self._resolve_fixed_target()
            return
        self.weighting = "exponential" if self.weighting is None else self.weighting
        self.normalize_weights = True if self.normalize_weights is None else self.normalize_weights
        self.wasserstein_coefficient = 0.3 if self.wasserstein_coefficient is None else self.wasserstein_coefficient
        if self.weighting == "linear" and self.wasserstein_coefficient == 0 and self.old_policy_coefficient == 0:
            raise ValueError(
                "`wasserstein_coefficient` must be above 0 with `weighting='linear'`: without it the loss has no "
                "minimum."
            )
        if self.weighting == "linear" and self.normalize_weights:
            raise ValueError(
                "`normalize_weights` must be False with `weighting='linear'`: signed weights have no mean to divide "
                "by."
            )

    @property
    def head_kind(self) -> Literal["critic"] | None:
        """The critic, where it is a network of its own kind; a module counts as if it were the convolutional one."""
        return "critic" if self.critic in ("convolutional", "module") else None

    @property
    def base_pull(self) -> float:
        """The weight of the pull to the base velocity beside an advantage that is signed: 1 over the eta of the tilt
        exp(eta A), where the level weight is 1; 0 where positive weights, or no such pull, leave eta without a
        meaning.
        """
        if self.weighting != "linear":
            return 0.0
        fixed = self.target == "fixed" and self.target_anchor == "base"
        return 1 / self.reward_multiplier if fixed else self.wasserstein_coefficient or 0.0

    @property
    def needs_base(self) -> bool:
        """Whether (4), (5) or the guard asks for the base velocity."""
        fixed = self.target == "fixed" and self.target_anchor == "base"
        return bool(self.wasserstein_coefficient) or self.norm_guard > 0 or fixed

    @property
    def needs_old(self) -> bool:
        """Whether (5), the pull towards the old policy or the critic asks for its velocity at the states."""
        pulls = self.target == "fixed" or self.old_policy_coefficient > 0
        return pulls or self.critic == "reward_of_estimate"

    @property
    def latents_kept(self) -> int:
        """State and target of every level, and the velocities of base and old policy that the loss pulls towards."""
        pulls = bool(self.wasserstein_coefficient) + (self.old_policy_coefficient > 0)
        return (2 + pulls) * self.timestep_bins

    def calls(self, drawing: Drawing) -> list[Call]:
        """N steps, r of (1), and at K = `timestep_bins` states (2) once per critic step, V of (3), v_base, v_old, (4).

        V is also asked at K further states before the critic learns from them, which tells how well it does.
        """
        calls = self.rollout_calls(drawing)
        at_once = self.decode_batch_size or self.images_at_once
        calls += drawing.scores(self.images_per_device, at_once)
        if self.critic == "reward_of_estimate":
            for _ in range(self.timestep_bins):
                calls += drawing.scores(self.images_per_device, at_once)
        elif self.critic != "none":
            together = self.timestep_bins if self.critic_bins_in_one_call else 1
            size, states = self.per_device_train_batch_size * together, self.timestep_bins // together
            states *= self.micro_steps_per_rollout
            see, learn = (Kind.BASE, Kind.TRAIN) if self.critic == "backbone" else (Kind.HEAD, Kind.HEAD_TRAIN)
            calls += [Call(see, size, 2 * states, Phase.TARGET)]
            calls += [Call(learn, size, self.critic_steps * states, Phase.TARGET)]
        return calls + self.matching_calls(drawing, needs_base=self.needs_base, needs_old=self.needs_old)

    @property
    def uses_old_policy(self) -> bool:
        """Whether the old policy draws rollouts, or stands in the loss."""
        return self.rollout_policy == "old" or self.target == "fixed" or self.old_policy_coefficient > 0

    @property
    def keeps_old_policy(self) -> bool:
        """Where something asks for it, and it is not simply the present one at the rollout."""
        return self.uses_old_policy and self.old_policy_decay > 0

    def _refuse_idle_settings(self) -> None:
        """Raises `ValueError` for what has no effect, or none that is meant, beside the other settings."""
        if self.old_policy_decay > 0 and not self.uses_old_policy:
            raise ValueError(
                f"`old_policy_decay` ({self.old_policy_decay}) has no effect where nothing asks for the old policy: "
                "set `rollout_policy='old'`, `target='fixed'` or `old_policy_coefficient`, or leave it out."
            )
        if self.target == "weighted" and self.target_anchor == "old":
            raise ValueError(
                "`target_anchor` ('old') has no effect with `target='weighted'`: leave it out, or set "
                "`target='fixed'`."
            )
        if self.critic_bins_in_one_call and self.critic in ("reward_of_estimate", "none"):
            raise ValueError(
                f"`critic_bins_in_one_call` (True) has no effect with `critic={self.critic!r}`, which is no network: "
                "leave it out."
            )
        if self.loss_weighting == "huber" and self.updates_on_rollout > 1:
            raise ValueError(
                f"`loss_weighting` ('huber') needs one update per rollout, but there are {self.updates_on_rollout}: "
                "AWM's likelihood ratio, which is 1 in the first of them, is not computed. Set `steps_per_generation` "
                "to `gradient_accumulation_steps` and `num_iterations` to 1."
            )

    def _resolve_fixed_target(self) -> None:
        """Fill in what is None; raises `ValueError` for what contradicts a fixed target."""
        if self.weighting not in (None, "linear"):
            raise ValueError(
                f"`weighting` ({self.weighting!r}) must be 'linear' with `target='fixed'`, whose target the advantage "
                "shifts both ways: leave it out."
            )
        if self.normalize_weights:
            raise ValueError(
                "`normalize_weights` must be False with `target='fixed'`: signed weights have no mean to divide by."
            )
        if self.wasserstein_coefficient and self.target_anchor == "base":
            raise ValueError(
                f"`wasserstein_coefficient` ({self.wasserstein_coefficient}) must be 0 with `target='fixed'`, whose "
                "anchor the base model is already: lower `reward_multiplier`, or set `target_anchor='old'`."
            )
        if self.loss_weighting != "none":
            raise ValueError(
                f"`loss_weighting` ({self.loss_weighting!r}) must be 'none' with `target='fixed'`: leave it out."
            )
        self.weighting, self.normalize_weights = "linear", False
        self.wasserstein_coefficient = self.wasserstein_coefficient or 0.0
