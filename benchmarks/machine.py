"""What a figure was measured on."""

import platform

import torch


def machine() -> str:
    """The device and, for a CPU, its threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
