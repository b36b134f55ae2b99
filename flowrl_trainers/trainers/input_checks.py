"""What is refused before anything is loaded, in one sentence each."""

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback

from ..pipelines import FlowPipeline
from ..pipelines.quantization import check_quantization
from ..rewards import Reward
from ..rewards.base import PASSED, check_call
from ..rewards.shapes import checker_among
from ..sampling.prompt_sources import PromptSource, prompts_of
from .base_config import FlowRLConfig


def check_args(args: Any, config_class: type[FlowRLConfig]) -> None:
    """Raises `TypeError` for what is not the configuration of this trainer, and `ValueError` as making one does.

    Its fields may have been set since it was made, which nobody checked.
    """
    if not isinstance(args, config_class):
        kind = type(args).__name__
        raise TypeError(
            f"`args` is a {kind}: pass a `{config_class.__name__}`, which has the settings of this trainer."
        )
    replace(args)


def check_weights(model: Any, args: FlowRLConfig) -> None:
    """Refuse a quantisation that cannot be had.

    Args:
        model: A Hub id or folder, or what is loaded already.
        args: The configuration.

    Raises:
        ValueError: For a model that is loaded, and for what this machine does not have.
    """
    names = {name: getattr(args, name) for name in ("quantization", "text_encoder_quantization")}
    for name, value in names.items():
        if value is not None and not isinstance(model, (str, Path)):
            raise ValueError(
                f"`{name}` ({value!r}) says how a model is loaded, but `model` is a {type(model).__name__}, which is: "
                "pass its Hub id or folder, or quantise it yourself and leave the setting out."
            )
    check_quantization(names, args.device)


def check_trained_part(args: FlowRLConfig, *, has_adapter: bool) -> None:
    """Refuse settings that have no effect, or none that is meant, with an adapter or without one.

    Args:
        args: The configuration.
        has_adapter: Whether a LoRA is trained; else all weights are.

    Raises:
        ValueError: Naming the setting.
    """
    if has_adapter and args.frozen_copy != "float32":
        raise ValueError(
            f"`frozen_copy` ({args.frozen_copy!r}) has no effect with a LoRA, whose base model is the network itself: "
            "leave it out."
        )
    if not has_adapter and args.quantization is not None:
        raise ValueError(
            f"`quantization` is {args.quantization!r}, but all weights would be trained, and small steps of quantised "
            "ones are lost: pass a `peft.LoraConfig` (`lora_r` of 1 or more), or leave `quantization` out."
        )
    if not has_adapter and args.merge_adapter:
        raise ValueError("`merge_adapter` is True, but no adapter is trained: leave it out, or pass `peft_config`.")


def encoding_facts(flow: FlowPipeline) -> dict[str, Any]:
    """`FlowPipeline.encoding_facts`, for a run that keeps its encoded prompts.

    Raises:
        ValueError: For a model without text encoders, and for one that does not say what its encoding follows from.
    """
    if not flow.text_encoders():
        raise ValueError("`cache_encoded_prompts` is True, but this model has no text encoders: leave it out.")
    facts = flow.encoding_facts()
    if facts is None:
        raise ValueError(
            f"`cache_encoded_prompts` is True, but {type(flow).__name__} does not say what its encoded prompts follow "
            "from: override `encoding_facts`, or leave it out."
        )
    return facts


def writable_folder(path: str | PathLike[str], argument: str = "output_dir") -> Path:
    """A folder to write into, made where there was none.

    Args:
        path: Of the folder.
        argument: What the caller calls it.

    Raises:
        TypeError: For anything but a path.
        ValueError: Where nothing can be written.
    """
    if not isinstance(path, (str, PathLike)):
        raise TypeError(f"`{argument}` ({path!r}) must be a path.")
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
    except OSError as error:
        raise ValueError(
            f"`{argument}` ({path}) cannot be written to ({error.strerror}): choose another folder."
        ) from error
    return folder


def check_rewards(rewards: list[Reward], args: FlowRLConfig, needs_gradient: str | None) -> None:
    """Check that the rewards fit the trainer and their weights.

    Args:
        rewards: Those of training.
        args: The configuration.
        needs_gradient: The name of a trainer that differentiates rewards, or None.

    Raises:
        ValueError: For weights that do not fit, and for a black box where gradients are needed.
    """
    for reward in rewards:
        if needs_gradient is not None and not reward.differentiable:
            raise ValueError(
                f"Reward {reward.name!r} is not differentiable, which {needs_gradient} needs: take `ACFlowTrainer`, "
                "`DiffusionNFTTrainer` or `TAFSGRPOTrainer`, or mark it with "
                "`@flowrl_trainers.rewards.differentiable` if gradients flow "
                "through it."
            )
        if reward.groupwise and needs_gradient is not None:
            raise ValueError(
                f"Reward {reward.name!r} is groupwise, and {needs_gradient} takes the gradient of each picture by "
                "itself: take `ACFlowTrainer`, `DiffusionNFTTrainer` or `TAFSGRPOTrainer`."
            )
        if reward.groupwise and args.num_generations == 1:
            raise ValueError(
                f"Reward {reward.name!r} is groupwise, which compares the pictures of a prompt, but `num_generations` "
                "is 1: make it 2 or more."
            )
    if args.reward_weights is not None and len(args.reward_weights) != len(rewards):
        raise ValueError(
            f"`reward_weights` has {len(args.reward_weights)} numbers for {len(rewards)} rewards: pass one per reward."
        )


