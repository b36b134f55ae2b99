"""The settings of a run from the command line beside those of its trainer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from transformers.hf_argparser import HfArg

from ..sampling.prompt_sources import is_prompt_file
from ..trainers import (
    ACFlowTrainer,
    AdjointMatchingTrainer,
    DiffusionNFTTrainer,
    FlowRLConfig,
    FlowRLTrainer,
    TAFSGRPOTrainer,
    VGGFlowTrainer,
)
from ..trainers.config_checks import Range, check_fields
from .adapter import lora_fields
from .parser import SettingsParser, config_file

TRAINERS: dict[str, type[FlowRLTrainer]] = {
    "adjoint_matching": AdjointMatchingTrainer,
    "vgg_flow": VGGFlowTrainer,
    "ac_flow": ACFlowTrainer,
    "diffusion_nft": DiffusionNFTTrainer,
    "tafs_grpo": TAFSGRPOTrainer,
}


def as_list(names: list[str] | str) -> list[str]:
    """A list of names; YAML reads a single name as a string."""
    return [names] if isinstance(names, str) else names


@dataclass
class RunArguments:
    """Model, prompts, rewards and adapter of a run."""

    model: str = HfArg(
        help="The pipeline to tune: a Hub id, a folder, or 'shapes' for the small one that ships with the package."
    )
    dataset: str = HfArg(
        help="The prompts: a file (.txt with a prompt on each line, .csv, .tsv, .json, .jsonl or .parquet; looked up "
        "beside the YAML file too), a data set of the Hub, a folder, or 'shapes' for the captions of the world of "
        "shapes."
    )
    dataset_config: str | None = HfArg(default=None, help="The configuration of the data set, where it has several.")
    prompt_column: str = HfArg(default="prompt", help="The column that holds the prompts, such as 'caption'.")
    train_split: str = HfArg(default="train", help="The split of the training prompts.")
    eval_split: str | None = HfArg(
        default=None,
        help="The split of held-out prompts for evaluation ('held_out' for shapes). Default: no evaluation, unless "
        "`eval_dataset` is a file.",
    )
    eval_dataset: str | None = HfArg(
        default=None,
        help="The held-out prompts where they are no split of `dataset`: a second file, or another data set, whose "
        "split is `eval_split`. Default: those of `dataset`.",
    )
    reward_funcs: list[str] = HfArg(
        default_factory=list,
        help="The rewards to raise: names such as 'shapes', or functions as 'module.function', looked up in the "
        "current folder too.",
    )
    eval_reward_funcs: list[str] = HfArg(
        default_factory=list, help="Rewards that evaluation adds and training never sees, named in the same way."
    )
    license: str | None = HfArg(
        default=None,
        help="The licence on the card, such as 'apache-2.0'. Default: that of the base model, where the Hub or the "
        "cache has its card.",
    )
    lora_r: Annotated[int, Range(at_least=0)] = HfArg(
        default=32, help="The rank of the LoRA; 0 trains all weights of the transformer."
    )
    lora_alpha: Annotated[int, Range(at_least=1)] = HfArg(
        default=64, help="The LoRA's alpha: its output is scaled by alpha over rank."
    )
    lora_dropout: Annotated[float, Range(at_least=0, below=1)] = HfArg(
        default=0.0, help="The dropout on the LoRA's input during updates."
    )
    lora_target_modules: list[str] | None = HfArg(
        default=None,
        help="The names of the layers that the LoRA adapts; or one regular expression of their whole paths, such as "
        "'.*attn\\.to_[qk]'; or 'all-linear'. Default: those of the pipeline's family.",
    )
    lora_config: dict[str, Any] | str | None = HfArg(
        default=None,
        help="Further fields of peft's `LoraConfig` by their names, a mapping in YAML and JSON on the command line, "
        "such as '{\"use_dora\": true}'. Default: those of peft.",
    )

    def __post_init__(self) -> None:
        self.reward_funcs, self.eval_reward_funcs = as_list(self.reward_funcs), as_list(self.eval_reward_funcs)
        if self.lora_target_modules is not None:
            self.lora_target_modules = as_list(self.lora_target_modules)
        check_fields(self)
        if self.lora_config is not None:
            self.lora_config = lora_fields(self.lora_config)
            if self.lora_r == 0:
                raise ValueError("`lora_config` is set, but `lora_r` is 0, which trains all weights: leave one out.")


def beside(config: Path | None, name: str) -> str:
    """The path of a prompt file that is missing in the current folder but lies beside the YAML file; else the name."""
    if config is None or Path(name).exists() or not is_prompt_file(name):
        return name
    found = config.parent / name
    return str(found) if found.is_file() else name


def parse(
    command: str,
    config_class: type[FlowRLConfig],
    arguments: list[str],
    defaults: dict[str, Any],
) -> tuple[RunArguments, FlowRLConfig]:
    """Read the settings of a run: a flag wins over the YAML file of `--config`, and that over `defaults`.

    Args:
        command: The name of the command, for its help.
        config_class: The class of the trainer's settings.
        arguments: The flags.
        defaults: Values in place of the defaults of the two classes.

    Returns:
        The settings of the command line, and those of the trainer.

    Raises:
        ValueError: If a name is a setting of neither, or a value is not allowed.
    """
    method = "[--trainer METHOD] " if command == "demo" else ""
    usage = f"flowrl {command} {method}[--config run.yaml] [--field value ...]"
    parser = SettingsParser([RunArguments, config_class], prog=f"flowrl {command}", usage=usage, allow_abbrev=False)
    parser.set_defaults_with_config(**defaults)
    run, config = parser.read(arguments)
    run.dataset = beside(config_file(arguments), run.dataset)
    if run.eval_dataset is not None:
        run.eval_dataset = beside(config_file(arguments), run.eval_dataset)
    return run, config
