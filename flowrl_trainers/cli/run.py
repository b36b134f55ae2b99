"""`flowrl METHOD`: one run from the command line."""

import sys
from importlib import import_module
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from diffusers import DiffusionPipeline
from peft import LoraConfig

from ..pipelines import families
from ..rewards.named import RewardLike
from ..run_folder.card import SHAPES
from ..shapes import load_pipeline, prompts
from ..trainers import FlowRLConfig, FlowRLTrainer
from .arguments import TRAINERS, RunArguments, parse

EMBEDDED = ("shapes", SHAPES)


def run(method: str, arguments: list[str]) -> None:
    """Train, evaluate where there are held-out prompts, save, and push if asked. Raises `ValueError` for wrong arguments."""
    told, config = parse(method, TRAINERS[method].config_class, arguments, {})
    trainer = make_trainer(method, told, config)
    resume = config.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("true", "True") else resume)
    trainer.save_model(_internal_call=True)  # before anything else can fail
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.save_model()


def make_trainer(method: str, told: RunArguments, config: FlowRLConfig) -> FlowRLTrainer:
    """The trainer that the arguments describe."""
    if not told.reward_funcs:
        raise ValueError("`reward_funcs` is empty: name at least one reward.")
    rewards, judges = ([named_reward(name) for name in names] for names in (told.reward_funcs, told.eval_reward_funcs))
    lora = LoraConfig(
        r=told.lora_r,
        lora_alpha=told.lora_alpha,
        lora_dropout=told.lora_dropout,
        target_modules=told.lora_target_modules,
    )
    trainer = TRAINERS[method](
        model=load_pipeline() if told.model in EMBEDDED else told.model,
        reward_funcs=rewards,
        args=config,
        train_dataset=load_prompts(told.dataset, told.dataset_config, told.train_split, told.prompt_column),
        eval_dataset=load_prompts(told.dataset, told.dataset_config, told.eval_split, told.prompt_column)
        if told.eval_split
        else None,
        eval_reward_funcs=judges or None,
        peft_config=lora if told.lora_r else None,
    )
    # So that config.yaml can be run again: the trainer knows neither the data set nor the module of a reward.
    trainer.settings |= {name: value for name, value in vars(told).items() if value is not None}
    if told.dataset != "shapes" and not Path(told.dataset).exists():
        trainer.told_for_card["dataset"] = told.dataset
    return trainer


def load_model(name: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline of a Hub id or folder, or the embedded one. Raises `ValueError` for what is none."""
    return load_pipeline() if name in EMBEDDED else families.load(name, dtype, {})


def named_reward(name: str) -> RewardLike:
    """A name as it is; what has a dot as the function that it names."""
    if "." not in name:
        return name
    module, function = name.rsplit(".", 1)
    sys.path.insert(0, "")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The reward {name!r} cannot be imported ({error}): name it as 'module.function'.") from error


def load_prompts(name: str, config: str | None, split: str, column: str) -> Dataset:
    """The prompts of one split; its `column` is called 'prompt' afterwards, in place of one that is."""
    if name != "shapes":
        try:
            dataset = load_dataset(name, config, split=split)
        except (OSError, ValueError, DatasetsError) as error:
            raise ValueError(f"The prompts {name!r}, split {split!r}, cannot be loaded: {error}") from error
        if column not in dataset.column_names:
            raise ValueError(
                f"`prompt_column` is {column!r}, but the columns are {', '.join(dataset.column_names)}: name the one with prompts."
            )
        if column == "prompt":
            return dataset
        return dataset.remove_columns({"prompt"} & set(dataset.column_names)).rename_column(column, "prompt")
    if column != "prompt":
        raise ValueError(
            f"`prompt_column` is {column!r}, but the prompts of shapes have one column, 'prompt': leave it out."
        )
    if split not in ("train", "held_out"):
        raise ValueError(f"The prompts of shapes have no split {split!r}: choose 'train' or 'held_out'.")
    return prompts("train" if split == "train" else "held_out")
