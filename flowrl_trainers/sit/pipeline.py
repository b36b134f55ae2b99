"""A diffusers pipeline for SiT (Scalable Interpolant Transformers, arXiv 2401.08740), of which diffusers has none."""

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


class SiTPipeline(
    DiffusionPipeline, SanaLoraLoaderMixin
):  # Sana's loader is the plain one: a transformer and no text encoders
    """Pictures of classes by the Euler ODE on a uniform grid of sigma, with classifier-free guidance against the class of no class.

    transformer: the network. vae: the autoencoder of the latents, which have unit variance after its `scaling_factor`. scheduler: the
    Euler sampler of flow matching, `shift` 1 for SiT. id2label: the names of the classes by their numbers, several names of one class
    separated by commas as in ImageNet's lists; None where classes have numbers alone. It is kept in `model_index.json`.

    The original sampler guides the first three of the four latent channels only; here guidance acts on all of them.
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
        """The numbers of the classes that have a name: more than one where a name is ambiguous, as ImageNet's 'crane' is."""
        for number, names in (id2label or {}).items():
            for name in names.split(","):
                self.labels.setdefault(name.strip(), []).append(self._checked(int(number)))

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Fetch a repository of the Hub and return its folder.

        diffusers' own `download` refuses components whose class is not its own and comes with no code in the repository; here the code
        is this package, and only configurations and safetensors are fetched. Of `kwargs`, those of `snapshot_download` count.
        """
        understood = {"cache_dir", "force_download", "local_files_only", "token", "revision"}
        return snapshot_download(
            pretrained_model_name,
            allow_patterns=["model_index.json", "*/*.json", "*/*.safetensors"],
            **{name: value for name, value in kwargs.items() if name in understood},
        )

    def class_labels(self, prompt: Prompts) -> Tensor:
        """The numbers of classes that are given by name or number (also as a string), (B,) int64.

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
        """Noise (B, C, h, w). height, width: of the picture, in pixels. generator: one for all, or a list with one per picture."""
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)} for {batch_size} prompts: pass one for each, or a single one."
            )
        shape = (batch_size, num_channels_latents, height // self.vae_scale_factor, width // self.vae_scale_factor)
        return randn_tensor(shape, generator=generator, device=device, dtype=dtype)

    def check_size(self, height: int, width: int) -> None:
        """Raises `ValueError` for a height or width, in pixels, for which the model has no patches or no position embeddings."""
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

        prompt: class names or numbers. height, width: in pixels, by default those of training, and at most those.
        num_inference_steps: Euler steps from sigma 1 to 0. guidance_scale: v_null + scale (v - v_null) on all channels, for a scale
        above 1. generator: one for all, or a list with one per picture. output_type: "pil", "np", "pt" (B, 3, H, W) in [0, 1], or
        "latent". sigmas: the levels of the steps, from 1 down, without the last 0; by default uniform. Raises `ValueError` for classes
        and sizes that the model does not have.
        """
        # 1. What was asked for
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}: choose {', '.join(OUTPUT_TYPES)}.")
        config, device = self.transformer.config, self._execution_device
        native = config.sample_size * self.vae_scale_factor
        height, width = height or native, width or native
        self.check_size(height, width)
        labels = self.class_labels(prompt).to(device)

        # 2. Noise and the uniform grid; latents stay in float32 whatever the precision of the network
        latents = self.prepare_latents(
            len(labels), config.in_channels, height, width, torch.float32, device, generator
        )
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
