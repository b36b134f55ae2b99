"""Published checkpoints, and what their cards advise: the table behind docs and warnings."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the Hub and what its model card advises.

    Attributes:
        id: The id on the Hub.
        distilled: Whether the checkpoint was distilled to few steps; a guidance scale is then of no use.
        steps: The number of sampler steps that the card advises.
        guidance: The guidance scale that the card advises; 1 is off (0 for Z-Image).
        licence: The name of the licence.
        gated: Whether the Hub asks the user to accept the licence.
    """

    id: str
    distilled: bool
    steps: int
    guidance: float
    licence: str
    gated: bool

    def advice(self, num_inference_steps: int, guidance_scale: float) -> list[str]:
        """Warnings about settings that do not suit the checkpoint."""
        said = []
        if self.distilled and num_inference_steps > 2 * self.steps:
            said.append(
                f"{self.id} is distilled to {self.steps} steps, but `num_inference_steps` is {num_inference_steps}: "
                f"take about {self.steps}, or an undistilled checkpoint."
            )
        if not self.distilled and num_inference_steps < self.steps // 4:
            said.append(
                f"{self.id} is not distilled, and its card advises {self.steps} steps: with {num_inference_steps} its "
                "pictures are blurred before tuning."
            )
        if self.distilled and guidance_scale > self.guidance:
            said.append(f"{self.id} is distilled, but `guidance_scale` is {guidance_scale}: set {self.guidance:g}.")
        return said


def _checkpoints(*rows: Checkpoint) -> dict[str, Checkpoint]:
    return {row.id: row for row in rows}


CHECKPOINTS = _checkpoints(
    Checkpoint("stabilityai/stable-diffusion-3-medium-diffusers", False, 28, 7.0, "Stability AI Community", True),
    Checkpoint("stabilityai/stable-diffusion-3.5-medium", False, 40, 4.5, "Stability AI Community", True),
    Checkpoint("stabilityai/stable-diffusion-3.5-large", False, 28, 3.5, "Stability AI Community", True),
    Checkpoint("stabilityai/stable-diffusion-3.5-large-turbo", True, 4, 1.0, "Stability AI Community", True),
    Checkpoint("black-forest-labs/FLUX.1-dev", False, 50, 3.5, "FLUX non-commercial", True),
    Checkpoint("black-forest-labs/FLUX.1-schnell", True, 4, 1.0, "Apache-2.0", True),
    Checkpoint("black-forest-labs/FLUX.2-dev", False, 50, 4.0, "FLUX non-commercial", True),
    Checkpoint("black-forest-labs/FLUX.2-klein-4B", True, 4, 1.0, "Apache-2.0", False),
    Checkpoint("black-forest-labs/FLUX.2-klein-base-4B", False, 50, 4.0, "Apache-2.0", False),
    Checkpoint("black-forest-labs/FLUX.2-klein-9B", True, 4, 1.0, "FLUX non-commercial", True),
    Checkpoint("black-forest-labs/FLUX.2-klein-base-9B", False, 50, 4.0, "FLUX non-commercial", True),
    Checkpoint("Qwen/Qwen-Image", False, 50, 4.0, "Apache-2.0", False),
    Checkpoint("Tongyi-MAI/Z-Image", False, 50, 4.0, "Apache-2.0", False),
    Checkpoint("Tongyi-MAI/Z-Image-Turbo", True, 9, 0.0, "Apache-2.0", False),
    Checkpoint("Efficient-Large-Model/Sana_1600M_1024px_diffusers", False, 20, 4.5, "NVIDIA non-commercial", False),
    Checkpoint("Alpha-VLLM/Lumina-Image-2.0", False, 50, 4.0, "Apache-2.0", False),
    Checkpoint("fal/AuraFlow", False, 50, 3.5, "Apache-2.0", False),
    Checkpoint("THUDM/CogView4-6B", False, 50, 3.5, "Apache-2.0", False),
    Checkpoint("lodestones/Chroma1-HD", False, 40, 3.0, "Apache-2.0", False),
)


def table() -> str:
    """The checkpoints in Markdown."""
    lines = ["| checkpoint | kind | steps | guidance scale | licence | gated |", "|---|---|---:|---:|---|---|"]
    for c in CHECKPOINTS.values():
        kind, gated = "distilled" if c.distilled else "base", "yes" if c.gated else "no"
        lines.append(f"| `{c.id}` | {kind} | {c.steps} | {c.guidance:g} | {c.licence} | {gated} |")
    return "\n".join(lines)
