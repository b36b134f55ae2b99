"""The rewards that have a name, and `as_rewards`, which turns what a user passes as `reward_funcs` into rewards."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

from .aesthetic import AestheticReward
from .base import FunctionReward, Reward, check_call
from .clip import CLIPScore, PickScore
from .hpsv2 import HPSv2
from .image_reward import ImageReward
from .jpeg import JPEGCompressibility, JPEGIncompressibility
from .ocr import OCRReward, StrictOCRReward
from .shapes import CheckerReward, ShapesReward
from .vlm_judge import GenEvalJudge, VLMJudge

NAMED_REWARDS: dict[str, type[Reward]] = {
    "shapes": ShapesReward,
    "checker": CheckerReward,
    "clip_score": CLIPScore,
    "pickscore": PickScore,
    "hpsv2": HPSv2,
    "image_reward": ImageReward,
    "aesthetic": AestheticReward,
    "ocr": OCRReward,
    "ocr_strict": StrictOCRReward,
    "vlm_judge": VLMJudge,
    "geneval_judge": GenEvalJudge,
    "jpeg_compressibility": JPEGCompressibility,
    "jpeg_incompressibility": JPEGIncompressibility,
}

RewardLike = str | Reward | Callable[..., Any]


def as_rewards(
    reward_funcs: RewardLike | list[RewardLike] | dict[str, RewardLike], argument: str = "reward_funcs"
) -> list[Reward]:
    """Rewards with different names.

    Args:
        reward_funcs: A name, a callable, a `Reward`, a list of them, or a dictionary from names to them.
        argument: What error messages call it.

    Raises:
        ValueError: For an empty list, an unknown name, a name that occurs twice, and a reward that cannot be called as
            trainers do.
        TypeError: For anything that is no reward.
    """
    if isinstance(reward_funcs, dict):
        rewards = [_renamed(_as_reward(reward, argument), name) for name, reward in reward_funcs.items()]
    else:
        listed = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        refuse_unknown_names(listed, argument)
        rewards = [_as_reward(reward, argument) for reward in listed]
    if not rewards:
        raise ValueError(f"`{argument}` is empty: pass at least one reward.")
    for reward in rewards:
        check_call(reward)
    names = [r.name for r in rewards]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"`{argument}` has {names.count(name)} rewards called {name!r}: give each its own name, by a "
                'dictionary from names to rewards or by `FunctionReward(function, name="...")`.'
            )
    return rewards


def chosen_by(rewards: list[Reward], column: str | None) -> list[Reward]:
    """The rewards, each for the prompts that name it in a column of the data set; as they are for None."""
    if column is None:
        return rewards
    chosen = [copy.copy(reward) for reward in rewards]  # the user's stay as they are
    for reward in chosen:
        reward.chosen_by = column
    return chosen


def refuse_unknown_names(rewards: Iterable[RewardLike], argument: str) -> None:
    """Raises `ValueError` for a name that no reward has, before any other reward is loaded."""
    for reward in rewards:
        if isinstance(reward, str) and reward not in NAMED_REWARDS:
            raise ValueError(
                f"`{argument}` names {reward!r}, which is no known reward: choose {', '.join(NAMED_REWARDS)} or pass "
                "a callable."
            )


def refuse_groupwise(rewards: Iterable[Reward], argument: str) -> None:
    """Raises `ValueError` for a groupwise reward where pictures are scored one by one."""
    for reward in rewards:
        if reward.groupwise:
            raise ValueError(
                f"`{argument}` has {reward.name!r}, which is groupwise: it compares the pictures that training draws "
                "of a prompt, so name one that scores each picture by itself."
            )


def refuse_all_but_pictures(rewards: Iterable[Reward], argument: str) -> None:
    """Raises `ValueError` for a reward that needs more than one picture, where there is nothing else."""
    refuse_groupwise(rewards, argument)
    for reward in rewards:
        if reward.sees == "latents":
            raise ValueError(
                f"`{argument}` has {reward.name!r}, which sees latents of a model, and here are pictures alone: name "
                "one that sees images."
            )


def _renamed(reward: Reward, name: str) -> Reward:
    reward = copy.copy(reward)  # the user's stays as it is
    reward.name = name
    return reward


def _as_reward(reward: RewardLike, argument: str) -> Reward:
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, str):
        refuse_unknown_names([reward], argument)
        return NAMED_REWARDS[reward]()
    if isinstance(reward, type):
        raise TypeError(f"`{argument}` has the class {reward.__name__}: pass an instance of it.")
    if callable(reward):
        return FunctionReward(reward)
    raise TypeError(f"`{argument}` has a {type(reward).__name__}: pass a name, a callable, or a `Reward`.")
