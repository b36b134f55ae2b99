"""What rewards note beside their scores by `log_metric` and `log_extra`, checked before it is kept."""

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..rewards.scores import is_number

# What runs log of themselves; a reward's number under such a name would be taken for the run's.
OWN_NAMES = re.compile(
    "loss|grad_norm|learning_rate|epoch|step|total_flos|reward|reward_scale|reward_gradient_norm|target_control_rms|"
    "residual_rms|kl|weight_max|velocity_distance|old_decay|old_distance|reward_probability|replay_ratio_error|"
    "skipped_updates|diversity|edge_density|colour_entropy|[a-z_]*_accuracy|[a-z_]*_share|[a-z_]*_losses|"
    "prompts_without_spread|reward_decoder_cosine|effective_eta|velocity_norm_ratio_\\d+|[a-z]+_network_grad_norm|advantage_std_.*|(eval|test|train|base)_.*|"
    "(reward|reward_std|reward_of_step_\\d+|loss|critic|seconds|bad_samples)/.*"
)


def checked_notes(context: dict[str, Any], reward: str, count: int) -> dict[str, Any]:
    """What a reward is called with, its `log_metric` and `log_extra` checked.

    Both raise `ValueError` in the reward's call: `log_metric` for a name that the run logs itself and for what is no
    number, `log_extra` for anything but one value per image.

    Args:
        context: `log_metric(name, value)` and `log_extra(name, values)` among others.
        reward: Its name.
        count: The number of images.
    """

    def log_metric(name: str, value: float | Tensor) -> None:
        _check_name(name, reward, "log_metric")
        if OWN_NAMES.fullmatch(name):
            raise ValueError(
                f"Reward {reward!r} logs a metric called {name!r}, which the run logs itself: give it another name."
            )
        if not is_number(value):
            raise ValueError(f"Reward {reward!r} logs {value!r} as metric {name!r}: log a number.")
        context["log_metric"](name, float(value))

    def log_extra(name: str, values: Iterable[Any]) -> None:
        _check_name(name, reward, "log_extra")
        listed = list(values) if isinstance(values, Iterable) and not isinstance(values, (str, bytes)) else []
        if len(listed) != count:
            raise ValueError(
                f"Reward {reward!r} passes {values!r} to `log_extra` as {name!r} for {count} images: pass a list with "
                "one value per image."
            )
        context["log_extra"](name, listed)

    return context | {"log_metric": log_metric, "log_extra": log_extra}


def spread_notes(context: dict[str, Any], rows: list[int], count: int) -> dict[str, Any]:
    """The context of a reward that is shown some of the images: what it notes of them is noted of all, else None.

    Args:
        context: As in `checked_notes`.
        rows: The numbers of the images that it is shown.
        count: The number of all images.
    """
    if len(rows) == count:
        return context

    def log_extra(name: str, values: list[Any]) -> None:
        by_row = dict(zip(rows, values, strict=True))
        context["log_extra"](name, [by_row.get(i) for i in range(count)])

    return context | {"log_extra": log_extra}


def _check_name(name: Any, reward: str, function: str) -> None:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"Reward {reward!r} calls `{function}` with the name {name!r}: pass a text.")
