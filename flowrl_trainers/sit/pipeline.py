"""A diffusers pipeline for SiT (Scalable Interpolant Transformers, arXiv 2401.08740); diffusers itself has none."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from torch import Tensor

from .transformer import SiTTransformer2DModel

Prompts = str | int | list[str | int]
Generators = torch.Generator | list[torch.Generator] | None
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


# Sana's loader serves a transformer without text encoders, which is what SiT is.
class SiTPipeline(DiffusionPipeline, SanaLoraLoaderMixin):
    """Draws pictures of classes by the Euler ODE on a uniform grid of sigma, with classifier-free guidance.

    Guidance compares a class with the row of the class embedding that stands for no class. The original sampler
    guides only the first three of the four latent channels; this pipeline guides all of them.

    Args:
        transformer: The network.
        vae: The autoencoder of the latents, which have unit variance after its `scaling_factor`.
        scheduler: The Euler sampler of flow matching, with `shift` 1 for SiT.
        id2label: The names of the classes by their numbers, kept in `model_index.json`. Commas separate several names
            of one class, as in ImageNet's lists. None: classes have numbers alone.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: SiTTransformer2DModel,
        vae: AutoencoderKL,
        scheduler: FlowMatchEulerDiscreteScheduler,
        id2label: dict[int, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=id2label)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.labels: dict[str, list[int]] = {}
        """The numbers of the classes of each name: more than one for an ambiguous name such as ImageNet's 'crane'."""
        for number, names in (id2label or {}).items():
            for name in names.split(","):
                self.labels.setdefault(name.strip(), []).append(self._checked(int(number)))

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Fetch a repository of the Hub and return its folder.

        The `download` of diffusers refuses a component whose class neither diffusers nor the repository defines. Here
        this package defines it, so the method fetches configurations and safetensors alone. It passes on those of
        `kwargs` that `snapshot_download` takes.
        """
        understood = {"cache_dir", "force_download", "local_files_only", "token", "revision"}
        return snapshot_download(
            pretrained_model_name,
            allow_patterns=["model_index.json", "*/*.json", "*/*.safetensors"],
            **{name: value for name, value in kwargs.items() if name in understood},
        )

    def class_labels(self, prompt: Prompts) -> Tensor:
        """The numbers (B,) int64 of classes that are given by name, by number, or by number as a string.

        Raises `ValueError` for an unknown or ambiguous name and for a number out of range.
        """
        prompts = prompt if isinstance(prompt, list) else [prompt]
        return torch.tensor([self._number(p) for p in prompts], dtype=torch.int64, device=self.transformer.device)

    def _number(self, prompt: str | int) -> int:
        if isinstance(prompt, int):
            return self._checked(prompt)
        numbers = self.labels.get(prompt.strip(), [])
        if len(numbers) > 1:
            raise ValueError(
                f"{prompt!r} is the name of the classes {', '.join(map(str, numbers))}: pass the number of one."
            )
        if numbers:
            return numbers[0]
        try:
            number = int(prompt)
        except ValueError as error:
            named = f"one of its {len(self.labels)} class names (`pipeline.labels`) or " if self.labels else ""
            highest = self.transformer.config.num_classes - 1
            raise ValueError(
                f"{prompt!r} is no class of this model: pass {named}a number from 0 to {highest}."
            ) from error
        return self._checked(number)

    def _checked(self, number: int) -> int:
        classes = self.transformer.config.num_classes
        if not 0 <= number < classes:
            raise ValueError(f"Class {number} is out of range: this model has the classes 0 to {classes - 1}.")
        return number

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators = None,
    ) -> Tensor:
        """Draw noise (B, C, h, w) for the latents of a batch.

        Args:
            batch_size: The number of pictures B.
            num_channels_latents: The number of channels C.
            height: The height of the pictures in pixels.
            width: The width of the pictures in pixels.
            dtype: The precision of the noise.
            device: The device of the noise.
            generator: One for all pictures, or a list with one per picture.

        Raises:
            ValueError: If the list of generators has another length than the batch.
        """
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)} for {batch_size} prompts: pass one for each, or a single "
                "one."
            )
        shape = (batch_size, num_channels_latents, height // self.vae_scale_factor, width // self.vae_scale_factor)
        return randn_tensor(shape, generator=generator, device=device, dtype=dtype)

    def check_size(self, height: int, width: int) -> None:
        """Check that patches fill a height and width in pixels and that position embeddings cover them.

        Raises `ValueError` if they do not.
        """
        config = self.transformer.config
        unit, largest = self.vae_scale_factor * config.patch_size, self.vae_scale_factor * config.sample_size
        for name, size in (("height", height), ("width", width)):
            if size % unit or not 0 < size <= largest:
                raise ValueError(
                    f"`{name}` ({size}) must be a multiple of {unit} pixels and at most {largest} for this model."
                )

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompts,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        sigmas: list[float] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw one picture per class.

        Args:
            prompt: Class names or numbers.
            height: The height in pixels: at most that of training, which None takes.
            width: The width in pixels: at most that of training, which None takes.
            num_inference_steps: Euler steps from sigma 1 to 0.
            guidance_scale: The scale in v_null + scale (v - v_null), on all channels. 1 and below: no guidance.
            generator: One for all pictures, or a list with one per picture.
            output_type: "pil", "np", "pt" (B, 3, H, W) in [0, 1], or "latent".
            return_dict: Whether to return an `ImagePipelineOutput`, or else a tuple.
            sigmas: The levels of the steps, from 1 down, without the last 0. None: a uniform grid.

        Raises:
            ValueError: If the model does not have a class or a size, or an argument is not one of its values.
        """
        # 1. Arguments
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}: choose {', '.join(OUTPUT_TYPES)}.")
        config, device = self.transformer.config, self._execution_device
        native = config.sample_size * self.vae_scale_factor
        height, width = height or native, width or native
        self.check_size(height, width)
        labels = self.class_labels(prompt).to(device)

        # 2. Noise and the uniform grid; latents stay in float32 whatever the precision of the network
        batch_size, channels = len(labels), config.in_channels
        latents = self.prepare_latents(batch_size, channels, height, width, torch.float32, device, generator)
        grid = torch.linspace(1, 0, num_inference_steps + 1)[:-1].tolist() if sigmas is None else sigmas
        self.scheduler.set_timesteps(sigmas=grid, device=device)

        # 3. The Euler ODE
        for timestep in self.progress_bar(self.scheduler.timesteps):
            velocity = self._velocity(latents, timestep.expand(len(labels)), labels, guidance_scale)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]

        # 4. Pictures
        images = latents
        if output_type != "latent":
            scaled = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
            decoded = self.vae.decode(scaled.to(self.vae.dtype), return_dict=False)[0]
            images = self.image_processor.postprocess(decoded.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _velocity(self, latents: Tensor, timestep: Tensor, labels: Tensor, guidance_scale: float) -> Tensor:
        hidden_states = latents.to(self.transformer.dtype)
        v = self.transformer(hidden_states, timestep, labels, return_dict=False)[0].float()
        if guidance_scale > 1:
            null = torch.full_like(labels, self.transformer.config.num_classes)
            v_null = self.transformer(hidden_states, timestep, null, return_dict=False)[0].float()
            v = v_null + guidance_scale * (v - v_null)
        return v
