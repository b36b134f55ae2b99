"""Networks that are trained beside a pipeline's transformer."""

from .critic import ConvCritic, MLPCritic, critic
from .value_network import ValueMLP, ValueUNet, value_network

__all__ = ["ConvCritic", "MLPCritic", "ValueMLP", "ValueUNet", "critic", "value_network"]
