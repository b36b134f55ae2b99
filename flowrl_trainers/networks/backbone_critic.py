"""`BackboneCritic`: a critic of noisy states that sees with the base network."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from .value_network import time_features

RANK = 16  # of the adapter; its alpha is twice that
WIDTH = 64  # of the head

Velocity = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""Maps a network, latents (B, ...), levels (B,) and conditioning to the conditional velocity (B, ...), float32."""


class BackboneCritic(nn.Module):
    """The base network with a LoRA of its own, and a head at every place of its last features.

    A network that draws pictures can read them while they are noisy, and knows what prompts mean; a small one that
    starts from nothing does not learn to. Nothing of the base network is copied: the critic has the modules of the
    base for itself, but their weights are the same tensors, so that neither its adapter nor its gradients are seen by
    the network that is trained. An untrained critic returns exactly zero.

    Its parameters, and what is saved of it, are the LoRA and the head.

    Args:
        network: The base network; an adapter that it carries is left out.
        velocity: Calls it.
        read: The name of the layer whose input, features (B, L, D) of L places, the head reads.
        example: Latents (1, ...) and the conditioning of their prompt, on the network's device, to find D.
        target_modules: The names of the layers that the LoRA adapts.
        exclude_modules: Those among them that it leaves out.
        mask: Says which tokens (B, L) of B prompts count, for a layer whose input has the same places for equally long
            prompts alone; these are read together then.

    Raises:
        ValueError: For a network that takes no adapter.
    """

    backbone: Any  # a `ModelMixin` of diffusers
    velocity: Velocity

    def __init__(
        self,
        network: nn.Module,
        velocity: Velocity,
        read: str,
        example: tuple[Tensor, Mapping[str, Tensor]],
        target_modules: Sequence[str],
        exclude_modules: Sequence[str] = (),
        mask: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, PeftAdapterMixin) or not target_modules:
            raise ValueError(
                f"`critic` ('backbone') needs a network that takes adapters and the `lora_target_modules` of its "
                f"pipeline, but {type(network).__name__} lacks one of them: take 'reward_of_estimate', or "
                "'module' with a critic of your own."
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
        # Outside of the module's own bookkeeping: the weights of the base are not the critic's to train or to save.
        object.__setattr__(self, "backbone", backbone.eval())
        object.__setattr__(self, "velocity", velocity)
        self.mask = mask
        self._features = torch.empty(0)
        backbone.get_submodule(read).register_forward_pre_hook(self._keep)
        latents, conditioning = example
        with torch.no_grad():
            seen = self._read(latents, latents.new_full((1,), 0.5), conditioning)
        self.places = nn.Sequential(nn.Linear(seen.shape[-1], WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.time = nn.Sequential(nn.Linear(3, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.out = nn.Linear(WIDTH, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, latents: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """The values (B,) of noisy states.

        Args:
            latents: (B, ...), float32.
            sigma: The noise levels (B,).
            conditioning: What the base network reads of B prompts.
        """
        if self.mask is None:
            return self._values(latents, sigma, conditioning)
        lengths = self.mask(conditioning).sum(dim=1)
        groups = [(lengths == length).nonzero().squeeze(1) for length in lengths.unique()]
        found = [
            self._values(latents[rows], sigma[rows], {name: value[rows] for name, value in conditioning.items()})
            for rows in groups
        ]
        return torch.cat(found)[torch.cat(groups).argsort()]

    def _values(self, latents: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Those of states whose features have the same places; arguments as in `forward`."""
        seen = self._read(latents, sigma, conditioning)
        with torch.autocast(latents.device.type, enabled=False):
            at_places = self.places(layer_norm(seen.float(), seen.shape[-1:]))
            time = self.time(time_features(sigma))[:, None]
            return self.out(silu(at_places + time)).mean(dim=1).squeeze(1)

    def _read(self, latents: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """The features (B, L, D) that the network has of noisy states; arguments as in `forward`."""
        self.velocity(self.backbone, latents, sigma, conditioning)
        found, self._features = self._features, torch.empty(0)
        return found

    def _keep(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]


def _with_the_same_weights(network: Any) -> Any:
    """A network with modules of its own, whose parameters and buffers are those of the given one, without adapters."""
    shared = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    clone = copy.deepcopy(network, shared)
    clone.unload_lora()
    return clone
