"""The trainers and their configurations."""

from .ac_flow_config import ACFlowConfig
from .ac_flow_trainer import ACFlowTrainer
from .adjoint_matching_config import AdjointMatchingConfig
from .adjoint_matching_trainer import AdjointMatchingTrainer
from .base_config import FlowRLConfig
from .base_trainer import FlowRLTrainer
from .diffusion_nft_config import DiffusionNFTConfig
from .diffusion_nft_trainer import DiffusionNFTTrainer
from .renoising_config import RenoisingConfig
from .renoising_trainer import RenoisingTrainer
from .reward_gradient_config import RewardGradientConfig
from .reward_gradient_trainer import RewardGradientTrainer
from .tafs_grpo_config import TAFSGRPOConfig
from .tafs_grpo_trainer import TAFSGRPOTrainer
from .vgg_flow_config import VGGFlowConfig
from .vgg_flow_trainer import VGGFlowTrainer

__all__ = [
    "ACFlowConfig",
    "ACFlowTrainer",
    "AdjointMatchingConfig",
    "AdjointMatchingTrainer",
    "DiffusionNFTConfig",
    "DiffusionNFTTrainer",
    "FlowRLConfig",
    "FlowRLTrainer",
    "RenoisingConfig",
    "RenoisingTrainer",
    "RewardGradientConfig",
    "RewardGradientTrainer",
    "TAFSGRPOConfig",
    "TAFSGRPOTrainer",
    "VGGFlowConfig",
    "VGGFlowTrainer",
]
