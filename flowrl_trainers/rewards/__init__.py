"""Rewards: images and prompts in, one score per image out."""

from .aesthetic import AestheticReward
from .base import FunctionReward, Reward, differentiable, groupwise
from .clip import CLIPScore, PickScore
from .hpsv2 import HPSv2
from .image_reward import ImageReward
from .jpeg import JPEGCompressibility, JPEGIncompressibility
from .named import NAMED_REWARDS, as_rewards, chosen_by
from .ocr import OCRReward, StrictOCRReward
from .pairwise import PairwiseReward, pairwise
from .remote import RemoteReward
from .shapes import CheckerReward, ShapesReward
from .vlm_judge import GenEvalJudge, VLMJudge
from .vlm_questions import NumberQuestion, YesNoQuestion

__all__ = [
    "NAMED_REWARDS",
    "AestheticReward",
    "CLIPScore",
    "CheckerReward",
    "FunctionReward",
    "GenEvalJudge",
    "HPSv2",
    "ImageReward",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "NumberQuestion",
    "OCRReward",
    "PairwiseReward",
    "PickScore",
    "RemoteReward",
    "Reward",
    "ShapesReward",
    "StrictOCRReward",
    "VLMJudge",
    "YesNoQuestion",
    "as_rewards",
    "chosen_by",
    "differentiable",
    "groupwise",
    "pairwise",
]
