"""Random draws that depend on what they are for, and on nothing else."""

import hashlib

import torch


def keyed_seed(seed: int, prompt_index: int, image_index: int, rollout: int, purpose: str) -> int:
    """A seed that is a function of its arguments alone.

    So the noise of an image does not depend on batch sizes, accumulation or the number of processes, and a resumed run draws it
    again. prompt_index: the row of the dataset. image_index: the number of the image in its group. rollout: counted from the
    start of training. purpose: what is drawn, such as "initial latents". 32 bits, as torch's CPU generator reads no more.
    """
    key = f"{seed}/{prompt_index}/{image_index}/{rollout}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little")


def keyed_generator(seed: int, prompt_index: int, image_index: int, rollout: int, purpose: str) -> torch.Generator:
    """A CPU generator started from `keyed_seed`."""
    return torch.Generator("cpu").manual_seed(keyed_seed(seed, prompt_index, image_index, rollout, purpose))
