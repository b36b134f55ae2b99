"""Networks of our own that are trained beside a pipeline's transformer."""

from .value_network import ValueMLP, ValueUNet, value_network

__all__ = ["ValueMLP", "ValueUNet", "value_network"]
