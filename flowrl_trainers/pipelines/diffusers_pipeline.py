"""What all families of diffusers share; a family adds how it encodes, calls its network and decodes."""

import copy
import hashlib
import json
import math
from abc import abstractmethod
from numbers import Integral, Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .base import Conditioning, FlowPipeline, Generators, Settings
from .checkpoints import CHECKPOINTS

NEGATIVE = "negative_"
ROUNDED = 1e-6  # how far float32 takes the first level away from 1
ADAPTER_FILE = "pytorch_lora_weights.safetensors"

# What a LoRA adapts by default: the projections of every attention layer, and in networks whose pictures and prompts
# attend to each other jointly also those of the prompt.
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
JOINT_ATTENTION = [
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
]  # fmt: skip

KINDS: dict[str, tuple[Any, str]] = {
    "height": (Integral, "a whole number"),
    "width": (Integral, "a whole number"),
    "max_sequence_length": (Integral, "a whole number"),
    "guidance_scale": (Real, "a number"),
    "true_cfg_scale": (Real, "a number"),
    "negative_prompt": (str | None, "a text"),
}


class DiffusersFlowPipeline(FlowPipeline):
    """A pipeline of diffusers as a velocity field; settings and defaults are those of its `__call__`.

    A family says how prompts are encoded (`_encode`), how the network is called (`_branch`), how latents are drawn and
    decoded, and how the stock pipeline spaces its noise levels (`_spacing` and `_mu`).
    """

    default_settings: ClassVar[Settings]
    """The settings that a family understands beside `height` and `width`, with its defaults."""

    @classmethod
    def setting_names(cls) -> list[str]:
        """The names of all settings that the family understands."""
        return ["height", "width", *cls.default_settings, "guidance_in_one_call"]

    def __init__(self, pipeline: Any, **settings: Any) -> None:
        self.pipeline = pipeline
        self._refuse_missing_parts()
        self._name = _hub_id(pipeline)  # now, as a folder with a relative path may not be found later
        self.guidance_in_one_call = bool(settings.pop("guidance_in_one_call", False))
        size = self.default_size()
        self.settings = {"height": size, "width": size} | self.default_settings | settings
        self._check_types()
        self._check_settings()
        if self.guidance_in_one_call and not self.guided:
            raise ValueError("`guidance_in_one_call` (True) has no effect without guidance: leave it out.")
        negative = self.settings.get("negative_prompt") or ""
        if negative.strip() and not self.guided:
            raise ValueError(
                f"`negative_prompt` ({negative!r}) has no effect without guidance: leave it out, or turn guidance on."
            )

    def _refuse_missing_parts(self) -> None:
        """Refuse a pipeline without a part that drawing needs; a third text encoder may be missing."""
        parts = self.pipeline.components
        optional = {"text_encoder_3", "tokenizer_3"} if parts.get("text_encoder_3") is None else set()
        for name, part in parts.items():
            needed = name in ("transformer", "vae", "scheduler") or name.startswith(("text_encoder", "tokenizer"))
            if needed and part is None and name not in optional:
                raise ValueError(
                    f"The pipeline's `{name}` is None, which training needs: load the pipeline with all of its parts."
                )

    def _check_types(self) -> None:
        """Refuse a setting of another type, and a guidance scale below 0, by a `ValueError`."""
        for name, (kind, words) in KINDS.items():
            value = self.settings.get(name)
            if name in self.settings and not isinstance(value, kind):
                raise ValueError(f"`{name}` ({value!r}) must be {words}.")
            if kind is Real and value is not None and not 0 <= value < math.inf:
                raise ValueError(f"`{name}` ({value}) must be at least 0 and finite.")

    def _check_settings(self) -> None:
        """Refuse a size or a length that the pipeline does not take, by a `ValueError`."""
        unit, largest = self.pixels_per_token(), self.largest_size()
        for name in ("height", "width"):
            value = self.settings[name]
            if value % unit or value <= 0 or (largest is not None and value > largest):
                bound = "" if largest is None else f" and at most {largest} for this model"
                raise ValueError(f"`{name}` ({value}) must be a multiple of {unit} pixels{bound}.")
        length, most = self.settings["max_sequence_length"], self.most_tokens()
        if not 0 < length <= most:
            raise ValueError(f"`max_sequence_length` ({length}) must be between 1 and {most} tokens for this model.")

    # ---- what a family says -----------------------------------------------------------------------------------------

    @abstractmethod
    def _encode(self, prompts: list[str], negative: bool) -> Conditioning:
        """The conditioning of prompts, or of negative prompts, under the names that `_branch` reads."""

    @abstractmethod
    def _branch(self, transformer: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity of one branch: one call of the network.

        The network gets its input in `transformer.dtype`, the precision of its computation, also where its weights are
        stored in another one and cast layer by layer.

        Args:
            transformer: The network to call.
            latents: (B, C, h, w), float32.
            sigma: (B,), the noise level of each sample.
            conditioning: What `_encode` returns, for B prompts.

        Returns:
            The velocity (B, C, h, w), float32.
        """

    def _guide(self, velocity: Tensor, negative: Tensor) -> Tensor:
        """The pipeline's guidance formula."""
        return negative + self.settings["guidance_scale"] * (velocity - negative)

    def _spacing(self, num_inference_steps: int) -> list[float] | None:
        """The levels that the stock pipeline gives its scheduler; None if the scheduler spaces them itself."""
        return torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()

    def _mu(self, num_inference_steps: int) -> float | None:
        """The `mu` that the stock pipeline gives a scheduler with dynamic shift."""
        config = self.scheduler().config
        height, width = self.size_in_tokens()
        lengths = config.base_image_seq_len, config.max_image_seq_len
        return calculate_shift(height * width, *lengths, config.base_shift, config.max_shift)

    def default_size(self) -> int:
        """The default of height and width, in pixels."""
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    def pixels_per_token(self) -> int:
        """Height and width must be multiples of this number of pixels."""
        return 2 * self.pipeline.vae_scale_factor

    def size_in_tokens(self) -> tuple[int, int]:
        """Height and width of a picture, counted in tokens."""
        unit = self.pixels_per_token()
        return self.settings["height"] // unit, self.settings["width"] // unit

    def largest_size(self) -> int | None:
        """The largest height and width in pixels, None for any."""
        return None

    def most_tokens(self) -> int:
        """The largest `max_sequence_length`: the limit of the stock pipeline, or 512 if it has none."""
        return 512

    @property
    def guided(self) -> bool:
        """Whether `velocity` needs a negative branch."""
        return self.settings["guidance_scale"] > 1

    # ---- what follows -----------------------------------------------------------------------------------------------

    @property
    def transformer(self) -> Any:
        return self.pipeline.transformer

    @property
    def name(self) -> str | None:
        return self._name

    def blocks(self, network: Any) -> list[nn.Module]:
        names = network._repeated_blocks or self.repeated_blocks  # what diffusers declares, where it does
        return [module for module in network.modules() if type(module).__name__ in names]

    def call_arguments(self) -> dict[str, Any]:
        return {name: value for name, value in self.settings.items() if value not in ("", None)}

    def advice(self, num_inference_steps: int) -> list[str]:
        known = CHECKPOINTS.get(self.name or "")
        return [] if known is None else known.advice(num_inference_steps, self.settings["guidance_scale"])

    def scheduler_code(self, renoises: bool) -> str | None:
        # `shift_terminal` would pull the last level down to near zero; the sampler that re-noises works without it.
        changed = "pipe.scheduler.config, stochastic_sampling=True, shift_terminal=None"
        scheduler = self.pipeline.scheduler
        lines = [f"pipe.scheduler = type(pipe.scheduler).from_config({changed})"] if renoises else []
        if scheduler.shift != scheduler.config.shift:
            lines.append(f"pipe.scheduler.set_shift({scheduler.shift:g})")
        return "\n".join(lines) or None

    def text_encoders(self) -> list[Any]:
        parts = self.pipeline.components
        return [parts[name] for name in sorted(parts) if name.startswith("text_encoder") and parts[name] is not None]

    def encoding_facts(self) -> dict[str, Any] | None:
        parts = self.pipeline.components
        readers = [name for name, part in parts.items() if isinstance(part, (PreTrainedTokenizerBase, ProcessorMixin))]
        return {
            "pipeline": type(self.pipeline).__name__,
            "versions": [diffusers.__version__, transformers.__version__],
            "settings": self.settings,
            "configurations": [part.config.to_json_string() for part in self.text_encoders()],
            "tokenizers": {name: _files_identity(parts[name]) for name in sorted(readers)},
        }

    def decoders(self) -> list[nn.Module]:
        return [self.pipeline.vae]

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        conditioning = self._encode(list(prompts), negative=False)
        if self.guided:
            negative = self._encode([self.settings.get("negative_prompt", "")], negative=True)  # the same for all
            for name, value in negative.items():
                conditioning[NEGATIVE + name] = value.expand(len(prompts), *value.shape[1:])
        return conditioning

    def prompt_features(self, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        embeds = conditioning["prompt_embeds"]
        everywhere = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return embeds, conditioning.get("prompt_embeds_mask", everywhere).bool()

    def initial_latents(self, batch_size: int, generator: Generators = None) -> Tensor:
        return self._prepared(self.transformer.config.in_channels, batch_size, generator)

    def _prepared(self, channels: int, batch_size: int, generator: Generators) -> Any:
        """Call the pipeline's `prepare_latents`.

        Args:
            channels: The number of channels of a spatial latent.
            batch_size: The number of latents.
            generator: One for all, or a list with one per image.

        Returns:
            Float32 noise, in some pipelines as the first of a pair with position ids.
        """
        height, width = self.settings["height"], self.settings["width"]
        shape = batch_size, channels, height, width
        return self.pipeline.prepare_latents(*shape, torch.float32, self.device, generator)

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """A copy of the pipeline's scheduler, which itself must not change."""
        return copy.deepcopy(self.pipeline.scheduler)  # not from its configuration, which does not record `set_shift`

    def sigmas(self, num_inference_steps: int, spacing: Literal["pipeline", "uniform"] = "pipeline") -> Tensor:
        scheduler = self.scheduler()
        mu = self._mu(num_inference_steps) if scheduler.config.use_dynamic_shifting else None
        uniform = torch.linspace(1, 0, num_inference_steps + 1)[:-1].tolist()
        match spacing:
            case "pipeline":
                levels = self._spacing(num_inference_steps)
            case "uniform":
                scheduler.register_to_config(shift_terminal=None)  # it would pull the last level down to near zero
                levels = uniform
            case _:
                raise ValueError(f"`spacing` is {spacing!r}: choose 'pipeline' or 'uniform'.")
        if levels is None:
            scheduler.set_timesteps(num_inference_steps, mu=mu)
        else:
            scheduler.set_timesteps(sigmas=levels, mu=mu)
        found = scheduler.sigmas.float()
        # Some shifts round the first level, which is 1, to its neighbours; it is the one from which 1 - sigma is 0.
        found[0] = torch.where((found[0] - 1).abs() < ROUNDED, 1.0, found[0])
        return found

    def velocity(
        self,
        transformer: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        guidance: bool,
    ) -> Tensor:
        prompt: Conditioning = {}
        negative_prompt: Conditioning = {}
        for name, value in conditioning.items():
            part = negative_prompt if name.startswith(NEGATIVE) else prompt
            part[name.removeprefix(NEGATIVE)] = value
        learns = torch.is_grad_enabled() and not latents.requires_grad  # through the conditional branch alone
        if guidance and self.guided and self.guidance_in_one_call and not learns:
            both = {name: _one_batch(value, negative_prompt[name]) for name, value in prompt.items()}
            v = self._branch(transformer, torch.cat([latents, latents]), torch.cat([sigma, sigma]), both)
            return self._guide(*v.chunk(2))
        v = self._branch(transformer, latents, sigma, prompt)
        if guidance and self.guided:
            with torch.set_grad_enabled(torch.is_grad_enabled() and latents.requires_grad):
                negative = self._branch(transformer, latents, sigma, negative_prompt)
            v = self._guide(v, negative)
        return v

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        shift = vae.config.shift_factor or 0.0
        return self._decoded(latents / vae.config.scaling_factor + shift)

    def _decoded(self, latents: Tensor) -> Tensor:
        """The pictures of latents that are in the units of the autoencoder."""
        vae = self.pipeline.vae
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5

    def save_lora(self, directory: str | Path) -> None:
        (name,) = self.transformer.active_adapters()
        config = self.transformer.peft_config[name].to_dict()
        type(self.pipeline).save_lora_weights(
            str(directory),
            transformer_lora_layers=get_peft_model_state_dict(self.transformer, adapter_name=name),
            # Without this metadata the loader takes lora_alpha = r.
            transformer_lora_adapter_metadata={k: sorted(v) if isinstance(v, set) else v for k, v in config.items()},
            weight_name=ADAPTER_FILE,
        )
        _sort_metadata(Path(directory) / ADAPTER_FILE)

    def save_transformer(self, directory: str | Path) -> None:
        self.transformer.save_pretrained(directory)


def _hub_id(pipeline: Any) -> str | None:
    """The Hub id from which a pipeline was loaded; None for one that was made here or loaded from a folder.

    diffusers notes a folder's path in the same place as an id. A path is told from an id by what the Hub allows in ids
    (at most one slash, and nothing that begins with `/`, `./`, `../` or `~`), and by the folder itself. A transformer
    that was loaded with its pipeline notes its path too: for a Hub id, that of a snapshot in the cache.
    """
    name = pipeline.config.get("_name_or_path")
    beside = Path(pipeline.transformer.config.get("_name_or_path") or "")
    if not name or Path(name).exists() or beside == Path(name, "transformer"):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _sort_metadata(path: Path) -> None:
    """Rewrite a safetensors file with the keys of its metadata in order: safetensors shuffles them at every save.

    The file is 8 bytes with the length of its header, the header in JSON, and the numbers, which stay as they are.
    """
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers stay aligned
    path.unlink()  # safetensors lets nobody else read its files
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


def _files_identity(reader: PreTrainedTokenizerBase | ProcessorMixin) -> str:
    """A hash of all files of a tokenizer or a processor: its vocabulary, its template, its settings."""
    found = hashlib.sha256()
    with TemporaryDirectory() as folder:
        reader.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                found.update(f"{file.relative_to(folder)} {file.stat().st_size}".encode() + file.read_bytes())
    return found.hexdigest()


def _one_batch(value: Tensor, negative: Tensor) -> Tensor:
    """Conditioning of prompts and of negative prompts as one batch; shorter ones are padded, as masks say."""
    if value.shape[1:] == negative.shape[1:]:
        return torch.cat([value, negative])
    return nn.utils.rnn.pad_sequence([*value, *negative], batch_first=True)


def rounded_sigma(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """Levels for the networks of pipelines that round `1000 sigma` to the network's precision."""
    return (1000 * sigma).to(dtype) / 1000


def without_guidance(settings: Settings, model: str) -> Settings:
    """Turn guidance off in the settings of a model that would ignore it; `model` names it in the error.

    Raises:
        ValueError: The settings ask for a guidance scale above 1.
    """
    scale = settings.get("guidance_scale", 1.0)
    if isinstance(scale, (int, float)) and scale > 1:  # another type is refused with those of all settings
        raise ValueError(f"`guidance_scale` ({scale}) has no effect on {model}: leave it out or set 1.")
    return {"guidance_scale": 1.0} | settings


def pad_prompts(embeds: list[Tensor]) -> Conditioning:
    """Ragged prompt embeddings (L_i, D) as (B, L, D), with a mask (B, L) that is True at tokens."""
    mask = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in embeds]
    pad = nn.utils.rnn.pad_sequence
    return {"prompt_embeds": pad(embeds, batch_first=True), "prompt_embeds_mask": pad(mask, batch_first=True)}