def refuse_shared_names(rewards: Iterable[Reward], judges: Iterable[Reward]) -> None:
    """Raises `ValueError` for a judge that has the name of a reward of training, as evaluations have both by name."""
    trained = {reward.name for reward in rewards}
    for judge in judges:
        if judge.name in trained:
            raise ValueError(
                f"`eval_reward_funcs` has a reward called {judge.name!r}, as `reward_funcs` has: leave it out, as "
                "evaluations have the rewards of training too, or give it another name by a dictionary from names to "
                "rewards."
            )


def without_groups(rewards: Iterable[Reward]) -> list[Reward]:
    """Those that score each picture by itself, as evaluations need it."""
    return [reward for reward in rewards if not reward.groupwise]


def check_best_metric(
    args: FlowRLConfig, rewards: list[Reward], noted: Iterable[str] | None = None, samplers: Iterable[str] = ()
) -> None:
    """Check that evaluations report what the best checkpoint is chosen by.

    The loss, which Trainer takes by default, is none of it; nor is diversity, which is absent from an evaluation in
    which no prompt has two pictures that count.

    Args:
        args: The configuration.
        rewards: Those of training and those that it never sees.
        noted: The names that rewards log themselves; None while they are not known.
        samplers: Those of `evaluation_samplers`, whose rows have names of their own; not while `noted` is None.

    Raises:
        ValueError: For a name that evaluations lack, a direction that a reward's weight contradicts, and
            `save_strategy="best"` without evaluations.
    """
    if args.save_strategy == "best" and args.eval_strategy == "no":
        raise ValueError(
            "`save_strategy` is 'best', but `eval_strategy` is 'no', so that nothing would ever be saved: set "
            "`eval_strategy` to 'steps' and `eval_steps`."
        )
    name = (args.metric_for_best_model or "").removeprefix("eval_")
    judges = without_groups(rewards)
    known = [f"reward/{r.name}" for r in judges]
    of_every_row = {*known, "edge_density", "colour_entropy", *(noted or ())}
    of_every_row |= set() if checker_among(judges) is None else {"checker_accuracy"}
    rows = ["", *(f"{sampler}_" for sampler in samplers if sampler)]
    measured = {f"{base}{row}{metric}" for base in ("", "base_") for row in rows for metric in of_every_row}
    measured.add("velocity_distance")
    plain = name.removeprefix("base_")
    known_now = plain.startswith("reward") or plain in ("loss", "diversity", "checker_accuracy", "velocity_distance")
    perhaps_noted = noted is None and not known_now
    if name and not perhaps_noted and name not in measured:
        raise ValueError(
            f"`metric_for_best_model` is {args.metric_for_best_model!r}, which evaluations do not have, or not each "
            f"of them: choose {', '.join(known)}, or another name that `evaluate` returns."
        )
    for reward, weight in zip(rewards, args.reward_weights or [], strict=False):
        if name.removeprefix("ode_") == f"reward/{reward.name}" and weight < 0 and args.greater_is_better:
            raise ValueError(
                f"`greater_is_better` is True for {reward.name!r}, which a weight of {weight:g} lowers: set it to "
                "False."
            )


def check_callbacks(callbacks: Any, args: FlowRLConfig) -> None:
    """Check that callbacks are such, and that one that ends training early has a number to watch.

    Raises:
        TypeError: For what is no list, and for what is neither a `TrainerCallback` nor a class of them.
        ValueError: For an `EarlyStoppingCallback` without `metric_for_best_model` or evaluations.
    """
    if not isinstance(callbacks, (list, tuple)):
        raise TypeError(f"`callbacks` is {callbacks!r}: pass a list of `transformers.TrainerCallback`s.")
    for callback in callbacks:
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise TypeError(f"`callbacks` holds {callback!r}: pass `transformers.TrainerCallback`s.")
        if issubclass(kind, EarlyStoppingCallback):
            for name, value in (
                ("metric_for_best_model", args.metric_for_best_model),
                ("eval_strategy", args.eval_strategy != "no"),
            ):
                if not value:
                    raise ValueError(f"An `EarlyStoppingCallback` needs `{name}`: set it.")


