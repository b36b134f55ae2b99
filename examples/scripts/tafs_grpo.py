# /// script
# requires-python = ">=3.11"
# dependencies = ["flowrl-trainers @ git+https://github.com/flowrl-trainers/flowrl-trainers"]
#
# [tool.hf-jobs]
# flavor = "a100-large"
# timeout = "12h"
# secrets = ["HF_TOKEN"]
# ///
"""Tune a pipeline by TAFS-GRPO as a few-step generator, for any reward.

    uv run examples/scripts/tafs_grpo.py --config run.yaml
    accelerate launch --multi_gpu --num_processes 2 examples/scripts/tafs_grpo.py --config run.yaml
    hf jobs uv run examples/scripts/tafs_grpo.py --config run.yaml --dataset prompts.txt --push_to_hub true

Every setting is a key of the YAML file and a flag; `--help` explains them. A reward that is written into this file is
named `--reward_funcs __main__.name_of_the_function`.
"""

import sys

from flowrl_trainers.cli import main

if __name__ == "__main__":
    sys.exit(main(["tafs_grpo", *sys.argv[1:]]))
