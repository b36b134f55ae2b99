"""What of the transformer is trained: a LoRA is made, continued or refused, or all weights are."""

import copy
import math
import re
from dataclasses import fields
from typing import Annotated, Any

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..pipelines import FlowPipeline
from ..pipelines.quantization import is_quantized
from .config_checks import Range, complaint, fits

SUPPORTED = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "target_modules",
    "exclude_modules", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
    "lora_bias",
)  # fmt: skip
ALLOWED: dict[str, Any] = {
    "r": Annotated[int, Range(at_least=1)],
    "lora_alpha": Annotated[float, Range(above=0)],
    "lora_dropout": Annotated[float, Range(at_least=0, below=1)],
    "use_rslora": bool,
    "use_dora": bool,
    "lora_bias": bool,
}  # of the fields of which peft takes anything, or fails where it makes the layers
DESCRIPTIVE = ("task_type", "auto_mapping", "peft_type", "peft_version", "base_model_name_or_path", "revision")
COMPILED = "_orig_mod"  # how `torch.compile` names the module that it wraps


def check_lora_config(config: LoraConfig) -> None:
    """Check what of a LoRA can be checked without the model.

    Raises:
        TypeError: For a configuration of another kind of adapter.
        ValueError: For a number out of its range, and for one that changes the base model, or that stock diffusers
            could not load again.
    """
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise TypeError(
            f"`peft_config` is a {type(config).__name__}: pass a `peft.LoraConfig`, the kind of adapter that "
            "diffusers saves and loads."
        )
    for name, allowed in ALLOWED.items():
        value = getattr(config, name)
        if not fits(value, allowed):
            raise ValueError(f"`peft_config.{name}` {complaint(value, allowed)}.")
    _refuse_change_of_base(config)
    _refuse_what_is_not_supported(config)


def prepare_adapter(flow: FlowPipeline, config: LoraConfig | None) -> LoraConfig | None:
    """Make the parameters that are to be trained trainable, in float32; all others are frozen.

    Args:
        flow: The pipeline, whose transformer is changed.
        config: Of the LoRA to make, as `check_lora_config` allows it; None to train the adapter that the pipeline
            carries or, without one, all weights.

    Returns:
        The configuration of the adapter that is trained, if any.

    Raises:
        ValueError: For an adapter that training could not keep apart from the base model, or save; for what was left
            of one; for a compiled network, and for one that peft has wrapped.
    """
    if any(_carries_adapter(encoder) for encoder in flow.text_encoders()):
        raise ValueError(
            "A text encoder of the pipeline carries a LoRA, which training would use and its file would not keep: "
            "call `pipeline.fuse_lora()` and `pipeline.unload_lora_weights()` first, or load the transformer's part "
            "alone."
        )
    transformer: Any = flow.transformer
    if COMPILED in dict(transformer.named_children()):
        raise ValueError(
            "The pipeline's transformer is compiled (`torch.compile`), and an adapter would change what was compiled: "
            "pass the pipeline as it is before compilation."
        )
    if isinstance(transformer, PeftModel):
        raise ValueError(
            "The pipeline's transformer is a `PeftModel`, whose adapter diffusers cannot save: pass the pipeline with "
            "its plain network and the LoRA as `peft_config`, or attach it by `pipeline.transformer.add_adapter`."
        )
    _refuse_remains(transformer)
    if config is not None:
        return _made(flow, config)
    if _carries_adapter(transformer):
        return _continued(transformer)
    if is_quantized(transformer):
        raise ValueError(
            "All weights would be trained, as there is no `peft_config`, but those of the transformer are quantised, "
            "in which small steps are lost: pass a `peft.LoraConfig`, or load the model without `quantization`."
        )
    transformer.requires_grad_(True)
    cast_training_params(transformer, dtype=torch.float32)
    return None


def _carries_adapter(network: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in network.modules())


def _refuse_remains(transformer: nn.Module) -> None:
    """Raises `ValueError` for a LoRA that was fused or deleted, but whose layers still stand in the network."""
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    if any(not layer.active_adapters for layer in layers):
        raise ValueError(
            "The pipeline's transformer still has the layers of a LoRA that was deleted: call "
            "`pipeline.unload_lora_weights()`, which takes them out."
        )
    if any(layer.merged for layer in layers):
        raise ValueError(
            "The pipeline's LoRA is fused into the transformer (`fuse_lora`), where it cannot be trained: call "
            "`pipeline.unload_lora_weights()` to keep it as a part of the base model, or `pipeline.unfuse_lora()` to "
            "train it further."
        )


