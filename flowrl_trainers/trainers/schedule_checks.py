"""Checks of the schedule of the learning rate and of its options."""

from typing import Any

import torch
from transformers import SchedulerType, get_scheduler

from ..run_folder.identity import WAITS_FOR_METRIC

TRIED_STEPS = 100  # of a schedule that is as long, so that every part of it is met


def check_schedule(config: Any) -> None:
    """Refuse a schedule that could not be made, and settings that the schedule does not read.

    Raises:
        ValueError: For `warmup_steps` and `lr_scheduler_kwargs` beside a schedule that has none, for options that it
            lacks or needs, and for one that follows an evaluation and is not told what is better.
    """
    name = SchedulerType(config.lr_scheduler_type).value
    options = config.lr_scheduler_kwargs or {}
    no_effect = f"has no effect with `lr_scheduler_type` {name!r}: leave it out."
    if name == "constant" and (config.warmup_steps or options):
        raise ValueError(
            "`lr_scheduler_type` 'constant' knows no warm-up and no options: take 'constant_with_warmup' or another."
        )
    if name == "constant_with_warmup" and options:
        raise ValueError(f"`lr_scheduler_kwargs` ({options}) {no_effect}")
    if name in WAITS_FOR_METRIC:
        if config.warmup_steps:
            raise ValueError(f"`warmup_steps` ({config.warmup_steps:g}) {no_effect}")
        if "mode" not in options:
            raise ValueError(
                f"`lr_scheduler_type` {name!r} takes less for better unless told: set `lr_scheduler_kwargs` to "
                "{'mode': 'max'} for a reward."
            )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    warmup = config.get_warmup_steps(TRIED_STEPS)
    try:
        schedule = get_scheduler(name, optimizer, warmup, TRIED_STEPS, scheduler_specific_kwargs=options)
        for _ in range(TRIED_STEPS if name not in WAITS_FOR_METRIC else 0):
            optimizer.step()
            schedule.step()
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"`lr_scheduler_type` {name!r} does not go with `lr_scheduler_kwargs` ({options}): {error}."
        ) from error
