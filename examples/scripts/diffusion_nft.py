# /// script
# requires-python = ">=3.11"
# dependencies = ["flowrl-trainers @ git+https://github.com/flowrl-trainers/flowrl-trainers"]
#
# [tool.hf-jobs]
# flavor = "a100-large"
# timeout = "12h"
# secrets = ["HF_TOKEN"]
# ///
"""Tune a pipeline by DiffusionNFT, for any reward.

    uv run examples/scripts/diffusion_nft.py --config run.yaml
    accelerate launch --multi_gpu --num_processes 2 examples/scripts/diffusion_nft.py --config run.yaml
    hf jobs uv run examples/scripts/diffusion_nft.py --config run.yaml --dataset prompts.txt --push_to_hub true

Every setting is a key of the YAML file and a flag; `--help` explains them. A reward that is written into this file is
named `--reward_funcs __main__.name_of_the_function`.
"""

import sys

from flowrl_trainers.cli import main

if __name__ == "__main__":
    sys.exit(main(["diffusion_nft", *sys.argv[1:]]))
