"""`FlowPipeline`: everything that the trainers need of a model, and nothing else."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from ..flow import euler_steps, uniform_sigmas
from .quantization import Quantization

Conditioning = dict[str, Tensor]
Settings = dict[str, Any]
Generators = torch.Generator | list[torch.Generator] | None


class FlowPipeline(ABC):
    """A flow-matching model seen as a velocity field.

    Subclass it for a model of your own: implement `transformer`, `encode_prompts`, `initial_latents`, `velocity` and
    `decode`; everything else has a default. The pipelines of diffusers have subclasses here:
    `FlowPipeline.from_pretrained` and `FlowPipeline.from_pipeline` pick one by the pipeline's class.

    Time runs as in diffusers: sigma is 1 for noise and 0 for data, and the velocity is `dx/dsigma = noise - data`.
    Latents are float32 and spatial, `(B, C, h, w)`, in every family (`(B, d)` for models of vectors).
    """

    lora_target_modules: ClassVar[list[str]] = []
    """The names of the layers that a LoRA adapts if its configuration names none."""

    lora_exclude_modules: Sequence[str] = ()
    """Layers among them that a LoRA must leave out, because their output is not used."""

    last_layer: ClassVar[str] = "proj_out"
    """The name of the network's last layer, whose input, features (B, L, D) of L places, a critic reads."""
    last_layer_varies: ClassVar[bool] = False
    """Whether the input of that layer has the same places for equally long prompts alone: as it has places of their
    tokens too, or as the network is called for each length by itself."""
    features_need_network: ClassVar[bool] = False
    """Whether `prompt_features` calls a part of the network."""

    repeated_blocks: ClassVar[Sequence[str]] = ()
    """The names of the classes of the network's repeated blocks, which `compile_blocks` compiles."""

    guidance_in_one_call: bool = False
    """Whether both branches of guidance are computed in one call, where no weight takes a gradient."""

    task: ClassVar[str | None] = "text-to-image"
    """The `pipeline_tag` of a model card; None if the Hub has no tag for the model."""

    example_prompt: ClassVar[str] = "your prompt"
    """The prompt in the code of a model card."""

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

    # ---- what a model must say --------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def transformer(self) -> nn.Module:
        """The network that is trained."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """What the network reads of the prompts, with the negative prompt where guidance needs one.

        The text encoders may be on another device than the network: encode where they are. The first dimension of
        every tensor counts the prompts, so that trainers can index it, repeat it and keep it.
        """

    @abstractmethod
    def initial_latents(self, batch_size: int, generator: Generators = None) -> Tensor:
        """Float32 noise of `batch_size` latents; `generator` is one for all images, or a list with one per image."""

    @abstractmethod
    def velocity(
        self,
        transformer: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        guidance: bool,
    ) -> Tensor:
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
    def decode(self, latents: Tensor) -> Tensor:
        """Images `(B, 3, H, W)`, float32 and differentiable, nominally in [0, 1].

        They are not clamped, because a clamp has no gradient outside of [0, 1].
        """

    # ---- what follows from it ---------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of the network, on which latents are made too."""
        return next(self.transformer.parameters()).device

    @property
    def name(self) -> str | None:
        """The Hub id of the model, for cards; None for a model that is not from the Hub."""
        return None

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """The repeated blocks of the network, or of a copy of it."""
        return [module for module in network.modules() if type(module).__name__ in self.repeated_blocks]

    def call_arguments(self) -> dict[str, Any]:
        """The arguments with which the stock pipeline draws as here.

        Cards show them, and a run resumes only with the same ones. A checkpoint holds them, so they are plain numbers,
        strings and lists of them.
        """
        return {}

    def loader(self) -> tuple[str, str]:
        """Module and class that load the pipeline, for cards."""
        return "diffusers", "DiffusionPipeline"

    def scheduler_code(self, renoises: bool) -> str | None:
        """Python code for cards: the lines that give the stock pipeline `pipe` the scheduler that draws as here.

        None if the pipeline's scheduler already does. `renoises` says whether the sampler draws all noise afresh at
        every step.
        """
        return None

    def grid_arguments(self, levels: list[float]) -> dict[str, Any]:
        """The arguments that make the stock pipeline sample at these levels, before its shift; for cards."""
        return {"sigmas": levels}

    @property
    def guided(self) -> bool:
        """Whether the guided velocity takes a second, negative forward pass, and so differs from the conditional
        one.
        """
        return False

    def advice(self, num_inference_steps: int) -> list[str]:
        """Warnings about settings that do not suit the model; a trainer logs them."""
        return []

    def text_encoders(self) -> list[nn.Module]:
        """The networks that only `encode_prompts` needs; a trainer moves them away once prompts are encoded."""
        return []

    def encoding_facts(self) -> dict[str, Any] | None:
        """What `encode_prompts` follows from beside prompts and the weights of `text_encoders`, as plain types.

        None where that is not known, so that encoded prompts are not kept from run to run.
        """
        return None

    def decoders(self) -> list[nn.Module]:
        """The networks that `decode` needs."""
        return []

    @property
    def decoder_overflows_in_float16(self) -> bool:
        """Whether what `decode` computes is too large for float16; False by default."""
        return False

    def images(self, latents: Tensor) -> Tensor:
        """`decode(latents)` clamped to [0, 1]: what black-box rewards and pictures get."""
        return self.decode(latents).clamp(0, 1)

    def prompt_features(self, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """What a critic or a value network reads of the prompts: features (B, L, D) and a mask (B, L), True at tokens.

        The default is a single feature of zero, with which such a network knows nothing of the prompt.
        """
        rows = next(iter(conditioning.values()))
        return rows.new_zeros(len(rows), 1, 1, dtype=torch.float32), rows.new_ones(len(rows), 1, dtype=torch.bool)

    def sigmas(self, num_inference_steps: int, spacing: Literal["pipeline", "uniform"] = "pipeline") -> Tensor:
        """`num_inference_steps + 1` levels from 1 down to 0, float32.

        `spacing` is "pipeline" for the schedule of the stock pipeline, or "uniform" for a uniform grid through the
        pipeline's shift, without the level near zero with which some stock schedules end. The default of this class is
        the plain uniform grid for both.
        """
        return uniform_sigmas(num_inference_steps)

    @torch.no_grad()
    def sample_latents(
        self, transformer: nn.Module, conditioning: Conditioning, latents: Tensor, sigmas: Tensor
    ) -> Tensor:
        """Solve the ODE by Euler steps from the first to the last of `sigmas`, with guidance and without gradients.

        Args:
            transformer: The network to call.
            conditioning: What `encode_prompts` returns for B prompts.
            latents: (B, ...), float32, at the level `sigmas[0]`.
            sigmas: (steps + 1,), on the device of the latents.

        Returns:
            The latents at the level `sigmas[-1]`.
        """

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return self.velocity(transformer, x, sigma, conditioning, guidance=True)

        *_, (_, _, final) = euler_steps(velocity, latents, sigmas)
        return final

    @torch.no_grad()
    def sample(self, prompts: list[str], num_inference_steps: int, generator: Generators = None) -> Tensor:
        """Draw one picture per prompt by Euler steps on the pipeline's schedule, without gradients.

        Args:
            prompts: B prompts.
            num_inference_steps: The number of Euler steps.
            generator: One for all, or a list with one per prompt; with a list, the picture of a prompt and a seed does
                not depend on the other prompts of the batch.

        Returns:
            The pictures, `(B, 3, H, W)` in [0, 1].
        """
        latents = self.initial_latents(len(prompts), generator)
        sigmas = self.sigmas(num_inference_steps).to(latents.device)
        conditioning = {name: value.to(latents.device) for name, value in self.encode_prompts(prompts).items()}
        return self.images(self.sample_latents(self.transformer, conditioning, latents, sigmas))

    def save_lora(self, directory: str | Path) -> None:
        """Write the transformer's adapter in the form that this family's stock loader reads."""
        name = type(self).__name__
        raise NotImplementedError(f"{name} does not say how its adapter is saved: override `save_lora`.")

    def save_transformer(self, directory: str | Path) -> None:
        """Write the whole transformer after full fine-tuning; by default as one file, `model.safetensors`."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        save_model(self.transformer, str(Path(directory) / "model.safetensors"))

    # ---- finding the family of a diffusers pipeline -----------------------------------------------------------------

    @staticmethod
    def from_pipeline(pipeline: Any, **settings: Any) -> "FlowPipeline":
        """Wrap a loaded diffusers pipeline in its family; the pipeline itself is not changed.

        Args:
            pipeline: A flow-matching pipeline of a supported family.
            **settings: `height` and `width` in pixels, `guidance_scale`, `negative_prompt`, and the arguments of the
                family's prompt encoding. None means the default of the family.

        Returns:
            The pipeline as a velocity field.

        Raises:
            ValueError: The pipeline is of no supported family or not flow matching, or its family has no such setting.
        """
        from . import families

        return families.wrap(pipeline, settings)

    @staticmethod
    def from_pretrained(
        id_or_folder: str | Path,
        dtype: torch.dtype | None = None,
        quantization: Quantization | None = None,
        text_encoder_quantization: Quantization | None = None,
        **settings: Any,
    ) -> "FlowPipeline":
        """Load a pipeline from the Hub or a folder and wrap it as `from_pipeline` does.

        Args:
            id_or_folder: The id of a model on the Hub, or a folder that holds a pipeline.
            dtype: The precision of the networks; None for float32.
            quantization: In how many bits the linear layers of the transformer are kept: "nf4" (bitsandbytes, on a GPU
                alone), "int8" or "float8" (torchao); None for those of `dtype`, in which all of them compute.
            text_encoder_quantization: The same of the text encoders.
            **settings: See `from_pipeline`.

        Returns:
            The pipeline as a velocity field.

        Raises:
            ValueError: The Hub or the folder has no such pipeline, or `from_pipeline` refuses it.
        """
        from . import families

        loading = families.Loading(dtype or torch.float32, quantization, text_encoder_quantization)
        return families.wrap(families.load(id_or_folder, loading, settings), settings)
