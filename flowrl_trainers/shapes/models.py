"""The networks of the embedded default: a CLIP, an autoencoder and an SD3 transformer, all small.

The shipped weights are stored in half precision and loaded as float32; `examples/train_shapes.py` trains them.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from .prompts import all_prompts
from .scenes import IMAGE_SIZE

WEIGHTS = Path(__file__).parent / "weights"
MAX_TOKENS = 10  # the longest caption has nine, begin and end included
_EMBEDDING = 128


def new_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer that has one token for every word of the captions and can encode any text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = [*letters, *(letter + "</w>" for letter in letters)]
    special = ["<|startoftext|>", "<|endoftext|>"]

    def tokenizer(merges: list[tuple[str, str]]) -> CLIPTokenizer:
        symbols = [*alphabet, *("".join(m) for m in merges), *special]
        pairs: Any = merges  # transformers annotates merges as strings, but its tokenizer takes pairs
        return CLIPTokenizer({s: i for i, s in enumerate(symbols)}, pairs, model_max_length=MAX_TOKENS)

    # Training drops letters that the captions lack, so only its merges are kept.
    trained = tokenizer([]).train_new_from_iterator(all_prompts(), vocab_size=len(alphabet) + 120, show_progress=False)
    merges = json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]
    return tokenizer([(left, right) for left, right in merges])


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP for 32 x 32 pictures, 1.0 million parameters."""
    shared = {"num_attention_heads": 4, "hidden_size": _EMBEDDING, "intermediate_size": 256}
    shared |= {"projection_dim": _EMBEDDING}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "num_hidden_layers": 3,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **shared,
    }
    vision = {"image_size": IMAGE_SIZE, "patch_size": 4, "num_hidden_layers": 4, **shared}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=_EMBEDDING))


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder of 32 x 32 pictures to latents of 8 x 8 x 8, 0.9 million parameters."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def new_transformer() -> SD3Transformer2DModel:
    """An untrained SD3 transformer for latents of 8 x 8 x 8, 3.5 million parameters."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * _EMBEDDING,
        caption_projection_dim=128,
        pooled_projection_dim=2 * _EMBEDDING,
        pos_embed_max_size=4,  # a larger grid would squeeze the positions together, which slows learning several times
        qk_norm="rms_norm",
    )


def load_clip(folder: str | Path = WEIGHTS) -> tuple[CLIPModel, CLIPTokenizer]:
    """The CLIP of the shapes world and its tokenizer, float32, in evaluation mode."""
    clip = CLIPModel.from_pretrained(Path(folder) / "clip", dtype=torch.float32)
    return clip.eval(), CLIPTokenizer.from_pretrained(Path(folder) / "clip")


def load_pipeline(folder: str | Path = WEIGHTS) -> StableDiffusion3Pipeline:
    """The embedded default: a stock `StableDiffusion3Pipeline` in float32, loaded from the package, offline.

    It knows the captions of `all_prompts()` and draws 32 x 32 pictures. Its two text encoders are one module, the text
    half of `load_clip`'s CLIP.
    """
    clip, tokenizer = load_clip(folder)
    text_config = clip.config.text_config
    assert isinstance(text_config, CLIPTextConfig)
    text_encoder = CLIPTextModelWithProjection(text_config)
    text_encoder.load_state_dict({k: v for k, v in clip.state_dict().items() if k.startswith("text_")})
    transformer = SD3Transformer2DModel.from_pretrained(Path(folder) / "transformer", dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(Path(folder) / "vae", dtype=torch.float32)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.register_to_config(_name_or_path="flowrl_trainers.shapes")
    return pipeline
