"""Measures of pictures other than their rewards."""

from .diversity import diversity, diversity_by_prompt, mean_distance
from .evaluate_metrics import CheckerAccuracy, Diversity, MeanReward, PriorPreservation
from .image_statistics import colour_entropy, edge_density
from .over_optimisation import Change, paired_change, signs_of_over_optimisation

__all__ = [
    "Change",
    "CheckerAccuracy",
    "Diversity",
    "MeanReward",
    "PriorPreservation",
    "colour_entropy",
    "diversity",
    "diversity_by_prompt",
    "edge_density",
    "mean_distance",
    "paired_change",
    "signs_of_over_optimisation",
]
