"""Rewards: images and prompts in, one score per image out."""

from .aesthetic import AestheticReward
from .base import FunctionReward, Reward, differentiable
from .clip import CLIPScore, PickScore
from .hpsv2 import HPSv2
from .image_reward import ImageReward
from .jpeg import JPEGCompressibility, JPEGIncompressibility
from .named import NAMED_REWARDS, as_rewards
from .ocr import OCRReward, StrictOCRReward
from .remote import RemoteReward
from .shapes import CheckerReward, ShapesReward

__all__ = [
    "NAMED_REWARDS",
    "AestheticReward",
    "CLIPScore",
    "CheckerReward",
    "FunctionReward",
    "HPSv2",
    "ImageReward",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "OCRReward",
    "PickScore",
    "RemoteReward",
    "Reward",
    "ShapesReward",
    "StrictOCRReward",
    "as_rewards",
    "differentiable",
]
