"""Measures of pictures other than their rewards."""

from .diversity import diversity, diversity_by_prompt, mean_distance
from .evaluate_metrics import CheckerAccuracy, Diversity, MeanReward, PriorPreservation
from .image_statistics import colour_entropy, edge_density
from .over_optimisation import signs_of_over_optimisation, standard_error_of_change

__all__ = [
    "CheckerAccuracy",
    "Diversity",
    "MeanReward",
    "PriorPreservation",
    "colour_entropy",
    "diversity",
    "diversity_by_prompt",
    "edge_density",
    "mean_distance",
    "signs_of_over_optimisation",
    "standard_error_of_change",
]