def _made(flow: FlowPipeline, config: LoraConfig) -> LoraConfig:
    transformer = flow.transformer
    if _carries_adapter(transformer):
        raise ValueError(
            "The pipeline already carries a LoRA: call `pipeline.fuse_lora()` and `pipeline.unload_lora_weights()` "
            "first, or pass no `peft_config` to train that one further."
        )
    if not isinstance(transformer, PeftAdapterMixin):
        raise ValueError(
            f"`peft_config` is set, but {type(transformer).__name__} has no `add_adapter`: derive it from "
            "`diffusers.loaders.PeftAdapterMixin`, or pass no `peft_config` to train all weights."
        )
    _refuse_names_of_nothing(config, flow)
    config = copy.deepcopy(config)
    config.target_modules = config.target_modules or list(flow.lora_target_modules)
    config.exclude_modules = config.exclude_modules or list(flow.lora_exclude_modules) or None
    transformer.requires_grad_(False)
    try:
        transformer.add_adapter(config)
    except ValueError as error:
        raise ValueError(f"`peft_config` does not fit the transformer: {error}") from error
    cast_training_params(transformer, dtype=torch.float32)
    return config


def _refuse_change_of_base(config: LoraConfig) -> None:
    """Raises `ValueError` for a LoRA that does not leave the base model as it was once it is switched off."""
    for name, value, allowed in (
        ("bias", config.bias, ("none",)),
        ("modules_to_save", config.modules_to_save, (None, [])),
        ("init_lora_weights", config.init_lora_weights, (True, False, "gaussian", "orthogonal")),
    ):
        if value not in allowed:
            raise ValueError(
                f"`peft_config.{name}` ({value!r}) changes the base model itself, which stays the reference of "
                "training: leave it out."
            )


def _refuse_what_is_not_supported(config: LoraConfig) -> None:
    """Raises `ValueError` for what stock diffusers could not load again, and for what would do nothing here."""
    plain = LoraConfig()
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in SUPPORTED + DESCRIPTIVE and value and value != getattr(plain, field.name):
            raise ValueError(
                f"`peft_config.{field.name}` ({value!r}) is not supported: leave it out; what training and the stock "
                f"loader keep are {', '.join(SUPPORTED)}."
            )
    if config.target_modules is not None and not config.target_modules:
        raise ValueError(
            "`peft_config.target_modules` is empty: name modules, or leave it out for those of the model's family."
        )


def _refuse_names_of_nothing(config: LoraConfig, flow: FlowPipeline) -> None:
    """Raises `ValueError` for a name or pattern that matches no module of the transformer.

    peft refuses a LoRA without any layer, but ignores a name among several; the family's names may be those of others.
    """
    modules = [name for name, _ in flow.transformer.named_modules()]
    ours = {*flow.lora_target_modules, *flow.lora_exclude_modules}
    for argument, names in (
        ("target_modules", config.target_modules),
        ("exclude_modules", config.exclude_modules),
        ("rank_pattern", config.rank_pattern),
        ("alpha_pattern", config.alpha_pattern),
    ):
        if isinstance(names, str):
            known = names.lower() == "all-linear" or any(re.fullmatch(names, module) for module in modules)
            unknown = [] if known else [names]
        elif argument.endswith("_pattern"):
            unknown = [n for n in names or () if not any(re.match(rf"(.*\.)?({n})$", module) for module in modules)]
        else:
            unknown = [n for n in names or () if not any(f".{module}".endswith(f".{n}") for module in modules)]
        for name in sorted(set(unknown) - ours):
            raise ValueError(
                f"`peft_config` does not fit the transformer: {name!r} of `{argument}` matches none of its modules "
                f"(such as {modules[-1]!r}), see `transformer.named_modules()`."
            )


def _continued(transformer: Any) -> LoraConfig:
    active = transformer.active_adapters()
    if len(active) != 1:
        raise ValueError(
            f"The pipeline has {len(active)} active adapters ({', '.join(active)}): choose the one to train with "
            "`pipeline.set_adapters`."
        )
    (name,) = active
    if any(module.disable_adapters for module in transformer.modules() if isinstance(module, BaseTunerLayer)):
        raise ValueError(
            f"The pipeline's adapter {name!r} is switched off: call `pipeline.enable_lora()` to train it further, or "
            "`pipeline.unload_lora_weights()` to train without it."
        )
    for module in transformer.modules():
        if isinstance(module, LoraLayer) and name in module.r:
            rank = module.r[name]
            full = module.lora_alpha[name] / (math.sqrt(rank) if transformer.peft_config[name].use_rslora else rank)
            if not math.isclose(module.scaling[name], full):
                raise ValueError(
                    f"The adapter {name!r} has a weight of {module.scaling[name] / full:.3g}, which its file could "
                    f"not keep: call `pipeline.set_adapters({name!r}, 1.0)` first."
                )
    transformer.requires_grad_(False)
    transformer.enable_adapters()  # makes the active adapter trainable
    cast_training_params(transformer, dtype=torch.float32)
    return transformer.peft_config[name]
