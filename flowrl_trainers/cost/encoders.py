"""What is on the device while prompts are encoded, before training: the text encoders as transformers loads them."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from ..pipelines.quantization import Quantization
from .architectures import Architecture
from .estimate import PhaseCost, bytes_of_network, linear_layers, quantized_size


def encoding(
    architecture: Architecture,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    of_transformer: Quantization | None = None,
) -> PhaseCost:
    """The phase in which prompts are encoded. Weights are counted, not activations.

    Args:
        architecture: Of the pipeline.
        dtype: The precision in which it is loaded.
        quantization: That of the text encoders.
        of_transformer: That of the transformer where it is on the device meanwhile: bitsandbytes quantises there.
    """
    sizes = {
        name: encoder_bytes(architecture.part(name, dtype), quantization) for name in architecture.text_encoders()
    }
    if sizes and of_transformer is not None:
        network = architecture.part("transformer", dtype)
        sizes["weights"] = bytes_of_network(network) - quantized_size(linear_layers(network), of_transformer).saved
    return PhaseCost(sizes, "text encoders")


def encoder_bytes(network: PreTrainedModel, quantization: Quantization | None) -> int:
    """Those of a model of transformers, on the meta device in the precision that it is loaded in.

    transformers leaves tied weights, output embeddings and the last module unquantised, and some layers in float32
    where the others are float16 (T5's `wo`, which overflows).
    """
    kept = set(network._keep_in_fp32_modules or ())  # private, as transformers states it nowhere else
    left = [*get_keys_to_not_convert(network), *kept]
    of_name = "{}" if quantization == "nf4" else "{}.weight"  # torchao asks by the names of weights
    layers = [
        layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and should_convert_module(of_name.format(name), left)
    ]
    in_bits = set() if quantization is None else {layer.weight for layer in layers}
    halves = [(n, p) for n, p in network.named_parameters() if p.dtype == torch.float16 and p not in in_bits]
    in_float32 = sum(p.nbytes for name, p in halves if kept & set(name.split(".")))
    return bytes_of_network(network) + in_float32 - quantized_size(layers, quantization).saved
