"""Weights in 4 or 8 bits: how a pipeline that is named is loaded with them, and what is asked of one that has them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import diffusers
import torch
import transformers
from diffusers import PipelineQuantizationConfig
from diffusers.utils import is_bitsandbytes_available, is_torchao_available
from torch import Tensor, nn

Quantization = Literal["nf4", "int8", "float8"]
PACKAGES: dict[Quantization, tuple[str, Callable[[], bool]]] = {
    "nf4": ("bitsandbytes", is_bitsandbytes_available),
    "int8": ("torchao", is_torchao_available),
    "float8": ("torchao", is_torchao_available),
}


def check_quantization(names: Mapping[str, Quantization | None], device: torch.device) -> None:
    """Refuse weights that cannot be had here, before anything is loaded.

    Args:
        names: The quantisation of each part, under the name of the setting that asks for it.
        device: Where the network will compute.

    Raises:
        ValueError: Where the package is not installed, and for nf4 on a CPU.
    """
    for setting, name in names.items():
        if name is None:
            continue
        if name == "nf4" and device.type == "cpu":
            raise ValueError(
                f"`{setting}` is 'nf4', which diffusers loads on a GPU alone, and this run is on the CPU: take 'int8'."
            )
        package, is_available = PACKAGES[name]
        if not is_available():
            raise ValueError(f"`{setting}` is {name!r}, which needs {package}: `pip install {package}`.")


def quantization_config(
    transformer: Quantization | None, text_encoders: Quantization | None, parts: Iterable[str], dtype: torch.dtype
) -> PipelineQuantizationConfig | None:
    """How diffusers loads a pipeline so; None where nothing is quantised.

    Args:
        transformer: Of the linear layers of the network that is trained.
        text_encoders: Of those of every text encoder.
        parts: The names of the pipeline's parts.
        dtype: The precision of all other weights, in which layers compute.
    """
    chosen: dict[str, Any] = {}
    for part in parts:
        if part == "transformer" and transformer is not None:
            chosen[part] = _config(diffusers, transformer, dtype)
        if part.startswith("text_encoder") and text_encoders is not None:
            chosen[part] = _config(transformers, text_encoders, dtype)
    return PipelineQuantizationConfig(quant_mapping=chosen) if chosen else None


def _config(library: Any, name: Quantization, dtype: torch.dtype) -> Any:
    """The configuration of one part; library: diffusers or transformers, which name their classes alike."""
    if name == "nf4":
        settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return library.BitsAndBytesConfig(load_in_4bit=True, **settings)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig  # an extra

    return library.TorchAoConfig(Int8WeightOnlyConfig(version=2) if name == "int8" else Float8WeightOnlyConfig())


def is_quantized(network: nn.Module) -> bool:
    """Whether a parameter of the network is held in fewer bits, by whatever library."""
    return any(not p.is_floating_point() or len(stored_tensors(p)) > 1 for p in network.parameters())


def refuse_unsplittable(network: nn.Module) -> None:
    """Refuse weights that FSDP2 cannot spread over processes.

    Plain floating-point tensors can be split, and accelerate leaves 4-bit weights that are stored as whole numbers, as
    they are by default, whole.

    Raises:
        ValueError: Naming the kind of weights, and what to take instead.
    """
    for parameter in network.parameters():
        in_four_bits, floats = _is_in_four_bits(parameter), parameter.is_floating_point()
        if in_four_bits and floats:
            raise ValueError(
                f"`model` has 4-bit weights that are stored as {parameter.dtype}, which FSDP2 would split without "
                "what they need to be read: load it without `bnb_4bit_quant_storage`, so that they stay whole on "
                "every process."
            )
        if not in_four_bits and not (floats and type(parameter.data) is Tensor):
            raise ValueError(
                f"`model` has quantised weights ({type(parameter).__name__}), which FSDP2 cannot split: quantise it "
                "by bitsandbytes to 'nf4', whose weights stay whole on every process, load it in all its bits, or "
                "take `--accelerate_config ddp`."
            )


def refuse_other_precision(network: nn.Module, dtype: torch.dtype) -> None:
    """Refuse to compile blocks whose 4-bit layers compute in another precision than their inputs have.

    bitsandbytes converts a layer's bias in place then, and what it returns, which no compiled graph can do.

    Args:
        network: With layers of bitsandbytes or without.
        dtype: The precision in which the run computes.

    Raises:
        ValueError: Naming both.
    """
    if not is_bitsandbytes_available():
        return
    from bitsandbytes.nn import Linear4bit

    for layer in network.modules():
        if isinstance(layer, Linear4bit):
            bias = [] if layer.bias is None else [layer.bias.dtype]
            others = {found for found in (layer.compute_dtype, *bias) if found not in (None, dtype)}
            if others:
                raise ValueError(
                    f"`compile_blocks` is True, but 4-bit layers of `model` are in {min(others, key=str)} where the "
                    f"run computes in {dtype}, which compiled blocks cannot convert: load it with that `torch_dtype` "
                    "and `bnb_4bit_compute_dtype`, or leave `compile_blocks` out."
                )


def _is_in_four_bits(parameter: Tensor) -> bool:
    """Whether a parameter is one of bitsandbytes, in 4 bits."""
    if not is_bitsandbytes_available():
        return False
    from bitsandbytes.nn import Params4bit

    return isinstance(parameter, Params4bit)


def stored_tensors(parameter: Tensor) -> list[Tensor]:
    """The plain tensors that hold a parameter: itself, or the numbers and scales of a quantised one."""
    if is_torchao_available():
        from torchao.utils import TorchAOBaseTensor

        if isinstance(parameter, TorchAOBaseTensor):
            names, _ = parameter.__tensor_flatten__()  # torch's protocol for tensors that are made of others
            return [stored for name in names for stored in stored_tensors(getattr(parameter, name))]
    if is_bitsandbytes_available():
        from bitsandbytes.nn import Params4bit

        if isinstance(parameter, Params4bit) and parameter.quant_state is not None:
            return [parameter.data, parameter.quant_state.absmax]
    return [parameter]


def computing_dtype(network: Any) -> torch.dtype:
    """The precision in which a network of diffusers computes: its `dtype`, but where its weights are in 4 bits.

    There it is that of the first parameter of floating point which is not an adapter's; `dtype` does not leave these
    out, and names the adapter's precision where all before it is in 4 bits.
    """
    if next(network.parameters()).is_floating_point():
        return network.dtype
    return next(
        parameter.dtype
        for name, parameter in network.named_parameters()
        if parameter.is_floating_point() and "lora_" not in name
    )
