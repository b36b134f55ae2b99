"""`flowrl estimate METHOD`."""

import json
from collections.abc import Collection
from typing import Any

from ..cost.estimate import Estimate
from ..cost.rewards import blank_reward, is_counted
from ..cost.run import estimates_of_run
from ..cost.table import table
from ..trainers import FlowRLConfig
from ..trainers.base_trainer import pipeline_settings
from .adapter import lora_fields, make_lora_config
from .arguments import TRAINERS, RunArguments
from .estimate_arguments import EstimateArguments
from .parser import SettingsParser

USAGE = (
    "flowrl estimate {method} --config run.yaml [--gpu h100] [--num_processes N] [--accelerate_config fsdp2] [--json] "
    "[--field value ...]"
)
PROCESSES = ("--num_processes", "--num-processes")


def estimate(arguments: list[str]) -> None:
    """Print what a run will cost one process, from its configuration alone: nothing is loaded or downloaded.

    Args:
        arguments: The name of the method, then the flags.

    Raises:
        ValueError: If there is no such method, or a setting is unknown or wrong.
    """
    method, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if method in ("-h", "--help"):
        print(f"usage: {USAGE.format(method='METHOD')}\n\nMETHOD is one of {', '.join(TRAINERS)}.")
        print("`flowrl estimate METHOD --help` explains the settings.")
        return
    if method not in TRAINERS:
        raise ValueError(f"`flowrl estimate` needs a method before its flags: one of {', '.join(TRAINERS)}.")
    asked, run, config = _parse(method, rest)
    shared_by = asked.num_processes if asked.accelerate_config == "fsdp2" else 1
    found, not_counted = estimate_run(method, run, config, shared_by, asked.latent_rewards)
    if asked.json:
        print(json.dumps(found.to_dict() | {"not_counted": not_counted}, indent=2))
    else:
        print(table(found, asked.gpu, not_counted))


def _parse(method: str, arguments: list[str]) -> tuple[EstimateArguments, RunArguments, FlowRLConfig]:
    processes = _number_of_processes(arguments)
    classes = [EstimateArguments, RunArguments, read_anywhere(TRAINERS[method].config_class, processes)]
    parser = SettingsParser(
        classes, prog=f"flowrl estimate {method}", usage=USAGE.format(method=method), allow_abbrev=False
    )
    asked, run, config = parser.read(arguments)
    if asked.num_processes != processes:
        raise ValueError("`num_processes` must be given on the command line, as it is to `flowrl METHOD`.")
    return asked, run, config


def _number_of_processes(arguments: list[str]) -> int:
    """What follows `--num_processes`: the settings cannot be read without it, as images per update depend on it."""
    parts = [part for argument in arguments for part in _split(argument)]
    named = [place for place, part in enumerate(parts) if part in PROCESSES]
    if not named:
        return 1
    value = [*parts, ""][named[0] + 1]
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"`--num_processes` ({value!r}) must be a whole number from 1 on.")
    return int(value)


def _split(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.partition("=")[0] in PROCESSES else [argument]


def read_anywhere(config_class: type[FlowRLConfig], processes: int) -> type[FlowRLConfig]:
    """The class of settings as it reads on a machine with so many GPUs, whatever this one has.

    Args:
        config_class: That of a method.
        processes: The number of processes of the run.
    """

    class Elsewhere(config_class):  # type: ignore[misc, valid-type]  # a class that is passed
        world_size = processes

        def __post_init__(self) -> None:
            settings: Any = self
            half, settings.fp16 = settings.fp16, False  # which a CPU refuses
            settings.use_cpu, settings.tf32 = True, None
            super().__post_init__()
            settings.fp16 = half

    Elsewhere.__name__ = config_class.__name__
    return Elsewhere


def estimate_run(
    method: str, run: RunArguments, config: FlowRLConfig, shared_by: int = 1, latent_rewards: Collection[str] = ()
) -> tuple[Estimate, list[str]]:
    """What a run costs one process, and the names of rewards whose cost is not known.

    Args:
        method: A key of `TRAINERS`.
        run: The settings of the command line.
        config: Those of the trainer.
        shared_by: The processes over which FSDP2 spreads the network; 1 leaves it whole.
        latent_rewards: The names of rewards that see latents.

    Raises:
        ValueError: For such a name that the run does not have.
    """
    names = [*run.reward_funcs, *run.eval_reward_funcs]
    for name in latent_rewards:
        if name not in names:
            raise ValueError(
                f"`latent_rewards` names {name!r}, which is no reward of the run: name one of "
                f"{', '.join(names) or 'those of `reward_funcs`'}."
            )
    rewards, judges = (
        [blank_reward(name, sees="latents" if name in latent_rewards else "images") for name in listed]
        for listed in (run.reward_funcs, run.eval_reward_funcs)
    )
    lora = make_lora_config(
        run.lora_r, run.lora_alpha, run.lora_dropout, run.lora_target_modules, lora_fields(run.lora_config or {})
    )
    (found,) = estimates_of_run(
        config,
        run.model,
        pipeline_settings(config),
        lora if run.lora_r else None,
        rewards,
        judges,
        evaluates=run.eval_split is not None or run.eval_dataset is not None,
        shared_by=[shared_by],
    )
    not_counted = [name for name in names if not is_counted(name)]
    return found, not_counted
