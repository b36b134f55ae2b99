"""`flowrl estimate METHOD`."""

import json
from typing import Any

import torch

from ..cost import Drawing
from ..cost.architectures import find
from ..cost.estimate import Estimate, Estimator, encoding
from ..cost.rewards import blank_reward, is_counted
from ..cost.table import table
from ..sampling.scoring import MEGAPIXEL
from ..trainers import FlowRLConfig
from ..trainers.base_trainer import PIPELINE_SETTINGS
from .adapter import lora_fields, make_lora_config
from .arguments import TRAINERS, RunArguments
from .estimate_arguments import EstimateArguments
from .parser import SettingsParser


def estimate(arguments: list[str]) -> None:
    """Print what a run will cost one process, from its configuration alone: nothing is loaded or downloaded.

    Args:
        arguments: The name of the method, then the flags.

    Raises:
        ValueError: If there is no such method, or a setting is unknown or wrong.
    """
    method, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if method not in TRAINERS:
        raise ValueError(f"`flowrl estimate` needs a method before its flags: one of {', '.join(TRAINERS)}.")
    asked, run, config = _parse(method, rest)
    found, not_counted = estimate_run(method, run, config)
    if asked.json:
        print(json.dumps(found.to_dict() | {"not_counted": not_counted}, indent=2))
    else:
        print(table(found, asked.gpu, not_counted))


def _parse(method: str, arguments: list[str]) -> tuple[EstimateArguments, RunArguments, FlowRLConfig]:
    processes = _number_of_processes(arguments)
    usage = f"flowrl estimate {method} --config run.yaml [--gpu h100] [--num_processes N] [--json] [--field value ...]"
    classes = [EstimateArguments, RunArguments, read_anywhere(TRAINERS[method].config_class, processes)]
    parser = SettingsParser(classes, prog=f"flowrl estimate {method}", usage=usage, allow_abbrev=False)
    asked, run, config = parser.read(arguments)
    if asked.num_processes != processes:
        raise ValueError("`num_processes` must be given on the command line, as it is to `flowrl METHOD`.")
    return asked, run, config


def _number_of_processes(arguments: list[str]) -> int:
    """What follows `--num_processes`: the settings cannot be read without it, as images per update depend on it."""
    if "--num_processes" not in arguments:
        return 1
    (value,) = [*arguments, ""][arguments.index("--num_processes") + 1 :][:1]
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"`--num_processes` ({value!r}) must be a whole number from 1 on.")
    return int(value)


NOT_COUNTED = ("rollout_batch_size", "guidance_in_one_call", "critic_bins_in_one_call", "prefix_pool_size")
"""Settings that change the number or the size of calls, which the configurations do not state yet."""


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


def estimate_run(method: str, run: RunArguments, config: FlowRLConfig) -> tuple[Estimate, list[str]]:
    """What a run costs one process, and the names of rewards whose cost is not known.

    Args:
        method: A key of `TRAINERS`.
        run: The settings of the command line.
        config: Those of the trainer.
    """
    for name in NOT_COUNTED:
        if config.to_dict().get(name):
            raise ValueError(
                f"`{name}` is not counted yet: leave it out, for an estimate of the same run with other calls."
            )
    half = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
    architecture = find(run.model)
    settings = {name: getattr(config, name) for name in PIPELINE_SETTINGS if getattr(config, name) is not None}
    flow: Any = architecture.flow(half or torch.float32, settings)
    drawing = Drawing(flow.guided, max(1, MEGAPIXEL // (flow.settings["height"] * flow.settings["width"])))
    lora = make_lora_config(
        run.lora_r, run.lora_alpha, run.lora_dropout, run.lora_target_modules, lora_fields(run.lora_config or {})
    )
    estimator = Estimator(
        flow,
        [blank_reward(name) for name in run.reward_funcs],
        lora if run.lora_r else None,
        autocast=half,
        head=config.head_kind,
        checkpointing=bool(config.activation_checkpointing),
        encoder_dtype=half or torch.float32,
        judges=[blank_reward(name) for name in run.eval_reward_funcs],
        quantization=config.quantization,
        copy_as_loaded=config.frozen_copy == "as_loaded",
        apart=config.offload_between_phases,
    )
    evaluates = run.eval_split is not None or run.eval_dataset is not None
    images = config.per_device_train_batch_size * config.micro_steps_per_rollout
    found = estimator.estimate(
        config.calls(drawing),
        config.evaluation_calls(drawing) if evaluates else [],
        config.updates_on_rollout,
        config.latents_kept * images,
    )
    not_counted = [name for name in (*run.reward_funcs, *run.eval_reward_funcs) if not is_counted(name)]
    encoders = encoding(architecture, half or torch.float32, config.text_encoder_quantization)
    return found.after(encoders), not_counted
