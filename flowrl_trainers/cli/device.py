"""The device of a command."""

import torch


def device_of(name: str) -> torch.device:
    """The device of `--device`, on which something can be placed. Raises `ValueError` where nothing can."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts that it is there
        said = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"`device` ({name!r}) cannot be used ({said}): take 'cuda', 'cuda:1' or 'cpu'.") from error
