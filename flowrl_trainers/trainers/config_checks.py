"""Checks of settings before anything is loaded: types, choices and ranges, and settings that are not supported.

A setting's annotation is its rule. `eta: Annotated[float, Range(above=0, at_most=1)]` takes finite numbers of that
range, `kernel: Literal["renoise", "flow_grpo"]` one of the two, `height: int | None` a whole number or None.
"""

import math
from dataclasses import dataclass, fields
from enum import EnumMeta
from functools import cache
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers.trainer_pt_utils import AcceleratorConfig


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have, written into its annotation: `Annotated[float, Range(above=0)]`."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.at_least <= number <= self.at_most and self.above < number < self.below

    def __str__(self) -> str:
        if math.isfinite(self.at_least) and math.isfinite(self.at_most):
            return f"between {self.at_least} and {self.at_most}"
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound))


# Settings of `transformers.TrainingArguments` whose annotations there allow values that do not work here.
INHERITED: dict[str, Any] = {
    "output_dir": str | PathLike | None,
    "resume_from_checkpoint": str | PathLike | bool | None,
    "per_device_train_batch_size": Annotated[int, Range(at_least=1)],
    "per_device_eval_batch_size": Annotated[int, Range(at_least=1)],
    "gradient_accumulation_steps": Annotated[int, Range(at_least=1)],
    "num_train_epochs": Annotated[float, Range(above=0)],
    "max_steps": Annotated[int, Range(at_least=-1)],  # `FlowRLConfig` refuses 0 as well
    "learning_rate": Annotated[float, Range(at_least=0)],
    "warmup_steps": Annotated[float, Range(at_least=0)],
    "weight_decay": Annotated[float, Range(at_least=0)],
    "adam_beta1": Annotated[float, Range(at_least=0, below=1)],
    "adam_beta2": Annotated[float, Range(at_least=0, below=1)],
    "adam_epsilon": Annotated[float, Range(above=0)],  # 0 gives 0 / 0 where a new LoRA's gradients are zero
    "max_grad_norm": Annotated[float, Range(at_least=0)],
    "logging_steps": Annotated[float, Range(above=0)],
    "save_steps": Annotated[float, Range(at_least=0)],  # 0 saves at the end alone
    "save_total_limit": Annotated[int, Range(at_least=1)] | None,
    "eval_steps": Annotated[float, Range(at_least=0)] | None,
    "eval_delay": Annotated[float, Range(at_least=0)],
    "seed": Annotated[int, Range(at_least=0, at_most=2**32 - 1)],
    "ddp_bucket_cap_mb": Annotated[int, Range(at_least=1)] | None,
    "ddp_timeout": Annotated[int, Range(at_least=1)],
    "local_rank": Annotated[int, Range(at_least=-1)],
    "debug": Literal["", "underflow_overflow"] | list[Literal["underflow_overflow"]] | None,
}

# Reasons that several settings share.
_WHOLE = "the network must be whole, and in place before training starts"
_LAUNCHED = (
    "whether the network is sharded is said to the launcher, by `--accelerate_config fsdp2` or a file like that"
)
_COMPILES = "it would compile updates alone, and not the rollouts they must agree with"
_ORDER = "it has no effect here, as `seed` orders the prompts"
_NO_WORKERS = "it has no effect here, as the rows of a rollout are read in the process itself"
_NO_LABELS = "it has no effect here, as prompts have no labels"
_NO_TOKENS = "it has no effect here, as images are counted and not tokens"
_NO_METRICS = "it has no effect here, as evaluations draw pictures and take no `compute_metrics`"
_LANGUAGE = "it is made for language models, and the network is none"

