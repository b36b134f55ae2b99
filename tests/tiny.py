"""Tiny random pipelines of the real architectures, built offline."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from flowrl_trainers.shapes.models import new_tokenizer


def tiny_sd3(**scheduler) -> StableDiffusion3Pipeline:
    """All three text encoders; latents of 4 channels, patches of 2, pictures of 32 pixels by default."""
    torch.manual_seed(0)
    tokenizer = new_tokenizer()

    def clip(width: int) -> CLIPTextModelWithProjection:
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return CLIPTextModelWithProjection(config).eval()

    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        *((c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ).eval()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),  # as in SD3.5-medium
    ).eval()
    with torch.no_grad():  # zero-initialised output layers would make the velocity constant
        for parameter in transformer.parameters():
            if parameter.std() == 0:
                parameter.normal_(std=0.2)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=1.3,
        shift_factor=0.2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        vae=vae,
        text_encoder=clip(8),
        tokenizer=tokenizer,
        text_encoder_2=clip(16),
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=T5Tokenizer(vocab=pieces, extra_ids=0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_autoencoder(latent_channels: int = 4, levels: int = 2, seed: int = 0) -> AutoencoderTiny:
    """One that fits `tiny_sd3` by default: 4 channels, twice as many pixels as latents to a side."""
    torch.manual_seed(seed)
    widths, blocks = (8,) * levels, (1,) * levels
    return AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, num_encoder_blocks=blocks,
        num_decoder_blocks=blocks, latent_channels=latent_channels,
    )  # fmt: skip
