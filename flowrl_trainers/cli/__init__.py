"""The command line: `flowrl COMMAND --field value ...`."""

import sys
import traceback
from importlib.metadata import version
from pathlib import Path

from ..suggestions import did_you_mean

METHODS = ("adjoint_matching", "vgg_flow", "ac_flow", "diffusion_nft", "tafs_grpo")
COMMANDS = (
    *METHODS, "demo", "estimate", "evaluate", "score", "check_reward", "card", "export_comfyui", "serve_reward",
    "convert_sit", "convert_image_reward", "env",
)  # fmt: skip

READ_HERE = ("--config=", "--trainer=", "--accelerate_config=", "--num_processes=")

GO_ON = "; if it has saved a checkpoint, `--resume_from_checkpoint true` goes on from there"

USAGE = """usage: flowrl COMMAND [--config run.yaml] [--field value ...] [--help]
       flowrl --version

commands:
  adjoint_matching   tune a pipeline by adjoint matching, for differentiable rewards
  vgg_flow           tune a pipeline by value-gradient guidance, for differentiable rewards
  ac_flow            tune a pipeline by actor-critic flow matching, for any reward
  diffusion_nft      tune a pipeline by matching the flow towards its good pictures and away from bad ones, for any
                     reward
  tafs_grpo          tune a pipeline as a few-step generator by policy gradients on its sampler's draws, for any reward
  demo               tune the embedded pipeline, print base and tuned on held-out prompts, and write the adapter and
                     pictures; `--trainer METHOD` takes another of the five methods than `adjoint_matching`;
                     `--check` fails where the checker's accuracy rises by less or more than in recorded demos
  estimate           say what a run will need before it starts, without its weights: calls, operations, memory by
                     phase; `flowrl estimate METHOD --config run.yaml`
  evaluate           measure adapters beside their base model, same prompts and seeds; writes a table and a picture
  score              score the pictures of a folder: a table, a histogram, the best and the worst;
                     `flowrl score FOLDER --rewards NAME ...`
  check_reward       say before a run what a reward is good for: its signal, what moves it, its gradient, its cost and
                     its first hack; `flowrl check_reward NAME --model MODEL`
  card               write the card of a run again, offline: `flowrl card OUTPUT [--license apache-2.0]`
  export_comfyui     write the adapter of a run as ComfyUI reads it: `flowrl export_comfyui OUTPUT [FILE]`
  serve_reward       serve a reward over HTTP, at 127.0.0.1:8000 by default, for `RemoteReward`:
                     `flowrl serve_reward NAME`
  convert_sit        turn a checkpoint of SiT's original code into a pipeline folder:
                     `flowrl convert_sit CHECKPOINT OUT`
  convert_image_reward
                     turn the official checkpoint of ImageReward into a folder for the reward `image_reward`:
                     `flowrl convert_image_reward ImageReward.pt`
  env                print the versions and devices that a bug report should have

Every setting is a flag and a key of the YAML file, explained by `flowrl COMMAND --help`. `--accelerate_config ddp` (or
a file that `accelerate config` wrote) starts one process per device, 'fsdp2' shards the network over them;
`--num_processes N` starts N processes.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; a wrong input gets one sentence and status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Our code and `TrlParser` look for these flags by name, before argparse splits `--config=run.yaml` at the "=".
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith(READ_HERE) else [a])]
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        print(f"flowrl-trainers {version('flowrl-trainers')}")
        return 0
    if command not in COMMANDS:
        meant = did_you_mean([command], COMMANDS)
        print(f"flowrl: there is no command {command!r}{meant}: choose {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        return _run(command, rest)
    except KeyboardInterrupt:
        print(
            f"flowrl: `flowrl {command}` was stopped by Ctrl-C{GO_ON if command in METHODS else ''}.", file=sys.stderr
        )
        return 130
    except (ValueError, TypeError, RuntimeError) as error:
        # An error that this package raises is a sentence to the user; any other is a fault, and keeps its traceback.
        if not _is_ours(error):
            raise
        print(f"flowrl: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2


def _is_ours(error: Exception) -> bool:
    """Whether a `raise` of this package raised the error."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    in_package = Path(where.filename).is_relative_to(Path(__file__).parent.parent)
    return in_package and (where.line or "").startswith("raise ")


def _run(command: str, arguments: list[str]) -> int:
    # Each import takes seconds, so a command imports its own module alone.
    from .launch import launched, take_launch_arguments

    launch = None
    if command in (*METHODS, "demo", "evaluate"):  # the others do their work in one process
        launch, arguments = take_launch_arguments(arguments)
    if launch is not None:
        return launched(launch, [command, *arguments])
    from .memory import keep_freed_memory
    from .quiet import hush

    keep_freed_memory()
    hush()
    match command:
        case "env":
            from .env import print_environment

            print_environment(arguments)
        case "estimate":
            from .estimate import estimate

            estimate(arguments)
        case "evaluate":
            from .evaluate import evaluate

            evaluate(arguments)
        case "score":
            from .score import score

            score(arguments)
        case "check_reward":
            from .check_reward import check_reward

            check_reward(arguments)
        case "card":
            from .card import card

            card(arguments)
        case "export_comfyui":
            from .export_comfyui import export_comfyui

            export_comfyui(arguments)
        case "serve_reward":
            from .serve_reward import serve_reward

            serve_reward(arguments)
        case "convert_sit":
            from .convert_sit import convert_sit

            convert_sit(arguments)
        case "convert_image_reward":
            from .convert_image_reward import convert_image_reward

            convert_image_reward(arguments)
        case "demo":
            from .demo import demo

            demo(arguments)
        case _:
            from .run import run

            run(command, arguments)
    return 0
