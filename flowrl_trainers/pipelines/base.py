"""`FlowPipeline`: everything that the trainers need of a model, and nothing else."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_model
from torch import nn

from ..flow import euler_step, uniform_sigmas

Conditioning = dict[str, torch.Tensor]
Settings = dict[str, Any]
Generators = torch.Generator | list[torch.Generator] | None


class FlowPipeline(ABC):
    """A flow-matching model seen as a velocity field.

    Subclass it for a model of your own: implement `transformer`, `encode_prompts`, `initial_latents`, `velocity` and `decode`; the
    rest has defaults. The pipelines of diffusers have subclasses here: `FlowPipeline.from_pretrained` and
    `FlowPipeline.from_pipeline` pick one by the pipeline's class.

    Time runs as in diffusers: sigma is 1 for noise and 0 for data, and the velocity is `dx/dsigma = noise - data`. Latents are
    float32 and spatial, `(B, C, h, w)`, in every family (`(B, d)` for models of vectors).
    """

    lora_target_modules: ClassVar[list[str]] = []
    """The names of the layers that a LoRA adapts unless told otherwise."""

    lora_exclude_modules: Sequence[str] = ()
    """Layers among them that a LoRA must leave out, because they reach nothing."""

    task: ClassVar[str | None] = "text-to-image"
    """The `pipeline_tag` of a model card."""

    example_prompt: ClassVar[str] = "your prompt"
    """What the code of a model card draws."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a `velocity` that could be called without saying whether guidance is meant.

        Raises:
            TypeError: The class defines `velocity` with a `guidance` that is missing, positional or has a default.
        """
        super().__init_subclass__(**kwargs)
        if "velocity" not in cls.__dict__:
            return
        guidance = inspect.signature(cls.velocity).parameters.get("guidance")
        if guidance is None or guidance.kind is not guidance.KEYWORD_ONLY or guidance.default is not guidance.empty:
            raise TypeError(
                f"`{cls.__name__}.velocity` must take `guidance` by keyword only and without a default: change its "
                "signature to `velocity(self, transformer, latents, sigma, conditioning, *, guidance)`."
            )

    # ---- what a model must say -------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def transformer(self) -> nn.Module:
        """The network that is trained."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """What the network reads of the prompts, the negative prompt included where guidance needs it.

        The text encoders may be on another device than the network: encode where they are. Every tensor has the prompt as its first
        dimension, so that it can be indexed, repeated and kept.
        """

    @abstractmethod
    def initial_latents(self, batch_size: int, generator: Generators = None) -> torch.Tensor:
        """Float32 noise of `batch_size` latents. `generator`: one for all, or a list with one per image."""

    @abstractmethod
    def velocity(
        self,
        transformer: nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: Conditioning,
        *,
        guidance: bool,
    ) -> torch.Tensor:
        """The velocity `dx/dsigma` at `latents`.

        With guidance, weights learn through the conditional branch: the negative branch keeps its graph only where the
        latents require a gradient.

        Args:
            transformer: The network to call; it is passed in, because a trainer may have wrapped it.
            latents: (B, ...), float32.
            sigma: (B,), the noise level of each sample.
            conditioning: What `encode_prompts` returns for B prompts.
            guidance: True for the pipeline's guidance formula at the scale of its settings, False for the conditional
                branch alone. It has no default, so that every caller says which velocity it means.

        Returns:
            The velocity, float32 and of the shape of `latents`.
        """

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)`, float32, nominally in [0, 1], differentiable and not clamped: a clamp kills reward gradients."""

    # ---- what follows from it --------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the network is, and hence where latents are made."""
        return next(self.transformer.parameters()).device

    @property
    def name(self) -> str | None:
        """The Hub id of the model, for cards; None if it has none."""
        return None

    def call_arguments(self) -> dict[str, Any]:
        """The settings that somebody who calls the stock pipeline has to pass: for cards, and what a resumed run must have as before.

        Plain numbers, strings and lists of them, as they are part of a checkpoint.
        """
        return {}

    def loader(self) -> tuple[str, str]:
        """Module and class that load the pipeline, for cards."""
        return "diffusers", "DiffusionPipeline"

    def scheduler_code(self, renoises: bool) -> str | None:
        """The lines of Python that set the scheduler with which the stock pipeline `pipe` draws as here, for cards; None for its own.

        renoises: whether the sampler draws all noise afresh at every step.
        """
        return None

    def advice(self, num_inference_steps: int) -> list[str]:
        """Sentences about settings that do not suit the model, which a trainer logs as warnings."""
        return []

    def text_encoders(self) -> list[nn.Module]:
        """The networks that `encode_prompts` needs and nothing else does; a trainer sends them away once prompts are encoded."""
        return []

    def decoders(self) -> list[nn.Module]:
        """The networks that `decode` needs."""
        return []

    def images(self, latents: torch.Tensor) -> torch.Tensor:
        """`decode(latents)` clamped to [0, 1]: what black-box rewards and pictures get."""
        return self.decode(latents).clamp(0, 1)

    def prompt_features(self, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """What a critic or a value network reads of the prompts: features (B, L, D) and a mask (B, L), True where there is a token.

        By default one feature that says nothing, so that such a network does not read the prompt.
        """
        rows = next(iter(conditioning.values()))
        return rows.new_zeros(len(rows), 1, 1, dtype=torch.float32), rows.new_ones(len(rows), 1, dtype=torch.bool)

    def sigmas(self, num_inference_steps: int, spacing: Literal["pipeline", "uniform"] = "pipeline") -> torch.Tensor:
        """`num_inference_steps + 1` levels from 1 down to 0, float32.

        spacing: "pipeline" for the schedule of the stock pipeline, "uniform" for a uniform grid through the pipeline's own shift,
        without the level near zero with which some stock schedules end. Here, both are the plain uniform grid.
        """
        return uniform_sigmas(num_inference_steps)

    @torch.no_grad()
    def sample_latents(
        self, transformer: nn.Module, conditioning: Conditioning, latents: torch.Tensor, sigmas: torch.Tensor
    ) -> torch.Tensor:
        """The Euler ODE from the first to the last of `sigmas` (on the latents' device), with guidance, without gradients."""
        for sigma, sigma_next in pairwise(sigmas):
            v = self.velocity(transformer, latents, sigma.expand(len(latents)), conditioning, guidance=True)
            latents = euler_step(latents, v, sigma, sigma_next)
        return latents

    @torch.no_grad()
    def sample(self, prompts: list[str], num_inference_steps: int, generator: Generators = None) -> torch.Tensor:
        """One picture per prompt by the Euler ODE on the pipeline's schedule, `(B, 3, H, W)` in [0, 1], without gradients.

        generator: one for all, or a list with one per prompt; then the picture of a (prompt, seed) does not depend on its batch.
        """
        latents = self.initial_latents(len(prompts), generator)
        sigmas = self.sigmas(num_inference_steps).to(latents.device)
        conditioning = {name: value.to(latents.device) for name, value in self.encode_prompts(prompts).items()}
        return self.images(self.sample_latents(self.transformer, conditioning, latents, sigmas))

    def save_lora(self, directory: str | Path) -> None:
        """Write the transformer's adapter in the form that this family's stock loader reads."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its adapter is saved: override `save_lora`.")

    def save_transformer(self, directory: str | Path) -> None:
        """Write the whole transformer, after full fine-tuning; by default its tensors as `model.safetensors`."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        save_model(self.transformer, str(Path(directory) / "model.safetensors"))

    # ---- finding the family of a diffusers pipeline ----------------------------------------------------------------------

    @staticmethod
    def from_pipeline(pipeline: Any, **settings: Any) -> "FlowPipeline":
        """The family of a loaded diffusers pipeline.

        settings: `height`, `width` (pixels), `guidance_scale`, `negative_prompt`, and what the family's prompt encoding takes; None
        and what is left out mean the family's own defaults. The pipeline itself is not changed. Raises `ValueError` for a pipeline
        of no known family, a pipeline that is not flow matching, and settings that the family does not have.
        """
        from . import families

        return families.wrap(pipeline, settings)

    @staticmethod
    def from_pretrained(id_or_folder: str | Path, dtype: torch.dtype | None = None, **settings: Any) -> "FlowPipeline":
        """Load a pipeline from the Hub or a folder and wrap it as `from_pipeline` does.

        dtype: the precision of its networks; None for float32. Raises `ValueError` for a folder that is no pipeline.
        """
        from . import families

        return families.wrap(families.load(id_or_folder, dtype or torch.float32, settings), settings)
