"""`flowrl env`: the versions of the packages, and the devices."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = (
    "flowrl-trainers", "torch", "trl", "diffusers", "transformers", "accelerate", "peft", "datasets",
    "huggingface_hub", "evaluate",
)  # fmt: skip


def print_environment(arguments: list[str]) -> None:
    """Print the versions of the packages and the devices, one per line."""
    argparse.ArgumentParser("flowrl env", description=__doc__.split(": ", 1)[1], allow_abbrev=False).parse_args(
        arguments
    )
    print(f"Python: {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            print(f"{package}: {version(package)}")
        except PackageNotFoundError:
            print(f"{package}: not installed")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices: {', '.join(devices) or f'CPU, {torch.get_num_threads()} threads'}")
