"""What a run from the command line is told beside the settings of its trainer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml
from trl import TrlParser

from ..trainers import ACFlowTrainer, AdjointMatchingTrainer, FlowRLConfig, FlowRLTrainer, TAFSGRPOTrainer, VGGFlowTrainer

TRAINERS: dict[str, type[FlowRLTrainer]] = {
    "adjoint_matching": AdjointMatchingTrainer,
    "vgg_flow": VGGFlowTrainer,
    "ac_flow": ACFlowTrainer,
    "tafs_grpo": TAFSGRPOTrainer,
}


@dataclass
class RunArguments:
    """Model, prompts, rewards and adapter of a run."""

    model: str = field(
        metadata={"help": "The pipeline to tune: a Hub id, a folder, or 'shapes' for the small one that ships with the package."}
    )
    dataset: str = field(
        metadata={"help": "The prompts: a data set of the Hub or a folder, or 'shapes' for the captions of the world of shapes."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The configuration of the data set, where it has several."})
    prompt_column: str = field(default="prompt", metadata={"help": "The column that holds the prompts, such as 'caption'."})
    train_split: str = field(default="train", metadata={"help": "The split whose prompts are trained on."})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "The split of held-out prompts for evaluation ('held_out' for shapes). Default: no evaluation."},
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "The rewards to raise: names such as 'shapes', or functions as 'module.function', looked up in the current folder too."
        },
    )
    eval_reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Rewards that evaluation adds and training never sees, named in the same way."}
    )
    lora_r: int = field(default=32, metadata={"help": "The rank of the LoRA; 0 trains all weights of the transformer."})
    lora_alpha: int = field(default=64, metadata={"help": "The LoRA's alpha: its output is scaled by alpha over rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "The dropout on the LoRA's input during updates."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "The names of the layers that the LoRA adapts. Default: the family's own."}
    )


@contextmanager
def wrong_arguments() -> Iterator[None]:
    """Raises `ValueError` for whatever `TrlParser` raises inside."""
    try:
        yield
    except IndexError as error:
        raise ValueError("`--config` needs the name of a YAML file.") from error
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise ValueError(str(error)) from error


def parse(
    command: str,
    make_config: Callable[..., FlowRLConfig],
    arguments: list[str],
    defaults: dict[str, Any],
) -> tuple[RunArguments, FlowRLConfig]:
    """Flags over the YAML file of `--config` over `defaults`. Raises `ValueError` for what neither class knows."""
    usage = f"flowrl {command} {'[--trainer METHOD] ' if command == 'demo' else ''}[--config run.yaml] [--field value ...]"
    parser = TrlParser([RunArguments, make_config], prog=f"flowrl {command}", usage=usage, allow_abbrev=False)
    parser.set_defaults_with_config(**defaults)
    with wrong_arguments():
        run, config, from_file, from_flags = parser.parse_args_and_config(
            arguments, return_remaining_strings=True, separate_remaining_strings=True
        )
    for source, unknown in (("the YAML file", from_file), ("the command line", from_flags)):
        if unknown:
            name = unknown[0].removeprefix("--").split("=")[0]
            raise ValueError(f"{name!r} in {source} is no setting of `flowrl {command}`: see `flowrl {command} --help`.")
    for name in ("reward_funcs", "eval_reward_funcs", "lora_target_modules"):  # a single name in YAML is a string
        if isinstance(getattr(run, name), str):
            setattr(run, name, [getattr(run, name)])
    weights: Any = config.reward_weights  # YAML has a single number as a number, and 1e-2 as a string
    if weights is not None:
        try:
            config.reward_weights = [float(weight) for weight in (weights if isinstance(weights, list) else [weights])]
        except (TypeError, ValueError) as error:
            raise ValueError(f"`reward_weights` is {weights!r}: name one number per reward.") from error
    return run, config
