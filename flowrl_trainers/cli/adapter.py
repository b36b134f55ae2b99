"""The LoRA that the settings of a run describe."""

import json
from typing import Any, get_type_hints

from peft import LoraConfig

from ..run_folder.settings import FLAGS, KEPT, is_pattern
from ..suggestions import did_you_mean
from ..trainers.config_checks import complaint, fits


def lora_fields(value: Any) -> dict[str, Any]:
    """The fields of `lora_config`, a mapping in YAML and JSON on the command line.

    Raises:
        ValueError: For what is no mapping, and for a field that `LoraConfig` lacks or that may not have this value.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(
                f"`lora_config` ({value!r}) is no JSON: write it as '{{\"use_dora\": true}}', or as a mapping in YAML."
            ) from error
    if not isinstance(value, dict):
        raise ValueError(f"`lora_config` ({value!r}) must be a mapping from fields of `peft.LoraConfig` to values.")
    hints = get_type_hints(LoraConfig)
    for name, given in value.items():
        if name in FLAGS:
            raise ValueError(f"`lora_config` has {name!r}, which is the setting `{FLAGS[name]}`: set that.")
        if name not in KEPT:
            raise ValueError(
                f"`lora_config` has {name!r}, which is no field of `peft.LoraConfig` that shapes an adapter"
                f"{did_you_mean([str(name)], KEPT)}: choose {', '.join(KEPT)}."
            )
        if not fits(given, hints[name]):
            raise ValueError(f"`lora_config.{name}` {complaint(given, hints[name])}.")
    return value


def make_lora_config(
    rank: int, alpha: int, dropout: float, target_modules: list[str] | None, further: dict[str, Any]
) -> LoraConfig:
    """The configuration of a LoRA.

    Args:
        rank: Its rank.
        alpha: Its alpha.
        dropout: The dropout on its input.
        target_modules: Names of layers, or one regular expression or 'all-linear'; None for the family's.
        further: Other fields of `LoraConfig`.

    Raises:
        ValueError: For fields that do not go together.
    """
    single = target_modules[0] if target_modules is not None and len(target_modules) == 1 else None
    targets = single if single is not None and is_pattern(single) else target_modules
    try:
        return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, **further)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"`lora_config` describes no LoRA: {error}") from error
