"""`attention_backend`: which of diffusers' kernels computes attention."""

from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from torch import nn

from ..suggestions import did_you_mean

BACKENDS = [backend.value for backend in AttentionBackendName]
HEAD = 64  # channels of a head of the trial, which all kernels take


def check_backend_name(name: str) -> None:
    """Raises `ValueError` for a kernel that diffusers does not know."""
    if name not in BACKENDS:
        raise ValueError(f"`attention_backend` ({name!r}) is none of diffusers'{did_you_mean([name], BACKENDS)}.")


def attention_by(name: str | None) -> AbstractContextManager[None]:
    """A context in which attention is computed by the kernel of that name; None for diffusers' present one."""
    return nullcontext() if name is None else attention_backend(name)


def check_attention_backend(network: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Try the kernel forward and backward on a few numbers.

    Args:
        network: The transformer, on the device where it will compute.
        name: A member of `BACKENDS`.
        dtype: The precision in which it will compute.

    Raises:
        ValueError: The network's attention passes by diffusers' choice of kernels, or the kernel does not work here,
            or has no gradient.
    """
    layers = [module for module in network.modules() if isinstance(module, AttentionModuleMixin)]
    # Private to diffusers, which has no public way to ask whether a processor passes its tensors on to the kernels.
    if not any("_attention_backend" in vars(type(layer.processor)) for layer in layers):
        raise ValueError(
            f"`attention_backend` ({name!r}) has no effect on {type(network).__name__}, whose attention is torch's in "
            "any case: leave it out."
        )
    device = next(network.parameters()).device
    query = torch.ones(1, 2, 1, HEAD, device=device, dtype=dtype, requires_grad=True)
    try:
        with attention_backend(name):
            found = dispatch_attention_fn(query, query, query)
            torch.autograd.grad(found.float().sum(), query)
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"`attention_backend` ({name!r}) cannot compute attention and its gradient in {dtype} on {device} "
            f"({reason}): leave it out, or take 'native'."
        ) from error
