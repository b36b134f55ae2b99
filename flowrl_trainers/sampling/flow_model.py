"""The module that `transformers.Trainer` sees."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal

import torch
import torch._dynamo
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..pipelines import Conditioning, FlowPipeline
from .merged_adapter import MergedAdapter
from .sharding import is_sharded, shard

BACKEND = "inductor"
GRAPHS = 64  # of one class of blocks; ten have been seen in a run


def allow_graphs() -> None:
    """Raise torch's limit of graphs to what compiled blocks need.

    In torch 2.6 it is one of the process, and in 2.13 one of the thread; the argument of `compile` is newer than 2.6.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS)


class FlowModel(nn.Module):
    """The transformer of a `FlowPipeline` and the head that an algorithm trains beside it, such as a value-gradient
    network.

    All trainable compute goes through `forward`, so that the hooks of wrappers fire. It has no `config`, because
    Trainer and its trackers expect the config of a language model there.

    Args:
        flow: Says how the transformer is called.
        has_adapter: Whether a LoRA is trained; else a frozen copy is made of the transformer.
        dtypes: The precision of the copy's parameters by name; None for those of the trained ones.
    """

    flow: FlowPipeline
    frozen: nn.Module | None
    transformer: nn.Module

    def __init__(self, flow: FlowPipeline, has_adapter: bool, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        super().__init__()
        self.transformer = flow.transformer
        # Outside of the module's own bookkeeping: neither the pipeline nor the frozen copy is trained, saved or
        # wrapped.
        frozen = None if has_adapter else deepcopy(flow.transformer).requires_grad_(False).eval()
        if frozen is not None and dtypes is not None:
            for name, parameter in frozen.named_parameters():
                parameter.data = parameter.data.to(dtypes[name])
        object.__setattr__(self, "flow", flow)
        object.__setattr__(self, "frozen", frozen)
        self.has_adapter, self.use_frozen = has_adapter, False
        self.merged_adapter = MergedAdapter(self.transformer) if has_adapter else None
        # By name, as the parameters of the base model take gradients again while the trainer does not work.
        self.trained_names = {name for name, p in flow.transformer.named_parameters() if p.requires_grad}
        """Those of the transformer's parameters that training changes; the adapter's also while it is switched off."""

    def attach_head(self, name: str, head: nn.Module) -> None:
        """Train a network beside the transformer; name: of its folder, its metrics, its tensors in checkpoints."""
        self.add_module(name, head)

    @property
    def heads(self) -> dict[str, nn.Module]:
        """The networks that are trained beside the transformer, by name: one, or none."""
        return {name: module for name, module in self.named_children() if name != "transformer"}

    @property
    def head(self) -> nn.Module | None:
        """The network that is trained beside the transformer."""
        return next(iter(self.heads.values()), None)

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        guidance: bool,
        part: Literal["velocity", "head"] = "velocity",
    ) -> Tensor:
        """The velocity at latents, float32; see `FlowPipeline.velocity`. Or what the head says of them.

        The head computes in float32: finite differences of it are taken.

        Args:
            latents: (B, ...).
            sigma: (B,).
            conditioning: Of B prompts.
            guidance: Whether the velocity is the guided one; the head knows no guidance.
            part: Which of the two is asked for.
        """
        if part == "velocity":
            return self.flow.velocity(self.active_transformer, latents, sigma, conditioning, guidance=guidance)
        assert self.head is not None
        features, mask = self.flow.prompt_features(conditioning)
        with torch.autocast(latents.device.type, enabled=False):
            return self.head(latents, sigma, features.float(), mask)

    @property
    def active_transformer(self) -> nn.Module:
        """The trained transformer, or the reference inside `reference()`."""
        return self.transformer if self.frozen is None or not self.use_frozen else self.frozen

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is the frozen one that training started from: its adapter is off, or a frozen copy stands
        in.

        Call `backward` before leaving this context: activation checkpointing runs the forward pass again, and would
        run it with the adapter on.
        """
        if self.frozen is not None:
            self.use_frozen = True
            try:
                yield
            finally:
                self.use_frozen = False
        else:
            assert self.merged_adapter is not None
            adapted: Any = self.transformer  # a `PeftAdapterMixin`
            with self.merged_adapter.aside():
                adapted.disable_adapters()
                try:
                    yield
                finally:
                    adapted.enable_adapters()

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that training changes."""
        return list(self._named_trained_parameters().values())

    def _named_trained_parameters(self) -> dict[str, nn.Parameter]:
        base = {f"transformer.{n}" for n, _ in self.transformer.named_parameters() if n not in self.trained_names}
        return {name: p for name, p in self.named_parameters() if p.requires_grad and name not in base}

    def trained_tensors(self) -> dict[str, Tensor]:
        """The trained parameters, and the buffers (running statistics) of networks that are trained whole."""
        tensors: dict[str, Tensor] = {**self._named_trained_parameters()}
        for part, network in self.named_children():
            if part != "transformer" or not self.has_adapter:
                kept = network.state_dict(keep_vars=True)
                tensors |= {f"{part}.{name}": buffer for name, buffer in network.named_buffers() if name in kept}
        return tensors

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the parameters alone; see `shard`."""
        return is_sharded(self)

    def shard(self, accelerator: Accelerator) -> None:
        """Spread the network, its heads and its frozen copy over the processes, each block by itself (FSDP2).

        From now on all processes must call the model together, and no part of it by itself.
        """
        shard(accelerator, self, self.flow.blocks(self.transformer))
        if self.frozen is not None:
            shard(accelerator, self.frozen, self.flow.blocks(self.frozen))

    def reduce_at_once(self) -> None:
        """Of a sharded network: let the next backward pass spread its gradients, though others follow before the step.

        Trainer has FSDP keep them whole until the last micro-batch of an update.
        """
        assert isinstance(self, FSDPModule)
        self.set_requires_gradient_sync(True)

    def compile_blocks(self) -> None:
        """Compile the repeated blocks of the transformer, and of its frozen copy, in place.

        One graph serves all blocks of a class. There is one for every combination of adapter on or off, with or
        without gradients, batch size fixed or not, and kind of block, so that torch's limit of 8 is raised. Past the
        limit, and for a block that is not one graph, torch raises, where without `fullgraph` it would go on uncompiled
        in silence.

        Raises:
            ValueError: For a model that names no blocks.
        """
        networks = [self.transformer] if self.frozen is None else [self.transformer, self.frozen]
        for network in networks:
            blocks = self.flow.blocks(network)
            if not blocks:
                raise ValueError(
                    f"`compile_blocks` is True, but {type(self.flow).__name__} names no blocks of its network: set "
                    "its `repeated_blocks`, or leave `compile_blocks` out."
                )
            for block in blocks:
                block.compile(fullgraph=True, backend=BACKEND)
        allow_graphs()

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | str | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """What Trainer calls for `activation_checkpointing=True`; diffusers checkpoints every block, in its own way.

        Args:
            activation_checkpointing_kwargs: Must be None or empty.
            every_n_layers: Must be 1.
            offload: Must be False.

        Raises:
            ValueError: For other arguments, and for a network that is no `ModelMixin` of diffusers.
        """
        if activation_checkpointing_kwargs or every_n_layers != 1 or offload:
            raise ValueError(
                "`activation_checkpointing_kwargs` must be left out: diffusers checkpoints every block in its own way."
            )
        for network in [self.transformer] if self.frozen is None else [self.transformer, self.frozen]:
            if not isinstance(network, ModelMixin):
                kind = type(network).__name__
                raise ValueError(
                    f"`activation_checkpointing` is True, but {kind} is no `ModelMixin` of diffusers: set it to False."
                )
            network.enable_gradient_checkpointing()
