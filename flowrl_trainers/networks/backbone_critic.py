"""`BackboneCritic`: a critic of noisy states that sees with the base network."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor, nn

from ..flow import clean_estimate, expand_like
from .value_network import time_features

RANK = 16  # of the adapter; its alpha is twice that
WIDTH = 64  # of the head

Velocity = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""Maps a network, latents (B, ...), levels (B,) and conditioning to the conditional velocity (B, ...), float32."""


class BackboneCritic(nn.Module):
    """The base network with a LoRA of its own, and a head at every place of its output.

    A network that draws pictures can read them while they are noisy, and knows what prompts mean; a small one that
    starts from nothing does not learn to. Nothing of the base network is copied: the critic has the modules of the
    base for itself, but their weights are the same tensors, so that neither its adapter nor its gradients are seen by
    the network that is trained. An untrained critic returns exactly zero.

    Its parameters, and what is saved of it, are the LoRA and the head.

    Args:
        network: The base network; an adapter that it carries is left out.
        velocity: Calls it.
        channels: Of the latents, their first dimension.
        target_modules: The names of the layers that the LoRA adapts.
        exclude_modules: Those among them that it leaves out.

    Raises:
        ValueError: For a network that takes no adapter.
    """

    backbone: Any  # a `ModelMixin` of diffusers
    velocity: Velocity

    def __init__(
        self,
        network: nn.Module,
        velocity: Velocity,
        channels: int,
        target_modules: Sequence[str],
        exclude_modules: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not isinstance(network, PeftAdapterMixin) or not target_modules:
            raise ValueError(
                f"`critic` ('backbone') needs a network that takes adapters and the `lora_target_modules` of its "
                f"pipeline, but {type(network).__name__} lacks one of them: take 'default', or pass a critic of your "
                "own."
            )
        backbone = _with_the_same_weights(network)
        config = LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=list(target_modules),
            exclude_modules=list(exclude_modules) or None,
        )
        backbone.add_adapter(config, "critic")
        cast_training_params(backbone, dtype=torch.float32)
        trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
        self.adapter = nn.ParameterDict({name.replace(".", "/"): p for name, p in trained.items()})
        self.places = nn.Sequential(
            nn.Conv2d(2 * channels + 3, WIDTH, 3, padding=1), nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 1), nn.SiLU()
        )
        self.out = nn.Linear(WIDTH, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        # Outside of the module's own bookkeeping: the weights of the base are not the critic's to train or to save.
        object.__setattr__(self, "backbone", backbone.eval())
        object.__setattr__(self, "velocity", velocity)

    def forward(self, latents: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """The values (B,) of noisy states.

        Args:
            latents: (B, C, h, w), or vectors (B, d), float32.
            sigma: The noise levels (B,).
            conditioning: What the base network reads of B prompts.
        """
        v = self.velocity(self.backbone, latents, sigma, conditioning)
        seen = torch.cat([v, clean_estimate(latents, v, sigma)], dim=1)
        seen = seen if seen.dim() == 4 else seen[:, :, None, None]
        time = expand_like(time_features(sigma), seen).expand(-1, -1, *seen.shape[2:])
        with torch.autocast(latents.device.type, enabled=False):
            return self.out(self.places(torch.cat([seen, time], dim=1)).mean(dim=(2, 3))).squeeze(1)


def _with_the_same_weights(network: Any) -> Any:
    """A network with modules of its own, whose parameters and buffers are those of the given one, without adapters."""
    shared = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    clone = copy.deepcopy(network, shared)
    clone.unload_lora()
    return clone
