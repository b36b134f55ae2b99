"""`PipelineState`: how the parts of a pipeline are, so that a trainer can leave them as the user gave them."""

import logging
from collections.abc import Collection
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..pipelines import FlowPipeline
from ..sampling.sharding import is_sharded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorState:
    """The precision of a parameter or buffer, whether it takes a gradient and, where asked for, its numbers.

    It is known by its module, as adapters change the names of parameters, and moving a module replaces its buffers.
    """

    module: nn.Module
    name: str
    dtype: torch.dtype
    requires_grad: bool
    kept: Tensor | None

    def restore(self, trained: Collection[int]) -> None:
        """trained: by `id`, the parameters that stay as they are."""
        tensor: Tensor = getattr(self.module, self.name)
        if id(tensor) in trained:
            return
        if not isinstance(tensor, nn.Parameter):
            setattr(self.module, self.name, self._as_it_was(tensor))
            return
        if tensor.dtype != self.dtype:
            tensor.data = self._as_it_was(tensor.data)
        tensor.requires_grad_(self.requires_grad)

    def _as_it_was(self, tensor: Tensor) -> Tensor:
        if tensor.dtype == self.dtype or self.kept is None:
            return tensor.to(self.dtype)
        return self.kept.to(tensor.device)


class PartState:
    """Mode, gradient checkpointing, compilation, device, tensors and adapters of one network.

    Of adapters that come later, the device alone is changed with that of the network.

    Args:
        part: The network.
        keep: Whether its numbers are kept, in the memory of the host, for a precision that rounds them meanwhile.
    """

    def __init__(self, part: nn.Module, keep: bool = False) -> None:
        self.part, self.training = part, part.training
        self.checkpointing = isinstance(part, ModelMixin) and part.is_gradient_checkpointing
        self.device = _device(part)
        self.tensors = [
            TensorState(
                module, name, tensor.dtype, tensor.requires_grad, tensor.detach().cpu().clone() if keep else None
            )
            for module in part.modules()
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        ]
        layers = [module for module in part.modules() if isinstance(module, BaseTunerLayer)]
        # Private to torch, which has no public way to ask whether a module was compiled in place, nor to undo it.
        self.compiled = [(module, module._compiled_call_impl) for module in part.modules()]
        self.adapters = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in layers]

    def restore(self, trained: Collection[int]) -> None:
        """trained: see `TensorState.restore`."""
        part = self.part
        part.train(self.training)
        if isinstance(part, ModelMixin) and part.is_gradient_checkpointing != self.checkpointing:
            if self.checkpointing:
                part.enable_gradient_checkpointing()
            else:
                part.disable_gradient_checkpointing()
        for module, call in self.compiled:
            module._compiled_call_impl = call
        for layer, active, disabled in self.adapters:
            if list(layer.active_adapters) != active:
                layer.set_adapter(active)
            if layer.disable_adapters != disabled:
                layer.enable_adapters(not disabled)
        for tensor in self.tensors:  # only now, as switching adapters changes what takes a gradient
            tensor.restore(trained)
        self._move_back()

    def _move_back(self) -> None:
        place = _device(self.part)
        if place == self.device or any(is_sharded(module) for module in self.part.modules()):  # which stays sharded
            return
        try:
            self.part.to(self.device)
        except torch.OutOfMemoryError:
            self.part.to(place)
            name = type(self.part).__name__
            logger.warning("%s no longer fits on %s, where it was: it stays on %s.", name, self.device, place)


def _device(part: nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in part.parameters()), None)


class PipelineState:
    """How the parts of a pipeline are that training places, casts, freezes or switches; a scheduler is never changed.

    Args:
        flow: The pipeline.
        keep_decoders: Whether the numbers of decoders are kept, as their precision will round them.
    """

    def __init__(self, flow: FlowPipeline, keep_decoders: bool = False) -> None:
        self.transformer = flow.transformer
        self.parts = [PartState(part) for part in (flow.transformer, *flow.text_encoders())]
        self.parts += [PartState(part, keep_decoders) for part in flow.decoders()]

    def restore(self, trained: Collection[nn.Parameter] = ()) -> None:
        """Make the parts as they were, but for what was learned.

        Args:
            trained: Parameters that keep their precision and take gradients as they do; they move with their network.
        """
        ids = {id(parameter) for parameter in trained}
        for part in self.parts:
            part.restore(ids)

    def restore_without_adapter(self) -> None:
        """Make the parts as they were; an adapter that was made since is taken away."""
        if not self.parts[0].adapters and isinstance(self.transformer, PeftAdapterMixin):
            self.transformer.unload_lora()
        self.restore()
