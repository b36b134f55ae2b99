"""Networks of tests whose linear layers are quantised, and what these layers compute with."""

import copy
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
from torchao.utils import TorchAOBaseTensor

KINDS = ["nf4", "int8", "float8"]


def quantize(network: Any, kind: str) -> None:
    """Quantise every linear layer in place, as diffusers does when it loads a model so."""
    if kind == "nf4":
        for parent, name, layer in _linear_layers(network):
            setattr(parent, name, _in_four_bits(layer))
        network.is_loaded_in_4bit = True  # what diffusers' loader notes, and peft reads
    else:
        quantize_(network, Int8WeightOnlyConfig(version=2) if kind == "int8" else Float8WeightOnlyConfig())
        network.requires_grad_(False)


def _in_four_bits(layer: nn.Linear) -> Linear4bit:
    made = Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
    )
    weight = layer.weight.data.clone()
    made.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
    made.bias = layer.bias
    made.support_avx512bf16_for_cpu = (
        False  # its kernels for some CPUs compute in bfloat16, whatever `compute_dtype` says
    )
    return made.to("cpu")  # which quantises


def dequantized(network: Any) -> Any:
    """A copy of a network in which every quantised layer has the float32 weights that it stands for."""
    network = copy.deepcopy(network)
    for parent, name, layer in _linear_layers(network):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight.data, plain.bias = _float_weight(layer.weight), layer.bias
        setattr(parent, name, plain)
    network.is_loaded_in_4bit = False
    return network


def _float_weight(weight: Tensor) -> Tensor:
    if isinstance(weight, Params4bit):
        return dequantize_4bit(weight.data, weight.quant_state)
    assert isinstance(weight, TorchAOBaseTensor)
    return weight.dequantize()


def _linear_layers(network: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    return [
        (parent, name, layer)
        for parent in network.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear)
    ]
