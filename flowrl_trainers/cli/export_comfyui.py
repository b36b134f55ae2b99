"""`flowrl export_comfyui OUTPUT [FILE]`: write the adapter of a run as ComfyUI reads it, at its full strength."""

import argparse
from pathlib import Path

from safetensors.torch import save_file

from ..run_folder.comfyui import comfyui_adapter
from ..run_folder.earlier_run import ADAPTER


def export_comfyui(arguments: list[str]) -> None:
    """Write the file and say where it is. Raises `ValueError` for an adapter that ComfyUI cannot read."""
    parser = argparse.ArgumentParser(
        "flowrl export_comfyui", description=__doc__.split(": ", 1)[1], allow_abbrev=False
    )
    parser.add_argument("output", type=Path, help="The folder of a run, its `output_dir`, or a checkpoint.")
    parser.add_argument("file", type=Path, nargs="?", help="Default: comfyui_lora.safetensors in the folder.")
    args = parser.parse_args(arguments)
    file = args.file or args.output / "comfyui_lora.safetensors"
    save_file(comfyui_adapter(args.output / ADAPTER), file)
    print(f"{file} is written: put it into `models/loras` of ComfyUI.")
