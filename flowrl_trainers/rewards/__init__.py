"""Rewards: images and prompts in, one score per image out."""

from .base import FunctionReward, Reward, differentiable
from .clip import CLIPScore
from .named import NAMED_REWARDS, as_rewards
from .shapes import CheckerReward, ShapesReward

__all__ = [
    "NAMED_REWARDS",
    "CLIPScore",
    "CheckerReward",
    "FunctionReward",
    "Reward",
    "ShapesReward",
    "as_rewards",
    "differentiable",
]
