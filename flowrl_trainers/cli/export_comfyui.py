"""`flowrl export_comfyui OUTPUT [FILE]`: write the adapter of a run as ComfyUI reads it, at its full strength."""

import argparse
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from ..run_folder.comfyui import comfyui_adapter
from ..run_folder.earlier_run import ADAPTER

NAME = "comfyui_lora.safetensors"


def export_comfyui(arguments: list[str]) -> None:
    """Write the file and say where it is. Raises `ValueError` for an adapter that ComfyUI cannot read."""
    parser = argparse.ArgumentParser(
        "flowrl export_comfyui", description=__doc__.split(": ", 1)[1], allow_abbrev=False
    )
    parser.add_argument("output", type=Path, help="The folder of a run, its `output_dir`, or a checkpoint.")
    parser.add_argument(
        "file", type=Path, nargs="?", help=f"A file to write, or a folder for {NAME}. Default: the folder of the run."
    )
    args = parser.parse_args(arguments)
    file = args.file or args.output
    file = file / NAME if file.is_dir() else file
    if file.resolve() == (args.output / ADAPTER).resolve():
        raise ValueError(f"{file} is the adapter itself, which would be lost: name another file.")
    tensors = comfyui_adapter(args.output / ADAPTER)
    try:
        save_file(tensors, file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be written ({error}): name another file.") from error
    print(f"{file} is written: put it into `models/loras` of ComfyUI.")
