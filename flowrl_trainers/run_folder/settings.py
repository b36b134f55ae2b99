"""What `config.yaml` keeps."""

import json
from dataclasses import fields
from typing import Any

from peft import LoraConfig
from transformers import TrainingArguments

NOT_OF_THE_RUN = ("hub_token", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "local_rank")


def run_settings(args: TrainingArguments, adapter: LoraConfig | None, **named: Any) -> dict[str, Any]:
    """Every setting that differs from its default, under the names of the command line, in plain types.

    Args:
        args: The configuration.
        adapter: The LoRA that is trained, if any.
        named: What else the command line calls by these names, such as `model` and `reward_funcs`; comes first.
    """
    values = args.to_dict()
    defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(args)}
    changed = {k: v for k, v in values.items() if k in defaults and v != defaults[k] and k not in NOT_OF_THE_RUN}
    return json.loads(json.dumps(named | _lora_settings(adapter) | changed, default=str))


def _lora_settings(adapter: LoraConfig | None) -> dict[str, Any]:
    if adapter is None:
        return {"lora_r": 0}
    targets = adapter.target_modules or []
    return {
        "lora_alpha": adapter.lora_alpha,
        "lora_dropout": adapter.lora_dropout,
        "lora_r": adapter.r,
        "lora_target_modules": [targets] if isinstance(targets, str) else sorted(targets),
    }
