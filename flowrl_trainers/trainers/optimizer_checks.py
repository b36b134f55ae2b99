"""Checks of `optim` and of the settings that only some optimizers read."""

import math
from typing import Any

import torch
from transformers import Trainer
from transformers.utils import is_bitsandbytes_available

from ..sampling.sharding import asks_for_sharding
from ..suggestions import did_you_mean

# What `optim_args` may hold for an optimizer, as transformers reads it; but for `weight_decay`, as that of the
# parameter groups, which is the setting of that name, comes before it.
_ADEMAMIX = ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")
OF_TORCH: dict[str, tuple[str, ...]] = {
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "adafactor": (),
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
}
OF_BITSANDBYTES: dict[str, tuple[str, ...]] = {
    "adamw_8bit": (),
    "adamw_bnb_8bit": (),
    "paged_adamw_32bit": (),
    "paged_adamw_8bit": (),
    "lion_32bit": (),
    "lion_8bit": (),
    "paged_lion_32bit": (),
    "paged_lion_8bit": (),
    "ademamix": _ADEMAMIX,
    "ademamix_8bit": _ADEMAMIX,
    "paged_ademamix_32bit": _ADEMAMIX,
    "paged_ademamix_8bit": _ADEMAMIX,
}
SWITCHES = ("nesterov", "centered")
NO_BETAS = ("adafactor", "sgd", "adagrad", "rmsprop")


def check_optimizer(config: Any) -> None:
    """Refuse an optimizer that does not work here, and settings that the optimizer does not read.

    Raises:
        ValueError: For an `optim` that is unknown, needs more than gradients, is not installed or cannot be sharded,
            for an `optim_args` that is not written `name=value,name=value`, or that the optimizer does not read or
            cannot take, and
            for `adam_beta1`, `adam_beta2` or `adam_epsilon` beside an optimizer that has none.
    """
    optim = str(getattr(config.optim, "value", config.optim))
    if optim not in OF_TORCH | OF_BITSANDBYTES:
        raise ValueError(
            f"`optim` is {optim!r}, which is not supported here: choose one of {', '.join(OF_TORCH)}, or of "
            f"bitsandbytes such as 'adamw_8bit'{did_you_mean([optim], OF_TORCH | OF_BITSANDBYTES)}."
        )
    if optim in OF_BITSANDBYTES and not is_bitsandbytes_available():
        raise ValueError(f"`optim` is {optim!r}, which needs bitsandbytes: install it, or take 'adamw_torch'.")
    if optim in OF_BITSANDBYTES and asks_for_sharding():
        raise ValueError(
            f"`optim` is {optim!r}, but bitsandbytes cannot step weights that FSDP2 has split: take 'adamw_torch', of "
            "whose state each process holds its share, or `--accelerate_config ddp`."
        )
    readable = (OF_TORCH | OF_BITSANDBYTES)[optim]
    for part in (config.optim_args or "").replace(" ", "").split(",") if config.optim_args else ():
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise ValueError(
                f"`optim_args` ({config.optim_args!r}) must be written as 'momentum=0.9,nesterov=true': {part!r} is "
                "no name with a value."
            )
        if name not in readable:
            reads = f"reads {', '.join(readable)}" if readable else "reads none"
            if name == "weight_decay":
                reads += " and the setting `weight_decay`"
            raise ValueError(f"`optim_args` names {name!r}, but `optim` {optim!r} {reads}: take it out.")
        try:
            fits = value.lower() in ("true", "false") if name in SWITCHES else math.isfinite(float(value))
        except ValueError:
            fits = False
        if not fits:
            kind = "true or false" if name in SWITCHES else "a number"
            raise ValueError(f"`optim_args` sets {name!r} to {value!r}: make it {kind}.")
    if config.optim_args and optim in OF_TORCH:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(config)
        try:
            kind([torch.zeros(1, requires_grad=True)], **settings)
        except ValueError as error:
            raise ValueError(f"`optim` {optim!r} refuses `optim_args` ({config.optim_args!r}): {error}.") from error
    unread = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8} if optim in NO_BETAS else {}
    if "lion" in optim:
        unread = {"adam_epsilon": 1e-8}
    for name, default in unread.items():
        if getattr(config, name) != default:
            raise ValueError(f"`{name}` ({getattr(config, name)}) has no effect with `optim` {optim!r}: take it out.")
