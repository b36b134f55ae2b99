"""`RunFolder`: the files of a run beside its checkpoints."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from diffusers import ModelMixin
from PIL.Image import Image
from safetensors.torch import save_model
from torch import nn

from ..pipelines import FlowPipeline
from ..sampling.pictures import Pictures
from .card import CardFacts, write_card
from .curve import draw_reward_curve
from .gallery import sheet_of, to_pillow
from .text_files import write_json, write_text

CURVE = "reward_curve.png"


class RunFolder:
    """Writes what a run leaves, and knows its last evaluation.

    Args:
        path: The `output_dir`.
        flow: Writes adapter or transformer.
        has_adapter: Which of the two.

    Attributes:
        rows: Of the last evaluation, by label; empty before the first.
        sheet: The picture of the last evaluation.
    """

    def __init__(self, path: Path, flow: FlowPipeline, has_adapter: bool) -> None:
        self.path, self.flow, self.has_adapter = path, flow, has_adapter
        self.rows: dict[str, dict[str, float]] = {}
        self.sheet: Path | None = None

    def write_networks(self, folder: Path, beside: Mapping[str, nn.Module]) -> None:
        """Write the adapter as stock diffusers reads it, or `transformer/`, and the networks trained beside it.

        Args:
            folder: That of the run, or a checkpoint.
            beside: Further networks, by the names of their folders.
        """
        if self.has_adapter:
            self.flow.save_lora(folder)
        else:
            self.flow.save_transformer(folder / "transformer")
        for name, network in beside.items():
            if isinstance(network, ModelMixin):
                network.save_pretrained(folder / name)
            else:
                (folder / name).mkdir(exist_ok=True)
                save_model(network, str(folder / name / "model.safetensors"))

    def write_facts(
        self, folder: Path, settings: Mapping[str, Any], seconds: Mapping[str, float], facts: CardFacts
    ) -> None:
        """Write `config.yaml`, `metrics.json` and the card.

        Args:
            folder: That of the run, or a checkpoint.
            settings: Every setting that differs from its default.
            seconds: By phase.
            facts: What the card says; rows and picture are added here.
        """
        write_text(folder / "config.yaml", yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
        report = self.rows | {"seconds": {phase: round(value, 1) for phase, value in seconds.items()}}
        write_json(folder / "metrics.json", report)
        self.write_card(folder, facts)

    def write_card(self, folder: Path, facts: CardFacts) -> None:
        """Write the card with the rows of the last evaluation, and with its pictures where they lie in the folder."""
        facts = replace(facts, rows=self.rows)
        if folder.resolve() == self.path.resolve():
            sheets = (self.path / "before_after.png", self.sheet)
            sheet = next((path for path in sheets if path is not None and path.exists()), None)
            facts = replace(
                facts,
                picture=None if sheet is None else sheet.relative_to(self.path).as_posix(),
                curve=CURVE if (self.path / CURVE).exists() else None,
                gallery=self._gallery(),
            )
        write_card(folder, facts)

    def _gallery(self) -> list[dict[str, Any]]:
        """Prompt, seed and path of the tuned pictures of the last evaluation."""
        if self.sheet is None or not self.sheet.exists():  # it may have been moved aside with those of an earlier run
            return []
        shown = json.loads(self.sheet.with_suffix(".json").read_text(encoding="utf-8"))
        pairs = zip(shown["prompts"], shown["seeds"], strict=True)
        pictures = [_tuned(self.sheet, i) for i in range(len(shown["prompts"]))]
        found = [
            {"prompt": prompt, "seed": seed, "picture": picture}
            for (prompt, seed), picture in zip(pairs, pictures, strict=True)
        ]
        return [entry for entry in found if (self.path / entry["picture"]).exists()]

    def draw_curve(self, history: list[dict[str, Any]], reward: str) -> None:
        """Draw `reward_curve.png` of what was logged, where that is enough."""
        draw_reward_curve(self.path / CURVE, history, reward)

    def write_sheet(self, base: Pictures, tuned: Pictures, step: int) -> Image:
        """Write `samples/step-N.png`, base and tuned pictures under one another, and a JSON file of their facts.

        The tuned ones are also written one by one, at full size, for the gallery of the card; those of an earlier
        evaluation are deleted.

        Args:
            base: Pictures of the base model.
            tuned: Those of the tuned model, of the same prompts and seeds.
            step: The update that made the weights.

        Returns:
            The sheet.
        """
        folder = self.path / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        sheet, _ = sheet_of({"base": base, "tuned": tuned})
        self.sheet = folder / f"step-{step:06d}.png"
        sheet.save(self.sheet)
        facts = {"prompts": base.prompts, "seeds": base.seeds, "base": base.scores, "tuned": tuned.scores}
        write_json(self.sheet.with_suffix(".json"), facts | {"extra": tuned.extra})
        for earlier in folder.glob("tuned-*.png"):
            earlier.unlink()
        for i, image in enumerate(tuned.images):
            to_pillow(image).save(self.path / _tuned(self.sheet, i))
        return sheet

    def take_up_evaluation(self, checkpoint: Path, step: int) -> None:
        """Take up the last evaluation before a checkpoint, of which its card tells, and its sheet of pictures.

        Args:
            checkpoint: Its folder.
            step: Its update.
        """
        rows = json.loads((checkpoint / "metrics.json").read_text(encoding="utf-8"))
        del rows["seconds"]
        self.rows = {
            label: {name: math.nan if value is None else value for name, value in row.items()}
            for label, row in rows.items()
        }
        sheets = sorted((self.path / "samples").glob("step-*.png"), reverse=True)
        self.sheet = next((sheet for sheet in sheets if self.rows and sheet.stem <= f"step-{step:06d}"), None)


def _tuned(sheet: Path, number: int) -> str:
    """The path of a tuned picture of a sheet, from the folder of the run."""
    return f"samples/{sheet.stem.replace('step', 'tuned')}-{number}.png"