def check_optimizers(optimizers: Any) -> None:
    """Raises `TypeError` for anything but an optimizer and a schedule, or None for one that Trainer makes."""
    pair = optimizers if isinstance(optimizers, tuple) and len(optimizers) == 2 else ()
    kinds = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
    if not pair or not all(part is None or isinstance(part, kind) for part, kind in zip(pair, kinds, strict=True)):
        raise TypeError(
            f"`optimizers` is {type(optimizers).__name__ if not isinstance(optimizers, tuple) else optimizers}: pass "
            "the pair (optimizer, schedule of the learning rate), with None for what Trainer is to make."
        )


def check_columns(rewards: list[Reward], dataset: Dataset, argument: str, others: Iterable[Reward] = ()) -> None:
    """Refuse a reward that asks for a column which the dataset lacks, prompts that choose an unknown reward, and rows
    that a reward could not score.

    Args:
        rewards: Those that are called with the dataset's rows.
        dataset: With its columns.
        argument: What the caller calls it.
        others: Those that rows may choose too, though they are not called here.

    Raises:
        ValueError: Naming reward and column, also where the reward takes no further columns, or what is wrong with a
            row.
    """
    for reward in rewards:
        missing = [name for name in reward.needed_columns() if name not in dataset.column_names]
        if missing:
            raise ValueError(
                f"Reward {reward.name!r} needs the column {missing[0]!r}, which `{argument}` lacks (it has "
                f"{', '.join(map(repr, dataset.column_names))}): add it, or give the reward's argument a default."
            )
        check_call(reward, set(dataset.column_names) - {"prompt"})
    for column in {reward.chosen_by for reward in rewards if reward.chosen_by is not None}:
        known = {reward.name: reward for reward in [*rewards, *others]}
        names = [name for name, reward in known.items() if reward.chosen_by == column]
        _check_choices(column, names, dataset, argument)
    for reward in rewards:
        reward.check_rows(_rows_of(reward, dataset))


def can_take(reward: Reward, columns: set[str]) -> bool:
    """Whether a reward can be called with rows of these columns, all of which it is given."""
    try:
        check_call(reward, columns - {"prompt"})
    except ValueError:
        return False
    return columns.issuperset(reward.needed_columns())


def _rows_of(reward: Reward, dataset: Dataset) -> Dataset:
    """Those that a reward applies to."""
    if reward.chosen_by is None:
        return dataset
    choices = dataset[reward.chosen_by]
    return dataset.select([row for row, names in enumerate(choices) if names is None or reward.name in names])


def _check_choices(column: str, names: list[str], dataset: Dataset, argument: str) -> None:
    """Refuse a data set whose rows do not choose among rewards.

    Args:
        column: The setting `rewards_column`.
        names: Those of the rewards.
        dataset: With its columns.
        argument: What the caller calls it.

    Raises:
        ValueError: For a missing column, a value that is no list of names, and an empty one.
    """
    if column not in dataset.column_names:
        raise ValueError(f"`rewards_column` is {column!r}, a column that `{argument}` lacks: add it.")
    for row, listed in enumerate(dataset[column]):
        if listed is not None and (not isinstance(listed, list) or not listed or set(listed) - set(names)):
            raise ValueError(
                f"Row {row} of `{argument}` has {listed!r} in its column {column!r}: list one or more of "
                f"{', '.join(names)}, or leave it None for all."
            )


def check_dataset(source: PromptSource | None, argument: str, args: FlowRLConfig | None = None) -> Dataset:
    """The rows of a source of prompts; with `args`, enough of them for a rollout. Raises `ValueError` otherwise."""
    dataset = prompts_of(source, argument)
    if "prompt" not in dataset.column_names:
        columns = " and ".join(repr(c) for c in dataset.column_names) or "no column"
        example = (
            f": pass `{argument}.rename_column({dataset.column_names[0]!r}, 'prompt')`" if dataset.column_names else ""
        )
        raise ValueError(f"`{argument}` has {columns} but no 'prompt'{example}.")
    taken = sorted({*PASSED, "self"} & set(dataset.column_names))
    if taken:
        raise ValueError(
            f"`{argument}` has a column {taken[0]!r}, which is what rewards are told under that name: rename it."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{argument}` is empty: it needs at least one prompt.")
    wrong = next((row for row, prompt in enumerate(dataset["prompt"]) if not isinstance(prompt, str)), None)
    if wrong is not None:
        raise ValueError(
            f"`{argument}` has a prompt that is no string in row {wrong} ({dataset['prompt'][wrong]!r}): make every "
            "prompt one."
        )
    if args is not None:
        needed = args.images_per_rollout // args.num_generations
        if len(dataset) < needed:
            raise ValueError(
                f"`{argument}` has {len(dataset)} prompts but one rollout takes {needed}: pass more prompts, lower "
                "`per_device_train_batch_size` or `gradient_accumulation_steps`, or raise `num_generations`, the "
                "images per prompt."
            )
    return dataset