# Settings of `transformers.TrainingArguments`, the values that they may have here, and why they may have no other. The
# sentence that refuses another value names the first one.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "remove_unused_columns": ((False, None), "the other columns of the dataset are passed to the rewards"),
    "ignore_data_skip": ((False,), "a resumed run goes on with the prompts where it stopped"),
    "auto_find_batch_size": ((False,), "it would change the images per update during training"),
    "enable_jit_checkpoint": (
        (False,),
        "it would save in the middle of an update; SIGTERM saves after it without this",
    ),
    "save_on_each_node": (
        (False,),
        "a checkpoint has files of all processes, so `output_dir` must be a folder that all machines see",
    ),
    "fsdp": ((None, False, ""), _LAUNCHED),
    "fsdp_config": ((None,), _LAUNCHED),
    "deepspeed": ((None,), _LAUNCHED),
    "parallelism_config": ((None,), _WHOLE),
    "fp16_full_eval": ((False,), _WHOLE),
    "bf16_full_eval": ((False,), _WHOLE),
    "torch_compile": ((False,), _COMPILES),
    "torch_compile_backend": ((None,), _COMPILES),
    "torch_compile_mode": ((None,), _COMPILES),
    "torch_empty_cache_steps": ((None,), "it has no effect here, as memory stays with torch"),
    "accelerator_config": (
        (None, AcceleratorConfig(), vars(AcceleratorConfig())),
        "batches are those of a rollout, which the trainer splits over the processes",
    ),
    "data_seed": ((None,), _ORDER),
    "train_sampling_strategy": (("random",), _ORDER),
    "length_column_name": (("length",), _ORDER),
    "dataloader_num_workers": ((0,), _NO_WORKERS),
    "dataloader_persistent_workers": ((False,), _NO_WORKERS),
    "dataloader_prefetch_factor": ((None,), _NO_WORKERS),
    "dataloader_multiprocessing_context": ((None,), _NO_WORKERS),
    "dataloader_in_order": ((True,), _NO_WORKERS),
    "dataloader_drop_last": ((False,), "it has no effect here, as a rollout takes whole batches of prompts"),
    "label_names": ((None, []), _NO_LABELS),
    "label_smoothing_factor": ((0.0,), _NO_LABELS),
    "include_num_input_tokens_seen": (("no", False), _NO_TOKENS),
    "average_tokens_across_devices": ((True,), _NO_TOKENS),
    "neftune_noise_alpha": ((None,), _LANGUAGE),
    "use_liger_kernel": ((False,), _LANGUAGE),
    "liger_kernel_config": ((None,), _LANGUAGE),
    "use_cache": ((False,), _LANGUAGE),
    "include_for_metrics": (([],), _NO_METRICS),
    "batch_eval_metrics": ((False,), _NO_METRICS),
    "optim_target_modules": ((None,), "the optimizers that read it are not supported"),
    "prediction_loss_only": ((False,), _NO_METRICS),
    "eval_do_concat_batches": ((True,), _NO_METRICS),
    "eval_use_gather_object": ((False,), _NO_METRICS),
    "eval_accumulation_steps": ((None,), _NO_METRICS),
    "do_predict": ((False,), "it has no effect here; measure a saved adapter with `flowrl evaluate`"),
}


def refuse_unsupported(config: Any) -> None:
    """Raises `ValueError` if a setting of `UNSUPPORTED` has a value that is not listed there."""
    for name in [f.name for f in fields(config) if f.name in UNSUPPORTED]:
        allowed, reason = UNSUPPORTED[name]
        value = getattr(config, name)
        # A dictionary for `accelerator_config` may leave out what it does not change.
        whole = vars(AcceleratorConfig()) | value if isinstance(value, dict) else value
        if whole not in allowed:
            raise ValueError(f"`{name}` ({shown(value)}) must be {allowed[0]!r}: {reason}.")


def check_fields(config: Any) -> None:
    """Raises `ValueError` for a setting whose value its annotation does not allow: another type, choice or range."""
    for name, annotation in rules(config.__class__).items():
        value = getattr(config, name)
        if name.endswith("_token") and not fits(value, annotation):
            raise ValueError(f"`{name}` must be {either(words(annotation))}.")  # its value is a secret
        if not fits(value, annotation):
            raise ValueError(f"`{name}` {complaint(value, annotation)}.")


