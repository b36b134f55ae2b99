"""`flowrl convert_image_reward CHECKPOINT [OUT]`: turn ImageReward's official checkpoint into the reward's folder."""

import argparse

from ..rewards.convert_image_reward import convert_checkpoint
from ..rewards.image_reward import FOLDER
from ..trainers.input_checks import writable_folder


def convert_image_reward(arguments: list[str]) -> None:
    """Convert the checkpoint and print how to use it. Raises `ValueError` for a file that cannot be converted."""
    parser = argparse.ArgumentParser(
        "flowrl convert_image_reward", description=__doc__.split(": ", 1)[1], allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="The file `ImageReward.pt` of THUDM/ImageReward on the Hugging Face Hub.")
    parser.add_argument(
        "out",
        nargs="?",
        default=FOLDER,
        help="The folder to write. Default: %(default)s, where the name `image_reward` looks for it.",
    )
    args = parser.parse_args(arguments)
    writable_folder(args.out, "out")
    model = convert_checkpoint(args.checkpoint, args.out)
    use = "the name `image_reward` in this folder" if args.out == FOLDER else f'`ImageReward("{args.out}")`'
    print(f"{args.out}/: ImageReward of {model.num_parameters() / 1e6:.0f} million parameters.\nUse it by {use}.")
