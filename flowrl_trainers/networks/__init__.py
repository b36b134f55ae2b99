"""Networks that are trained beside a pipeline's transformer."""

from .backbone_critic import BackboneCritic
from .critic import ConvCritic, MLPCritic, critic
from .value_network import ValueMLP, ValueUNet, value_network

__all__ = ["BackboneCritic", "ConvCritic", "MLPCritic", "ValueMLP", "ValueUNet", "critic", "value_network"]