@cache
def rules(config_class: type) -> dict[str, Any]:
    """The annotations by which `check_fields` checks a dataclass; `refuse_unsupported` checks the other settings."""
    hints = get_type_hints(config_class, include_extras=True) | INHERITED
    for field in fields(config_class):
        if "choices" in field.metadata:  # how transformers declares them
            choices = Literal[tuple(field.metadata["choices"])]  # type: ignore[valid-type]
            hints[field.name] = choices | None if NoneType in alternatives(hints[field.name]) else choices
    return {field.name: hints[field.name] for field in fields(config_class) if field.name not in UNSUPPORTED}


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The parts of a union, or the annotation alone; without `str` where an enumeration lists the strings."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    has_enumeration = any(isinstance(part, EnumMeta) for part in parts)
    return tuple(part for part in parts if not (has_enumeration and part is str))


def choices_of(part: Any) -> tuple[Any, ...]:
    """The values of a `Literal` or of an enumeration; none for other annotations."""
    if isinstance(part, EnumMeta):
        return tuple(part[name].value for name in part.__members__)
    return get_args(part) if get_origin(part) is Literal else ()


def fits(value: Any, annotation: Any) -> bool:
    """Whether an annotation allows a value. An annotation that names no class allows every value."""
    return any(_fits_part(value, part) for part in alternatives(annotation))


def _fits_part(value: Any, part: Any) -> bool:
    origin, arguments = get_origin(part), get_args(part)
    if choices := choices_of(part):
        return any(isinstance(value, type(choice)) and value == choice for choice in choices)
    if origin is Annotated:
        ranges = [r for r in arguments[1:] if isinstance(r, Range)]
        return fits(value, arguments[0]) and all(value in r for r in ranges)
    if origin is list:
        return isinstance(value, list) and all(fits(element, arguments[0]) for element in value)
    if part is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if part is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    kind = origin or part
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


def complaint(value: Any, annotation: Any) -> str:
    """The sentence after a setting's name: the value that does not fit, and the values that do."""
    parts = alternatives(annotation)
    for part in parts:
        if get_origin(part) is Annotated and fits(value, get_args(part)[0]):
            _, allowed = get_args(part)
            return f"({shown(value)}) must be {allowed}{', or None' if NoneType in parts else ''}"
    if all(choices_of(part) or part is NoneType for part in parts):
        return f"is {shown(value)}: choose {either(words(annotation))}"
    return f"({shown(value)}) must be {either(words(annotation))}"


def words(annotation: Any) -> list[str]:
    """What an annotation allows, in words: `["a whole number", "None"]`."""
    return [word for part in alternatives(annotation) for word in _words_of_part(part)]


def _words_of_part(part: Any) -> list[str]:
    origin, arguments = get_origin(part), get_args(part)
    if choices := choices_of(part):
        return [repr(choice) for choice in choices]
    if origin is Annotated:
        return words(arguments[0])
    if origin is list:
        plurals = {"a string": "strings", "a whole number": "whole numbers", "a finite number": "finite numbers"}
        return ["a list of " + either([plurals.get(word, word) for word in words(arguments[0])])]
    plain = {
        int: ["a whole number"],
        float: ["a finite number"],
        bool: ["True", "False"],
        str: ["a string"],
        dict: ["a dictionary"],
        PathLike: ["a path"],
        NoneType: ["None"],
    }
    kind = origin or part
    return plain.get(kind, [f"a {kind.__name__}" if isinstance(kind, type) else str(kind)])


def either(choices: list[str]) -> str:
    """`a, b or c`."""
    return " or ".join(part for part in (", ".join(choices[:-1]), choices[-1]) if part)


def shown(value: Any) -> str:
    """A value as a sentence shows it; a value with a long text, such as a network, is shown by its class."""
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"
