"""Random draws that depend on what they are for, and on nothing else."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class ImageKey:
    """One image to be made: the row of its prompt, its number in the prompt's group, and its rollout."""

    row: int
    image: int
    rollout: int


def keyed_seed(seed: int, key: ImageKey, purpose: str) -> int:
    """A seed that is a function of its arguments alone.

    So the noise of an image does not depend on batch sizes, accumulation or the number of processes, and a resumed run
    draws it again. 32 bits, as torch's CPU generator reads no more.

    Args:
        seed: That of the run.
        key: Of the image.
        purpose: What is drawn, such as "initial latents".
    """
    text = f"{seed}/{key.row}/{key.image}/{key.rollout}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


def keyed_generator(seed: int, key: ImageKey, purpose: str) -> Generator:
    """A CPU generator started from `keyed_seed`."""
    return Generator("cpu").manual_seed(keyed_seed(seed, key, purpose))


def keyed_generators(seed: int, keys: Sequence[ImageKey], purpose: str) -> list[Generator]:
    """One CPU generator per image."""
    return [keyed_generator(seed, key, purpose) for key in keys]


def noise(generators: Sequence[Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal noise (B, *shape) on a device; each image's is drawn on the CPU from its own generator."""
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators]).to(device)
