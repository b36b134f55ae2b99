"""What a figure was measured on."""

import platform

import torch


def machine() -> str:
    """The device and, for a CPU, its threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"
