"""`KeptLatents`: what the base model drew for an evaluation, kept on disk for the next run."""

from typing import Any

from torch import Generator, Tensor

from ..pipelines import Conditioning
from .evaluator import Sampler
from .flow_model import FlowModel
from .kept_tensors import KeptTensors


class KeptLatents:
    """A sampler of the frozen base model that draws each batch once, in whatever run it is asked for.

    A batch is known by the numbers it starts from (noise, conditioning, state of the generators), and the facts of the
    model, the sampler and the machine; see `KeptTensors`.

    Args:
        sampler: Draws.
        facts: Of the model, the sampler and the precision, plain types alone.
    """

    def __init__(self, sampler: Sampler, facts: dict[str, Any]) -> None:
        self.sampler, self.kept = sampler, KeptTensors("base_latents", facts)

    def __call__(
        self, model: FlowModel, latents: Tensor, conditioning: Conditioning, generators: list[Generator]
    ) -> Tensor:
        """See `Sampler`."""
        states = {f"generator {number}": g.get_state() for number, g in enumerate(generators)}
        found = self.kept.get(
            lambda: {"latents": self.sampler(model, latents, conditioning, generators)},
            latents.device,
            facts={},
            tensors={"latents": latents} | conditioning | states,
        )
        return found["latents"].to(latents.device)
