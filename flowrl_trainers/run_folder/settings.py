"""What `config.yaml` keeps."""

import json
import re
from dataclasses import MISSING, fields
from typing import Any

from peft import LoraConfig, PeftConfig
from transformers import TrainingArguments

NOT_OF_THE_RUN = (
    "hub_token", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "local_rank",
    "accelerator_config",  # refused unless it is the default
)  # fmt: skip

FLAGS = {
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "r": "lora_r",
    "target_modules": "lora_target_modules",
}
"""The fields of a LoRA that are settings of the command line; the others stand together in `lora_config`."""

_NOT_OF_THE_ADAPTER = {*(field.name for field in fields(PeftConfig)), "runtime_config", "inference_mode"}
KEPT = [field.name for field in fields(LoraConfig) if field.name not in {*_NOT_OF_THE_ADAPTER, *FLAGS}]
"""The fields of `lora_config`."""


REWRITTEN = {"activation_checkpointing": False, "debug": [], "gradient_checkpointing": False, "report_to": []}
"""Defaults as `TrainingArguments` keeps them, where it rewrites its fields."""


def run_settings(args: TrainingArguments, adapter: LoraConfig | None, **named: Any) -> dict[str, Any]:
    """Every setting that differs from its default, under the names of the command line, in plain types.

    Args:
        args: The configuration.
        adapter: The LoRA that is trained, if any.
        named: What else the command line calls by these names, such as `model` and `reward_funcs`; comes first.
    """
    values = args.to_dict()
    defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(args)}
    defaults |= REWRITTEN
    changed = {k: v for k, v in values.items() if k in defaults and v != defaults[k] and k not in NOT_OF_THE_RUN}
    return json.loads(json.dumps(named | adapter_settings(adapter) | changed, default=str))


def adapter_settings(adapter: LoraConfig | None) -> dict[str, Any]:
    """The settings that make the same LoRA again.

    Raises:
        ValueError: For a field whose value a YAML file could not keep.
    """
    if adapter is None:
        return {"lora_r": 0}
    values = adapter.to_dict()
    for name in ("target_modules", "exclude_modules"):  # lists of the family become sets when they are read again
        if isinstance(values[name], (list, set)):
            values[name] = sorted(values[name])
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(adapter)}
    for name in (*FLAGS, *KEPT):
        if not _is_plain(values[name]):
            raise ValueError(
                f"`peft_config.{name}` ({values[name]!r}) cannot be written into config.yaml: use numbers, strings, "
                "lists and dictionaries whose keys are strings."
            )
    targets = values["target_modules"] or []
    if isinstance(targets, str):  # in parentheses, a regular expression without signs is still known for one
        targets = [targets if is_pattern(targets) else f"(?:{targets})"]
    further = {name: values[name] for name in KEPT if values[name] != defaults[name]}
    return (
        {setting: values[name] for name, setting in FLAGS.items()}
        | {"lora_target_modules": targets}
        | ({"lora_config": further} if further else {})
    )


def is_pattern(name: str) -> bool:
    """Whether a target is 'all-linear' or a regular expression, and no name of a layer, which has no such sign."""
    return name.lower() == "all-linear" or re.search(r"[\\*+?|^$()\[\]{}]", name) is not None


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(part) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
