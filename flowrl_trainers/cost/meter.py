"""`Meter`: what a piece of work allocates and computes, measured without doing it.

On torch's meta device a tensor has a shape and no numbers, so a network of any size runs in seconds. Two things behave
otherwise there than on a GPU, and are put right: attention and root-mean-square norms would be taken apart, so that a
whole attention matrix would be counted; and autocast would do nothing.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Meter(TorchDispatchMode):
    """Inside, counts bytes of storages that are made (and die), floating-point operations and ATen operations.

    Attributes:
        peak: The most bytes that were alive at a time, beside those that were before.
        flop: Floating-point operations of matrix products, convolutions and attention.
        operations: ATen operations that make a new tensor: about the number of kernels that a GPU starts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.flop = self.operations = 0
        self._known: set[int] = set()

    def note(self, tensor: Tensor) -> None:
        """Count the storage of a tensor unless it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        found = [t for t in _tensors(out) if t.untyped_storage()._cdata not in given]
        if found:
            self.operations += 1
        for tensor in found:
            self.note(tensor)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flop += int(count(*args, **kwargs, out_val=out))
        return out


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


class _Attention(torch.autograd.Function):
    """Attention by shape alone: what a fused kernel keeps is queries, keys, values, output and a log-sum-exp a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, meter: Meter) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        rows = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, rows)
        ctx.meter = meter
        meter.flop += _attention_flop(q, k, v)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        # Five products in place of two: the fused kernels compute the scores again.
        ctx.meter.flop += 5 * _attention_flop(q, k, v) // 2
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def _attention_flop(q: Tensor, k: Tensor, v: Tensor) -> int:
    rows, columns = q.shape[:-1].numel(), k.shape[-2]
    return 2 * rows * columns * (q.shape[-1] + v.shape[-1])


class _RMSNorm(torch.autograd.Function):
    """The root-mean-square norm by shape alone: a fused kernel keeps the input and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, _ = ctx.saved_tensors
        return torch.empty_like(x), None


# What autocast does on CUDA, by function: see "CUDA ops that can autocast" in torch's documentation.
_HALF = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    F.scaled_dot_product_attention, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.mv,
    torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.addmm,
}  # fmt: skip
_FLOAT = {
    F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.softplus, F.mse_loss, F.normalize, torch.softmax,
    torch.exp, torch.log, torch.pow, torch.rsqrt, torch.reciprocal, torch.sum, torch.prod, torch.cumsum,
    torch.norm, torch.linalg.vector_norm, torch.layer_norm, torch.group_norm, Tensor.exp, Tensor.log, Tensor.pow,
    Tensor.__pow__, Tensor.rsqrt, Tensor.reciprocal, Tensor.softmax, Tensor.sum, Tensor.prod, Tensor.cumsum,
    Tensor.norm, F.interpolate,
}  # fmt: skip


class LikeAGPU(TorchFunctionMode):
    """Inside, attention is fused, and functions take their inputs in the precision that autocast gives them on a GPU.

    Args:
        meter: Where the operations of attention are counted.
        autocast: The lower precision of a context that asks for autocast; None without one.
        keeps_casts: Whether autocast keeps what it casts of trained weights until the forward pass ends.
    """

    def __init__(self, meter: Meter, autocast: torch.dtype | None, keeps_casts: bool = True) -> None:
        super().__init__()
        self.meter, self.autocast, self.keeps_casts = meter, autocast, keeps_casts
        # With the weight, as an id is that of one tensor as long as it lives.
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            self._casts.clear()
        if self.autocast is not None:
            wanted = self.autocast if func in _HALF else torch.float32 if func in _FLOAT else None
            if wanted is not None:
                args, kwargs = self._cast(args, wanted), self._cast(kwargs, wanted)
        if func is F.scaled_dot_product_attention:
            q, k, v = (kwargs.get(name, args[i] if i < len(args) else None) for i, name in enumerate(_QKV))
            return _Attention.apply(q, k, v, self.meter)
        if func in (F.rms_norm, torch.rms_norm):
            x, weight = (kwargs.get(name, args[i] if i < len(args) else None) for i, name in _RMS_NORM)
            if weight is None or not weight.requires_grad:
                return _RMSNorm.apply(x, weight)
        return func(*args, **kwargs)

    def _cast(self, values: Any, dtype: torch.dtype) -> Any:
        if isinstance(values, Tensor):
            if not values.is_floating_point() or values.dtype == dtype:
                return values
            is_trained_weight = values.is_leaf and values.requires_grad
            if not (self.keeps_casts and is_trained_weight):
                return values.to(dtype)
            if id(values) not in self._casts:
                self._casts[id(values)] = values, values.to(dtype)
            return self._casts[id(values)][1]
        if isinstance(values, dict):
            return {name: self._cast(value, dtype) for name, value in values.items()}
        if isinstance(values, (list, tuple)):
            return type(values)(self._cast(value, dtype) for value in values)
        return values


_RMS_NORM = ((0, "input"), (2, "weight"))
_QKV = ("query", "key", "value")


@contextmanager
def metered(autocast: torch.dtype | None = None, keeps_casts: bool = True) -> Iterator[Meter]:
    """A context whose work is measured as on a GPU.

    Args:
        autocast: The lower precision that a trainer asks for, if any.
        keeps_casts: See `LikeAGPU`.
    """
    meter = Meter()
    with meter, LikeAGPU(meter, autocast, keeps_casts):
        yield meter
