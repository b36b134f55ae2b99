"""`flowrl METHOD`: one run from the command line."""

from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from diffusers import DiffusionPipeline

from ..pipelines import families
from ..rewards.named import refuse_unknown_names
from ..run_folder.card import SHAPES
from ..run_folder.checkpoints import refuse_nothing_to_resume
from ..run_folder.earlier_run import models_of_a_run, refuse_earlier_run
from ..sampling.prompt_sources import is_prompt_file, read_prompt_file, refuse_blank_prompts
from ..shapes import load_pipeline, prompts
from ..trainers import FlowRLConfig, FlowRLTrainer
from .adapter import lora_fields, make_lora_config
from .arguments import TRAINERS, RunArguments, parse
from .named_reward import named_reward

EMBEDDED = ("shapes", SHAPES)


def run(method: str, arguments: list[str]) -> None:
    """Train, evaluate if there are held-out prompts, save, and push if `push_to_hub` is set.

    Args:
        method: A key of `TRAINERS`.
        arguments: The flags of the command.

    Raises:
        ValueError: If a setting is unknown or wrong.
    """
    args, config = parse(method, TRAINERS[method].config_class, arguments, {})
    output_dir, asked = Path(str(config.output_dir)), config.resume_from_checkpoint
    resume = True if asked in ("true", "True") else asked
    if resume:  # `train` refuses these too, but after the model is loaded
        refuse_nothing_to_resume(output_dir, resume)
    elif not config.overwrite_output_dir:
        refuse_earlier_run(output_dir, models_of_a_run(output_dir))
    trainer = make_trainer(method, args, config)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(_internal_call=True)  # before anything else can fail
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero() and config.log_level not in ("error", "critical"):
        print(f"The tuned model is in {trainer.run_folder.path}/: README.md there tells how to use it.")
        if trainer.eval_dataset is None:
            print("Nothing was measured on held-out prompts: name some as `eval_dataset` or `eval_split`.")


def make_trainer(method: str, args: RunArguments, config: FlowRLConfig) -> FlowRLTrainer:
    """The trainer that the settings describe.

    Args:
        method: A key of `TRAINERS`.
        args: The settings of the command line.
        config: The settings of the trainer.
    """
    if not args.reward_funcs:
        raise ValueError("`reward_funcs` is empty: name at least one reward.")
    rewards, judges = ([named_reward(name) for name in names] for names in (args.reward_funcs, args.eval_reward_funcs))
    refuse_unknown_names(rewards, "reward_funcs")
    refuse_unknown_names(judges, "eval_reward_funcs")
    further = lora_fields(args.lora_config or {})
    lora = make_lora_config(args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target_modules, further)
    train_dataset = load_prompts(args.dataset, args.dataset_config, args.train_split, args.prompt_column)
    eval_dataset = _held_out(args)
    trainer = TRAINERS[method](
        model=load_pipeline() if args.model in EMBEDDED else args.model,
        reward_funcs=rewards,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        eval_reward_funcs=judges or None,
        peft_config=lora if args.lora_r else None,
    )
    # For config.yaml, which can be run again: the trainer knows neither the data set nor the module of a reward.
    trainer.settings |= {name: value for name, value in vars(args).items() if value is not None}
    if args.dataset != "shapes" and not is_prompt_file(args.dataset) and not Path(args.dataset).exists():
        trainer.told_for_card["dataset"] = args.dataset
    if args.license is not None:
        trainer.told_for_card["licence"] = {"license": args.license}
    trainer.told_for_card["command"] = f"flowrl {method} --config config.yaml --output_dir another-folder"
    return trainer


def _held_out(args: RunArguments) -> Dataset | None:
    """The prompts of evaluations, if the settings name some."""
    name, split = args.eval_dataset or args.dataset, args.eval_split
    if split is None and args.eval_dataset is not None:
        if not is_prompt_file(name):
            raise ValueError(f"`eval_dataset` is {name!r}: name its split with held-out prompts as `eval_split`.")
        split = "train"
    if split is None:
        return None
    # A file has no configuration, and a text file no column but 'prompt', whatever training's prompts have.
    of_its_own = args.eval_dataset is not None and is_prompt_file(name)
    column = "prompt" if of_its_own and Path(name).suffix.lower() == ".txt" else args.prompt_column
    return load_prompts(name, None if of_its_own else args.dataset_config, split, column)


def load_model(name: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline of a Hub id or folder, or the embedded one. Raises `ValueError` if there is no pipeline."""
    return load_pipeline() if name in EMBEDDED else families.load(name, families.Loading(dtype), {})


def load_prompts(name: str, config: str | None, split: str, column: str) -> Dataset:
    """The prompts of one split, in the column 'prompt'.

    Args:
        name: A file, a data set of the Hub, a folder, or 'shapes'.
        config: The configuration of the data set, where it has several.
        split: The split.
        column: The column that holds the prompts. It is renamed to 'prompt', and replaces a column of that name.

    Raises:
        ValueError: If the data set cannot be loaded, or has no such split or column.
    """
    if name != "shapes":
        if is_prompt_file(name):
            dataset = _rows_of_file(name, config, split, column)
        else:
            try:
                dataset = load_dataset(name, config, split=split)
            except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: a loading script
                raise ValueError(f"The prompts {name!r}, split {split!r}, cannot be loaded: {error}") from error
        if column not in dataset.column_names:
            columns = ", ".join(dataset.column_names)
            raise ValueError(
                f"`prompt_column` is {column!r}, but the columns are {columns}: name the one with prompts."
            )
        if column != "prompt":
            dataset = dataset.remove_columns({"prompt"} & set(dataset.column_names)).rename_column(column, "prompt")
        return refuse_blank_prompts(dataset, name) if is_prompt_file(name) else dataset
    if column != "prompt":
        raise ValueError(
            f"`prompt_column` is {column!r}, but the prompts of shapes have one column, 'prompt': leave it out."
        )
    if split not in ("train", "held_out"):
        raise ValueError(f"The prompts of shapes have no split {split!r}: choose 'train' or 'held_out'.")
    return prompts("train" if split == "train" else "held_out")


def _rows_of_file(name: str, config: str | None, split: str, column: str) -> Dataset:
    if split != "train":
        raise ValueError(
            f"The prompts {name!r} have no split {split!r}, as a file is one split, 'train': give held-out prompts as "
            "a second file, `eval_dataset`."
        )
    if config is not None:
        raise ValueError(f"`dataset_config` is {config!r}, but the prompts {name!r} are a file: leave it out.")
    return read_prompt_file(name, column)
