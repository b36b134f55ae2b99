"""What around a trainer would change what it computes: torch's modes, and what was done to the pipeline's networks."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..pipelines import FlowPipeline
from ..pipelines.quantization import is_quantized


def check_modes() -> None:
    """Raises `ValueError` inside a mode of torch in which updates would compute something else, or nothing."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "Gradients are switched off by a `torch.inference_mode()` around this call: make and use the trainer "
            "outside of it."
        )
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise ValueError(
            "This call stands inside a `torch.autocast`, which would change what the trainer computes unseen: leave "
            "it, and set `bf16` or `fp16` of the configuration."
        )
    if torch.get_default_dtype() != torch.float32:
        raise ValueError(
            f"torch's default precision is {torch.get_default_dtype()}, and states and scores are float32: call "
            "`torch.set_default_dtype(torch.float32)`."
        )
    if torch.get_default_device().type not in ("cpu", "cuda"):
        raise ValueError(
            f"torch's default device is {torch.get_default_device()}, where nothing is computed: call "
            "`torch.set_default_device('cpu')`."
        )


@contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """Outside, torch, numpy and Python draw afterwards what they would have drawn without what is done inside.

    So training goes on alike however often rewards that draw random numbers judged meanwhile.
    """
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def check_networks(flow: FlowPipeline) -> None:
    """Raises `ValueError` for networks that cannot be trained, or whose adapter would do nothing."""
    parts = {"transformer": flow.transformer}
    parts |= {f"text encoder {number}": part for number, part in enumerate(flow.text_encoders(), 1)}
    parts |= {f"decoder {number}": part for number, part in enumerate(flow.decoders(), 1)}
    for name, part in parts.items():
        tensors = list(part.parameters())
        if any(tensor.is_meta for tensor in tensors):
            raise ValueError(
                f"The pipeline's {name} is on the device 'meta' and has no weights: load the pipeline again."
            )
        if any(tensor.is_inference() for tensor in tensors):
            raise ValueError(
                f"The pipeline's {name} was loaded inside a `torch.inference_mode()`, so that nothing can be computed "
                "from it with gradients: load the pipeline outside of it."
            )
    layers = [module for module in flow.transformer.modules() if isinstance(module, (Attention, AttentionModuleMixin))]
    if any(layer.fused_projections for layer in layers):
        raise ValueError(
            "The transformer's attention is fused (`fuse_qkv_projections`), which passes by the layers that a LoRA "
            "adapts: call `unfuse_qkv_projections()` on it first."
        )
    _refuse_compiled(flow.transformer)


def _refuse_compiled(transformer: nn.Module) -> None:
    """Raises `ValueError` for a network, or a block of it, that `compile()` changed in place.

    torch keeps that in `_compiled_call_impl` alone, which is private.
    """
    if any(module._compiled_call_impl is not None for module in transformer.modules()):
        raise ValueError(
            "The pipeline's transformer is compiled in place (`transformer.compile()`), and an adapter would change "
            "what was compiled: pass the pipeline as it is before compilation."
        )


def check_mergeable(transformer: nn.Module) -> None:
    """Raises `ValueError` for a network with an adapter whose weights are quantised or too coarse."""
    if is_quantized(transformer):
        raise ValueError(
            "`merge_adapter` is True, but the weights are quantised, and nothing can be added to them: leave it out."
        )
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    dtypes = {parameter.dtype for layer in layers for parameter in layer.get_base_layer().parameters(recurse=False)}
    if dtypes != {torch.float32}:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(
            f"`merge_adapter` is True, but the weights are {names}, which rounds small changes away: leave it out, or "
            "load the model in float32."
        )


def check_sigmas(sigmas: Tensor) -> None:
    """Raises `ValueError` for noise levels (N + 1,) of a scheduler that do not fall from 1, or below, to 0."""
    falls = bool((sigmas[1:] < sigmas[:-1]).all())
    if not (falls and sigmas.isfinite().all() and 0 < sigmas[0] <= 1 and sigmas[-1] == 0):
        shown = ", ".join(f"{sigma:.3g}" for sigma in sigmas[:8].tolist())
        raise ValueError(
            f"The noise levels of the pipeline's scheduler ({shown}, ...) do not fall from 1 to 0: load the scheduler "
            "with the settings that the model was trained with."
        )
