"""The module that `transformers.Trainer` sees."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from torch import nn

from ..pipelines import Conditioning, FlowPipeline


class FlowModel(nn.Module):
    """The transformer of a `FlowPipeline` and the head that an algorithm trains beside it, such as a value-gradient network.

    All trainable compute goes through `forward`, so that the hooks of wrappers fire. It has no `config`, because Trainer and its trackers
    expect the config of a language model there.
    """

    flow: FlowPipeline
    frozen: nn.Module | None
    transformer: nn.Module
    head: nn.Module | None

    def __init__(self, flow: FlowPipeline, has_adapter: bool) -> None:
        super().__init__()
        self.transformer, self.head = flow.transformer, None
        # Outside of the module's own bookkeeping: neither the pipeline nor the frozen copy is trained, saved or wrapped.
        frozen = None if has_adapter else deepcopy(flow.transformer).requires_grad_(False).eval()
        object.__setattr__(self, "flow", flow)
        object.__setattr__(self, "frozen", frozen)
        self.use_frozen = False

    def forward(
        self,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: Conditioning,
        guidance: bool = False,
        part: Literal["velocity", "head"] = "velocity",
    ) -> torch.Tensor:
        """The velocity at latents (B, ...) and levels sigma (B,), float32; see `FlowPipeline.velocity`. Or what the head says of them.

        The head computes in float32: finite differences of it are taken.
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
        """Inside, the model is the frozen one that training started from: its adapter is off, or a frozen copy stands in.

        Whatever is computed inside must be differentiated inside: activation checkpoints are recomputed with the adapter as it is then.
        """
        if self.frozen is not None:
            self.use_frozen = True
            try:
                yield
            finally:
                self.use_frozen = False
        else:
            adapted: Any = self.transformer  # a `PeftAdapterMixin`
            adapted.disable_adapters()
            try:
                yield
            finally:
                adapted.enable_adapters()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """What Trainer calls for `activation_checkpointing=True`; diffusers checkpoints every block, in its own way."""
        if activation_checkpointing_kwargs or every_n_layers != 1 or offload:
            raise ValueError("`activation_checkpointing_kwargs` must be left out: diffusers checkpoints every block in its own way.")
        for network in [self.transformer] if self.frozen is None else [self.transformer, self.frozen]:
            if not isinstance(network, ModelMixin):
                kind = type(network).__name__
                raise ValueError(f"`activation_checkpointing` is True, but {kind} is no `ModelMixin` of diffusers: set it to False.")
            network.enable_gradient_checkpointing()
