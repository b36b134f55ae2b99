"""Reward fine-tuning of flow-matching image models, in the style of TRL."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipelines import FlowPipeline
    from .trainers import (
        ACFlowConfig,
        ACFlowTrainer,
        AdjointMatchingConfig,
        AdjointMatchingTrainer,
        DiffusionNFTConfig,
        DiffusionNFTTrainer,
        FlowRLConfig,
        FlowRLTrainer,
        TAFSGRPOConfig,
        TAFSGRPOTrainer,
        VGGFlowConfig,
        VGGFlowTrainer,
    )

# Imported on first use, as trl does: `import flowrl_trainers` alone is quick.
_HOMES = {
    "ACFlowConfig": ".trainers",
    "ACFlowTrainer": ".trainers",
    "AdjointMatchingConfig": ".trainers",
    "AdjointMatchingTrainer": ".trainers",
    "DiffusionNFTConfig": ".trainers",
    "DiffusionNFTTrainer": ".trainers",
    "FlowPipeline": ".pipelines",
    "FlowRLConfig": ".trainers",
    "FlowRLTrainer": ".trainers",
    "TAFSGRPOConfig": ".trainers",
    "TAFSGRPOTrainer": ".trainers",
    "VGGFlowConfig": ".trainers",
    "VGGFlowTrainer": ".trainers",
}

__version__ = version("flowrl-trainers")
__all__ = [
    "ACFlowConfig",
    "ACFlowTrainer",
    "AdjointMatchingConfig",
    "AdjointMatchingTrainer",
    "DiffusionNFTConfig",
    "DiffusionNFTTrainer",
    "FlowPipeline",
    "FlowRLConfig",
    "FlowRLTrainer",
    "TAFSGRPOConfig",
    "TAFSGRPOTrainer",
    "VGGFlowConfig",
    "VGGFlowTrainer",
]


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flowrl_trainers' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
