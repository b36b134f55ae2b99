"""`flowrl convert_sit CHECKPOINT OUT`: turn a checkpoint of SiT's original code into a pipeline folder."""

import argparse
from pathlib import Path

from ..sit.convert import VAE, convert_checkpoint
from ..trainers.input_checks import writable_folder


def convert_sit(arguments: list[str]) -> None:
    """Convert the checkpoint and print its sizes. Raises `ValueError` for a file that cannot be converted."""
    args = _parser().parse_args(arguments)
    writable_folder(args.out, "out")
    names = _lines(args.class_names) if args.class_names is not None else None
    pipeline = convert_checkpoint(args.checkpoint, args.out, args.vae, names, args.num_attention_heads)
    config = pipeline.transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    size = config.sample_size * pipeline.vae_scale_factor
    print(
        f"{args.out}/: SiT of {config.num_layers} blocks, width {width}, "
        f"patches of {config.patch_size}, {config.num_classes} classes, pictures of {size} x {size} pixels.\n"
        f'Load it by `FlowPipeline.from_pretrained("{args.out}")` or `SiTPipeline.from_pretrained("{args.out}")`.'
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("flowrl convert_sit", description=__doc__.split(": ", 1)[1], allow_abbrev=False)
    parser.add_argument(
        "checkpoint",
        help="A `.pt` or `.safetensors` file of github.com/willisma/SiT: a state dict or a training checkpoint.",
    )
    parser.add_argument("out", help="The folder to write.")
    parser.add_argument("--vae", default=VAE, help="The autoencoder, a folder or a Hub id. Default: %(default)s.")
    parser.add_argument(
        "--class_names",
        help="A text file with the name of a class on each line, by number. Default: numbers are the names.",
    )
    parser.add_argument(
        "--num_attention_heads",
        type=int,
        help="The attention heads; needed only if the width is none of the official sizes S, B, L and XL.",
    )
    return parser


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"`--class_names` {path!r} cannot be read: pass a text file in UTF-8 with one name a line."
        ) from error
