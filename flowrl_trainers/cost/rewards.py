"""The networks of rewards with a name, on the meta device: their sizes are published, and nothing is loaded."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipConfig, CLIPConfig, CLIPModel, CLIPVisionConfig

from ..rewards.aesthetic import AestheticPredictor
from ..rewards.base import Reward, Sees
from ..rewards.hpsv2 import vit_h_14
from ..rewards.image_reward import ImageRewardModel
from ..rewards.named import NAMED_REWARDS
from ..rewards.preprocessing import resize_and_crop

CLIP_TOKENS = 77
WITHOUT_NETWORK = ("jpeg_compressibility", "jpeg_incompressibility")


def _vit_l_14() -> CLIPConfig:
    """OpenAI's, the default of the CLIP score."""
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return CLIPConfig(text_config=text, vision_config=vision | {"patch_size": 14}, projection_dim=768)


def _blip() -> BlipConfig:
    """ImageReward's: a ViT-L/16 and a BERT that attends to it."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024, "num_hidden_layers": 12}
    text |= {"intermediate_size": 3072, "num_attention_heads": 12, "max_position_embeddings": 512}
    return BlipConfig(text_config=text, vision_config=vision | {"patch_size": 16, "image_size": 224})


@dataclass(frozen=True)
class BlankReward:
    """A reward whose scores are shapes alone.

    Attributes:
        name: Of the reward.
        network: On the meta device; None for a reward whose cost is not known, or that has no network.
        sees: Whether it is called with `images` or with `latents`.
    """

    name: str
    network: nn.Module | None
    sees: Sees = "images"

    def __call__(self, images: Tensor) -> Tensor:
        """Scores (B,) of images (B, 3, H, W), or of latents (B, ...)."""
        network: Any = self.network  # whose configurations are typed as if they could be absent
        match self.network:
            case CLIPModel():
                clip, vision = network, network.config.vision_config
                text = clip.get_text_features(torch.zeros(len(images), CLIP_TOKENS, dtype=torch.long, device="meta"))
                found = clip.get_image_features(resize_and_crop(images, vision.image_size).to(clip.dtype))
                return (found.pooler_output.float() * text.pooler_output.float()).sum(dim=-1)
            case AestheticPredictor():
                pixels = resize_and_crop(images, network.config.image_size).to(network.dtype)
                return network.layers(network(pixels).image_embeds)[:, 0].float()
            case ImageRewardModel():
                pixels = resize_and_crop(images, network.config.vision_config.image_size).to(network.dtype)
                picture = network.vision_model(pixels).last_hidden_state
                return network.layers(picture[:, 0, : network.config.text_config.hidden_size])[:, 0].float()
            case _:
                return images.flatten(1).mean(dim=1)


def blank_reward(name: str, dtype: torch.dtype = torch.float32, sees: Sees = "images") -> BlankReward:
    """The reward of a name; one of another name is taken to cost nothing.

    Args:
        name: As in `reward_funcs`.
        dtype: The precision of its weights.
        sees: Whether it is called with `images` or with `latents`.
    """
    made: Any = None
    with torch.device("meta"):
        match name:
            case "clip_score":
                made = CLIPModel(_vit_l_14())
            case "pickscore" | "hpsv2":
                made = CLIPModel(vit_h_14())
            case "aesthetic":
                vision = _vit_l_14().to_dict()["vision_config"] | {"projection_dim": 768}
                made = AestheticPredictor(CLIPVisionConfig(**vision))
            case "image_reward":
                made = ImageRewardModel(_blip())
    if made is not None:
        made = made.to(dtype).requires_grad_(False).eval()
    return BlankReward(name, made, sees)


def blank_of(reward: Reward) -> BlankReward:
    """That of a reward which is at hand, by its class, whatever it is called; one of another class costs nothing."""
    kind = next((name for name, known in NAMED_REWARDS.items() if type(reward) is known), "")
    blank = blank_reward(kind, sees=reward.sees)
    if blank.network is not None:
        model: Any = reward  # all of those have one
        blank.network.to(next(model.model.parameters()).dtype)
    return replace(blank, name=reward.name)


def is_counted(name: str) -> bool:
    """Whether the cost of the reward of a name is known."""
    return name in WITHOUT_NETWORK or blank_reward(name).network is not None
