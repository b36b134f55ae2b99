"""The LAION aesthetic predictor: how much people would like a picture, whatever it shows."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from .base import Reward
from .loading import load_model, load_normalisation, model_of, read_tensors
from .preprocessing import resize_and_crop


def linear_layers(width: int) -> torch.nn.Sequential:
    """LAION's five linear layers without activations between them, (B, width) to (B, 1)."""
    return torch.nn.Sequential(
        torch.nn.Linear(width, 1024),
        torch.nn.Dropout(0.2),  # does nothing at inference, but gives the next layer its number in the checkpoint
        torch.nn.Linear(1024, 128),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(128, 64),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(64, 16),
        torch.nn.Linear(16, 1),
    )


HEAD = "sac+logos+ava1-l14-linearMSE.pth"


class AestheticPredictor(CLIPVisionModelWithProjection):
    """A CLIP vision tower and LAION's linear layers, under the names of the checkpoint."""

    config_class = CLIPVisionConfig

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.layers = linear_layers(config.projection_dim)
        self.post_init()


class AestheticReward(Reward):
    """LAION's improved aesthetic predictor v2 (sac+logos+ava1-l14-linearMSE): people's mean opinion, from 1 to 10.

    score = w · e + b, where e is the embedding of a CLIP ViT-L/14, scaled to unit length

    Differentiable. Pictures of diffusion models mostly score 4.5 to 7. Nothing clips the score: in LAION's file w has
    length 18.0 and b is 5.24, so scores lie between -12.8 and 23.2. It ignores the prompt, so a model that is trained
    on it alone stops following prompts. Fooled by painterly textures, soft light and portraits. Pictures are resized,
    cropped at the centre and normalised in torch.

    The linear layers and the CLIP come from one checkpoint of a third party, or as LAION publishes them:
    `AestheticReward(head="sac+logos+ava1-l14-linearMSE.pth")`, a file of github.com/christophschuhmann/
    improved-aesthetic-predictor, which is read as plain tensors, and OpenAI's CLIP.

    Args:
        checkpoint: A folder or a repository of the Hub with the vision tower, the linear layers and the image
            processor. Unused if there is a `head`.
        head: LAION's file with the five linear layers; None for those of `checkpoint`.
        clip: The CLIP of the `head`: a folder or a repository of the Hub with a CLIP and its image processor.
        revision: Branch, tag or commit of the checkpoint or the CLIP on the Hub.
        dtype: The precision of the weights.

    Raises:
        ValueError: If the checkpoint, the head or the CLIP cannot be loaded, or head and CLIP do not fit together.
    """

    name = "aesthetic"
    differentiable = True

    def __init__(
        self,
        checkpoint: str | Path = "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE",
        *,
        head: str | Path | None = None,
        clip: str | Path = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if head is None:
            self.model = load_model(AestheticPredictor, checkpoint, revision, dtype)
        else:
            checkpoint, layers = clip, _read_head(Path(head))
            whole = load_model(CLIPModel, clip, revision, dtype)
            width, wanted = whole.config.projection_dim, layers["layers.0.weight"].shape[1]
            if width != wanted:
                raise ValueError(
                    f"`head` ({str(head)!r}) reads embeddings of width {wanted}, but those of `clip` ({str(clip)!r}) "
                    f"have {width}: pass the CLIP that the head was trained on, a ViT-L/14 for LAION's."
                )
            config = CLIPVisionConfig(**whole.config.vision_config.to_dict() | {"projection_dim": width})
            tower = {n: t for n, t in whole.state_dict().items() if n.startswith(("vision_model.", "visual_proj"))}
            self.model = model_of(AestheticPredictor, config, tower | layers, dtype, self.name, HEAD)
        mean, std = load_normalisation(checkpoint, revision)
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)

    def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        pixels = (resize_and_crop(images, self.model.config.image_size) - self.mean) / self.std
        embeddings = self.model(pixels.to(self.model.dtype)).image_embeds
        return self.model.layers(torch.nn.functional.normalize(embeddings, dim=-1))[:, 0].to(images.dtype)


def _read_head(path: Path) -> dict[str, Tensor]:
    """The tensors `layers.N.weight` and `layers.N.bias` of LAION's file. Raises `ValueError` for any other file."""
    mend = f"pass LAION's {HEAD}"
    if not path.is_file():
        raise ValueError(f"`head` ({str(path)!r}) is no file: {mend}.")
    layers = read_tensors(path, mend)
    with torch.device("meta"):
        expected = {f"layers.{name}": tensor.shape for name, tensor in linear_layers(1).state_dict().items()}
    first = "layers.0.weight"
    fits = layers.keys() == expected.keys() and layers[first].dim() == 2
    if not fits or any(layers[k].shape != shape for k, shape in expected.items() if k != first):
        raise ValueError(f"`head` ({str(path)!r}) does not hold LAION's five linear layers: {mend}.")
    return layers
