"""`flowrl convert_image_reward CHECKPOINT [OUT]`: the official checkpoint of ImageReward becomes a folder that the reward reads."""

import argparse

from ..rewards.convert_image_reward import convert_checkpoint
from ..rewards.image_reward import FOLDER


def convert_image_reward(arguments: list[str]) -> None:
    """Convert and say how to use it. Raises `ValueError` for what cannot be converted."""
    parser = argparse.ArgumentParser(
        "flowrl convert_image_reward", description=__doc__.split(": ", 1)[1], allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="The file `ImageReward.pt` of THUDM/ImageReward on the Hugging Face Hub.")
    parser.add_argument(
        "out",
        nargs="?",
        default=FOLDER,
        help="The folder to write. Default: %(default)s, which the reward reads by name.",
    )
    told = parser.parse_args(arguments)
    model = convert_checkpoint(told.checkpoint, told.out)
    use = "the name `image_reward` in this folder" if told.out == FOLDER else f'`ImageReward("{told.out}")`'
    print(f"{told.out}/: ImageReward of {model.num_parameters() / 1e6:.0f} million parameters.\nUse it by {use}.")
