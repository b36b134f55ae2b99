"""A tiny SiT, converted from a random checkpoint of the original layout."""

import math

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from flowrl_trainers.sit import SiTPipeline, load_transformer

D, HEADS, DEPTH, PATCH, CHANNELS, SIZE, CLASSES = 24, 2, 2, 2, 4, 8, 5
GRID = SIZE // PATCH
NAMES = ["goldfish, Carassius auratus", "crane", "crane", "tench", "volcano"]
CLASS_PROMPTS = ["goldfish", "4"]


def sin_cos_table() -> torch.Tensor:
    """(1, N, D): half of the dimensions for the column, half for the row, each sines first."""
    omega = 10000 ** -(torch.arange(D // 4, dtype=torch.float64) / (D / 4))
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    halves = [torch.outer(position.flatten().double(), omega) for position in (columns, rows)]
    return torch.cat([f(angle) for angle in halves for f in (torch.sin, torch.cos)], dim=1).float()[None]


def original_checkpoint(learn_sigma: bool = True) -> dict[str, torch.Tensor]:
    """Random weights in the original layout; as in a trained network, none are zero."""
    outputs = PATCH**2 * CHANNELS * (2 if learn_sigma else 1)
    shapes = {
        "x_embedder.proj": (D, CHANNELS, PATCH, PATCH),
        "t_embedder.mlp.0": (D, 256),
        "t_embedder.mlp.2": (D, D),
        "final_layer.linear": (outputs, D),
        "final_layer.adaLN_modulation.1": (2 * D, D),
    }
    for i in range(DEPTH):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * D, D),
            f"blocks.{i}.attn.proj": (D, D),
            f"blocks.{i}.mlp.fc1": (4 * D, D),
            f"blocks.{i}.mlp.fc2": (D, 4 * D),
            f"blocks.{i}.adaLN_modulation.1": (6 * D, D),
        }
    generator = torch.Generator().manual_seed(0)
    state = {
        "pos_embed": sin_cos_table(),
        "y_embedder.embedding_table.weight": torch.randn(CLASSES + 1, D, generator=generator),
    }
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        state[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=generator)
    return state


def tiny_vae(**config) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        **({"latent_channels": CHANNELS, "scaling_factor": 0.18215} | config),
    ).eval()


def tiny_sit(checkpoint, names: list[str] = NAMES) -> SiTPipeline:
    transformer = load_transformer(checkpoint, num_attention_heads=HEADS)
    pipeline = SiTPipeline(transformer, tiny_vae(), FlowMatchEulerDiscreteScheduler(shift=1.0), dict(enumerate(names)))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
