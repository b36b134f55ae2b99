"""`named_reward`: the reward that a command names, one of the library's or a function of the user's."""

import sys
from importlib import import_module

from ..rewards.named import RewardLike


def named_reward(name: str) -> RewardLike:
    """The function that a dotted name such as `module.function` names; any other name unchanged."""
    if "." not in name:
        return name
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(
            f"The reward {name!r} is no 'module.function': write `rewards.black` for the function `black` of "
            "rewards.py, and start where that file is."
        )
    module, function = name.rsplit(".", 1)
    sys.path.insert(0, "")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"The reward {name!r} cannot be imported ({error}): name it as 'module.function', and start where "
            f"{module.split('.')[0]}.py is, or where it is installed."
        ) from error
