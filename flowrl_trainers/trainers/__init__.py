"""The trainers and their configurations."""

from .adjoint_matching_config import AdjointMatchingConfig
from .adjoint_matching_trainer import AdjointMatchingTrainer
from .base_config import FlowRLConfig
from .base_trainer import FlowRLTrainer
from .micro_batch import MicroBatch

__all__ = ["AdjointMatchingConfig", "AdjointMatchingTrainer", "FlowRLConfig", "FlowRLTrainer", "MicroBatch"]
