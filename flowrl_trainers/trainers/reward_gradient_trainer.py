"""`RewardGradientTrainer`: what adjoint matching and VGG-Flow share around the gradient of the reward."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderTiny
from peft import LoraConfig
from torch import Tensor

from ..flow import expand_like, root_mean_square
from ..pipelines.tiny_decoder import TinyDecoder
from ..run_folder.identity import weights_identity
from ..sampling.draws import ImageKey
from ..sampling.prompt_groups import Example
from .base_trainer import FlowRLTrainer, RecordT, RolloutT
from .reward_gradient_config import RewardGradientConfig


class RewardGradientTrainer(FlowRLTrainer[RolloutT, RecordT]):
    """A trainer whose target is built from reward gradients, which it clips and scales.

    Args:
        reward_decoder: Beside the arguments of `FlowRLTrainer`, an `AutoencoderTiny` of diffusers, through which the
            gradient of the reward is taken; None for the one that `args.reward_decoder` names, or the model's own.
    """

    config_class = RewardGradientConfig
    needs_reward_gradient = True

    args: RewardGradientConfig

    def __init__(self, *args: Any, reward_decoder: AutoencoderTiny | None = None, **kwargs: Any) -> None:
        self.given_decoder = reward_decoder
        super().__init__(*args, **kwargs)

    def check_arguments(self, args: Any, peft_config: LoraConfig | None) -> None:
        """The decoder of the reward's gradient; raises `ValueError` for two of them, and for what is none."""
        super().check_arguments(args, peft_config)
        if self.given_decoder is not None and args.reward_decoder is not None:
            raise ValueError(
                f"`reward_decoder` is passed, but `args.reward_decoder` is {args.reward_decoder!r}: leave out one of "
                "them."
            )
        source = self.given_decoder or args.reward_decoder
        self.tiny_decoder = None if source is None else TinyDecoder(source)

    def set_up(self) -> None:
        """The scale of the reward, None until the first rollout finds it; and whether the decoder fits the model."""
        self.reward_scale: float | None = self.args.reward_scale
        self.scorer.gradient_decoder = self.tiny_decoder
        if self.tiny_decoder is not None:
            self.tiny_decoder.autoencoder.to(self.args.device)
            with self.placement.judging([]):
                self.tiny_decoder.check_fits(self.flow, self.initial_latents([ImageKey(0, 0, 0)], "shape"))

    @property
    def known_scale(self) -> float:
        """The scale of the reward, once the first rollout has found it."""
        assert self.reward_scale is not None
        return self.reward_scale

    def reward_gradient(self, latents: Tensor, examples: list[Example]) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (M, R) of final latents (M, ...), their gradient (M, ...), and which images (M,) are good.

        The gradient is zero for an image whose score or gradient is not finite.
        """
        scores, gradient = self.scorer.score_with_gradient(latents, examples)
        if self.tiny_decoder is not None and self.state.global_step == 0:
            self._compare_decoders(latents, examples, gradient)
        good = ~scores.isinf().any(dim=1) & gradient.flatten(1).isfinite().all(dim=1)
        return scores, torch.where(expand_like(good, gradient), gradient, 0.0), good

    def _compare_decoders(self, latents: Tensor, examples: list[Example], gradient: Tensor) -> None:
        """Note the mean cosine between gradients through `reward_decoder` and through the model's own autoencoder.

        Args:
            latents: (M, ...).
            examples: M of them.
            gradient: That through `reward_decoder`, (M, ...).
        """
        full = copy.copy(self.scorer)
        full.gradient_decoder, full.context = None, lambda: self.reward_context(lambda name, value: None)
        _, expected = full.score_with_gradient(latents, examples)
        cosine = torch.cosine_similarity(gradient.flatten(1), expected.flatten(1))
        known = cosine.isfinite() & gradient.flatten(1).any(dim=1) & expected.flatten(1).any(dim=1)
        self.metrics.note("reward_decoder_cosine", cosine[known].mean(), unless_nan=True)

    def clip_threshold(self, norms: Tensor) -> Tensor | None:
        """The quantile of the norms (M,) of the reward gradients of all processes; None without clipping."""
        everyone = self.accelerator.gather(norms)
        self.metrics.note("reward_gradient_norm", everyone.mean())
        quantile, moving = (
            self.args.reward_gradient_clip_quantile,
            everyone[everyone > 0],
        )  # zeros would clip all others
        return None if quantile is None or not len(moving) else torch.quantile(moving, quantile)

    @staticmethod
    def clip(gradient: Tensor, threshold: Tensor | None, batch_dims: int = 1) -> Tensor:
        """Gradients scaled down to the threshold where their norm is above it.

        Args:
            gradient: (M, ...), or (B, K, ...) with two batch dimensions.
            threshold: One, or K of them; None leaves all as they are.
            batch_dims: The number of leading dimensions that number gradients.
        """
        if threshold is None:
            return gradient
        norm = gradient.flatten(batch_dims).norm(dim=batch_dims)
        return gradient * expand_like(torch.where(norm > threshold, threshold / norm, 1.0), gradient)

    def mean_square(self, parts: list[Tensor], batch_dims: int = 1) -> float:
        """The mean square over the latents of all parts and processes.

        Args:
            parts: (M, ...) each, or (B, K, ...) with two batch dimensions.
            batch_dims: The number of leading dimensions that number latents.

        Raises:
            ValueError: If none of them is finite.
        """
        rms = torch.cat([root_mean_square(part, batch_dims).flatten() for part in parts])
        squares = self.accelerator.gather(rms).double().square()
        finite = squares.isfinite()
        if not finite.any():
            raise ValueError(
                "Nothing that the first rollout computed is finite: train in float32 or bfloat16, with rewards that "
                "stay below 1e15."
            )
        return float(squares[finite].mean())

    def refuse_zero_gradient(self, gradients: list[Tensor]) -> None:
        """Raises `ValueError` if the reward gradients (M, ...) of the first rollout are zero on all processes."""
        if not self.accelerator.gather(torch.cat([root_mean_square(g) for g in gradients])).any():
            raise ValueError(
                "The reward's gradient is zero on the whole first rollout: nothing can be learned from it."
            )

    def algorithm_state(self) -> dict[str, Any]:
        """The reward scale, which was found on the first rollout."""
        return {"reward_scale": self.reward_scale}

    def load_algorithm_state(self, state: Mapping[str, Any]) -> None:
        """Take up the reward scale."""
        self.reward_scale = state["reward_scale"]

    def card_settings(self) -> dict[str, Any]:
        """The reward scale, once it is known."""
        scale = "not found yet" if self.reward_scale is None else f"{self.reward_scale:.4g}"
        decoder = {} if self.tiny_decoder is None else {"reward decoder": self.tiny_decoder.name}
        size = self.args.product_batch_size
        return {"reward scale": scale} | decoder | ({"product batch": size} if size else {})

    def _identity(self) -> dict[str, Any]:
        tiny = self.tiny_decoder
        return super()._identity() | {"reward decoder": None if tiny is None else weights_identity(tiny.autoencoder)}
