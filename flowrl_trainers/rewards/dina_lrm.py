"""DiNa-LRM: a reward model that reads the latents of Stable Diffusion 3.5, so that nothing is decoded."""

import copy
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn

from .base import Reward, Sees
from .dina_lrm_head import RewardHead
from .loading import read_tensors

MOST_PROMPTS = 4096  # whose embeddings are kept
CHECKPOINT = "liuhuohuo/DiNa-LRM-SD35M-12layers"
LAYOUT = f"config.json, checkpoint/backbone_lora and checkpoint/rm_head.pt, such as {CHECKPOINT!r}"


class Backbone(nn.Module):
    """The first layers of a Stable Diffusion 3 transformer, under the names of the published LoRA."""

    def __init__(self, transformer: Any, layers: int) -> None:
        super().__init__()
        self.pos_embed, self.time_text_embed = transformer.pos_embed, transformer.time_text_embed
        self.context_embedder = transformer.context_embedder
        self.transformer_blocks = nn.ModuleList(transformer.transformer_blocks[:layers])

    def forward(
        self, x: Tensor, timestep: Tensor, prompts: Tensor, pooled: Tensor
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The tokens of picture and prompt before the first layer and after each, and the embedding of the level.

        Args:
            x: Noisy latents (B, C, h, w).
            timestep: 1000 times their level, (B,).
            prompts: Embeddings (B, L, D).
            pooled: Embeddings (B, P).
        """
        picture, prompt = self.pos_embed(x), self.context_embedder(prompts)
        level = self.time_text_embed(timestep, pooled)
        pictures, texts = [picture], [prompt]
        for block in self.transformer_blocks:
            prompt, picture = block(hidden_states=picture, encoder_hidden_states=prompt, temb=level)
            pictures, texts = [*pictures, picture], [*texts, prompt]
        return pictures, texts, level


class DiNaLRM(Reward):
    """DiNa-LRM (arXiv 2602.11146): people's preference, read of noisy latents by the first layers of SD3.5 medium.

        score = (head(features of (1 - s) x + s e, prompt) + 10) / 10,   s = noise_level

    Differentiable with respect to the latents, which must be of that family of models. The authors print mostly 0 to
    2. The noise e is the same for every picture, so that a score is a function of the picture, which is our choice:
    the authors draw it afresh. Its networks are a copy of half the transformer and the three text encoders;
    embeddings of prompts are kept. Unverified: no score was compared with the published weights. Fooled by what
    preference models like: saturated colours, glossy centred subjects.

    Args:
        checkpoint: A folder or a repository of the Hub with the LoRA and the head.
        pipeline: The Stable Diffusion 3.5 medium that it was trained on: loaded, or its folder or Hub id; None for the
            one that the checkpoint names. A loaded one stays as it is; its text encoders are used where they are.
        noise_level: s, between 0 and 1: 0.4 for pictures that a model drew, 0.1 for others, as the authors advise.
        revision: Branch, tag or commit of the checkpoint on the Hub.
        dtype: The precision of the networks.

    Raises:
        ValueError: For a checkpoint of another layout, and a level that is none.
    """

    name = "dina_lrm"
    differentiable = True
    sees: Sees = "latents"

    def __init__(
        self,
        checkpoint: str | Path = CHECKPOINT,
        *,
        pipeline: str | Path | StableDiffusion3Pipeline | None = None,
        noise_level: float = 0.4,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not 0 <= noise_level < 1:
            raise ValueError(f"`noise_level` ({noise_level}) must be at least 0 and below 1.")
        folder = _folder(checkpoint, revision)
        settings = _settings(folder)
        self.owns_encoders = not isinstance(pipeline, StableDiffusion3Pipeline)
        self.pipeline = (
            pipeline
            if isinstance(pipeline, StableDiffusion3Pipeline)
            else _pipeline(settings["backbone_model_id"] if pipeline is None else pipeline, dtype)
        )
        layers = settings["num_transformer_layers"]
        transformer = self.pipeline.transformer
        backbone = copy.deepcopy(Backbone(transformer, layers))
        adapted = PeftModel.from_pretrained(backbone, str(folder / "checkpoint" / "backbone_lora"))
        self.backbone = adapted.merge_and_unload().to(dtype).requires_grad_(False).eval()
        width = transformer.inner_dim
        if self.owns_encoders:
            self.pipeline.register_modules(transformer=None)  # whose other layers nobody needs
        self.read = settings["visual_head_idx"], settings["text_head_idx"]
        counts = len(self.read[0]), len(self.read[1])
        known = ("width", "num_queries", "num_attn_heads", "use_proj_in")
        shape = {name: value for name, value in settings["reward_head"].items() if name in known}
        self.head = RewardHead(width, counts, **shape)
        tensors = read_tensors(folder / "checkpoint" / "rm_head.pt", f"pass a checkpoint with {LAYOUT}")
        expected = {name: tensor.shape for name, tensor in self.head.state_dict().items()}
        if expected != {name: tensor.shape for name, tensor in tensors.items()}:
            raise ValueError(
                f"The head of {str(checkpoint)!r} has other weights than its settings say: pass {LAYOUT}."
            )
        self.head.load_state_dict(tensors)
        self.head.to(dtype).requires_grad_(False).eval()
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        nearest = int((scheduler.sigmas - noise_level).abs().argmin())
        self.sigma, self.timestep = float(scheduler.sigmas[nearest]), float(scheduler.timesteps[nearest])
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}

    def to(self, device: torch.device) -> None:
        self.backbone.to(device)
        self.head.to(device)
        for encoder in self._encoders() if self.owns_encoders else []:
            encoder.to(device)

    def _encoders(self) -> list[nn.Module]:
        pipe = self.pipeline
        return [part for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3) if part is not None]

    @torch.no_grad()
    def _embeddings(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Those of the tokens (B, L, D) and of the prompts (B, P), kept on the CPU for more pictures of a prompt."""
        if len(self.kept) > MOST_PROMPTS:
            self.kept.clear()
        device = self._encoders()[0].device
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.kept:
                tokens, _, pooled, _ = self.pipeline.encode_prompt(
                    prompt, None, None, device=device, do_classifier_free_guidance=False
                )
                self.kept[prompt] = tokens[0].cpu(), pooled[0].cpu()
        tokens, pooled = zip(*(self.kept[prompt] for prompt in prompts), strict=True)
        return torch.stack(tokens), torch.stack(pooled)

    def __call__(self, latents: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        weight = self.head.head.weight
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(latents)
        x = (1 - self.sigma) * latents + self.sigma * noise
        tokens, pooled = (part.to(weight) for part in self._embeddings(prompts))
        timestep = torch.full((len(latents),), self.timestep, device=latents.device)
        pictures, texts, level = self.backbone(x.to(weight.dtype), timestep, tokens, pooled)
        seen, read = ([layers[i] for i in chosen] for layers, chosen in zip((pictures, texts), self.read, strict=True))
        return (self.head(seen, read, level).to(latents.dtype) + 10) / 10


def _folder(checkpoint: str | Path, revision: str | None) -> Path:
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    try:
        return Path(snapshot_download(str(checkpoint), revision=revision))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`checkpoint` ({str(checkpoint)!r}) cannot be had: pass a folder or a Hub id with {LAYOUT}."
        ) from error


def _pipeline(source: str | Path, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """Without the autoencoder. Raises `ValueError` for a folder or an id that holds none."""
    try:
        return StableDiffusion3Pipeline.from_pretrained(source, vae=None, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"`pipeline` ({str(source)!r}) cannot be had: pass the Stable Diffusion 3.5 medium that the checkpoint "
            "was trained on, loaded or as a folder or Hub id."
        ) from error


def _settings(folder: Path) -> dict[str, Any]:
    """What `config.json` says of the model. Raises `ValueError` for another layout or kind of model."""
    files = ("config.json", "checkpoint/backbone_lora/adapter_config.json", "checkpoint/rm_head.pt")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{str(folder)!r} has no {missing[0]}: pass a checkpoint with {LAYOUT}.")
    try:
        settings = yaml.safe_load((folder / "config.json").read_text(encoding="utf-8"))["model"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / 'config.json'} says nothing of a model: pass a checkpoint with {LAYOUT}."
        ) from error
    if not settings["use_lora"] or settings.get("use_logistic", False) or not settings["text_head_idx"]:
        raise ValueError(
            f"{str(folder)!r} is a DiNa-LRM without a LoRA, without text or with a logistic output, which is not read "
            f"here: pass a checkpoint with {LAYOUT}."
        )
    return settings
