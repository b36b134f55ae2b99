"""The published architectures that ship as configurations, without a weight, and how a network is built from one.

Networks are built on torch's meta device, where they have shapes and no numbers: nothing is loaded.
"""

import inspect
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import nn

from ... import sit
from ...pipelines import FlowPipeline, families
from ...pipelines.folders import parts_of, read_json
from ...shapes.models import WEIGHTS

FOLDER = Path(__file__).parent
EMBEDDED = ("shapes", "flowrl_trainers.shapes")
META = torch.device("meta")


@dataclass(frozen=True)
class Architecture:
    """What is known of a pipeline without its weights.

    Attributes:
        name: How the user called it.
        pipeline: The name of its class.
        settings: Further arguments of the class, such as `is_distilled`.
        parts: The configuration of every part, with its class under `_class_name`.
    """

    name: str
    pipeline: str
    settings: dict[str, Any]
    parts: dict[str, dict[str, Any]]

    def part(self, name: str, dtype: torch.dtype = torch.float32) -> Any:
        """A network on the meta device, frozen, in evaluation mode."""
        config = dict(self.parts[name])
        kind = _class(config.pop("_class_name"))
        with META:
            is_transformers = issubclass(kind, transformers.PreTrainedModel)
            network = kind(kind.config_class(**config)) if is_transformers else kind.from_config(config)
            network = nn.Module.to(network, dtype=dtype)
        return network.requires_grad_(False).eval()

    def text_encoders(self) -> list[str]:
        """The names of the parts that encode prompts."""
        return [name for name in self.parts if name.startswith("text_encoder")]

    def flow(self, dtype: torch.dtype, settings: dict[str, Any]) -> FlowPipeline:
        """The pipeline as a velocity field, with transformer and decoder on the meta device and without encoders.

        Args:
            dtype: The precision of the transformer.
            settings: See `FlowPipeline.from_pipeline`.

        Raises:
            ValueError: See `FlowPipeline.from_pipeline`.
        """
        scheduler = self.parts["scheduler"]
        made: dict[str, Any] = {
            "transformer": self.part("transformer", dtype),
            "vae": self.part("vae"),
            "scheduler": _class(scheduler["_class_name"]).from_config(scheduler),
        }
        kind, tokens = _class(self.pipeline), self.parts.get("text_encoder", {}).get("max_position_embeddings", 77)
        for name, parameter in inspect.signature(kind.__init__).parameters.items():
            if name.startswith(("text_encoder", "tokenizer")):
                made[name] = _Absent(tokens)
            elif name not in made and parameter.default is parameter.empty and name != "self":
                made[name] = None
        return families.wrap(kind(**made, **self.settings), settings)


class _Absent:
    """Stands where a pipeline has a text encoder or tokenizer, neither of which is asked.

    Args:
        model_max_length: The tokens of a prompt, of which pipelines take note.
    """

    def __init__(self, model_max_length: int) -> None:
        self.model_max_length = model_max_length


def find(model: str) -> Architecture:
    """The architecture of a Hub id, or of a folder that holds a pipeline; nothing is downloaded.

    Args:
        model: One that ships, one in the cache of the Hub, or a folder.

    Raises:
        ValueError: There is none.
    """
    for name, known in shipped().items():
        if model == name or model in known["ids"]:
            return _read_shipped(model, name)
    if model in EMBEDDED:
        return _embedded(model)
    folder = Path(model)
    if not folder.is_dir():
        cached = try_to_load_from_cache(model, "model_index.json") if model.count("/") == 1 else None
        if not isinstance(cached, str):
            raise ValueError(
                f"`model` ({model!r}) is no folder, is not in the cache of the Hub, and its architecture does not "
                "ship with the package: pass a folder with the pipeline's configuration files, or one of "
                f"{', '.join(known_names())}."
            )
        folder = Path(cached).parent
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"`model` ({model!r}) has no `model_index.json`: pass the folder of a whole pipeline.")
    return _read_folder(model, folder)


def known_names() -> list[str]:
    """The names of the models whose architectures ship."""
    return [name for known in shipped().values() for name in known["ids"]]


@cache
def shipped() -> dict[str, dict[str, Any]]:
    """The content of the files in this folder, by name."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.json"))}


def _read_shipped(model: str, name: str) -> Architecture:
    known = shipped()[name]
    base = shipped()[known["same_as"]] if "same_as" in known else known
    return Architecture(model, base["pipeline"], known.get("settings", {}), base["parts"])


def _embedded(model: str) -> Architecture:
    """The pipeline of the shapes; see `shapes.load_pipeline`. Its two text encoders are one network."""
    parts = {name: read_json(WEIGHTS / name / "config.json") for name in ("transformer", "vae")}
    text = read_json(WEIGHTS / "clip" / "config.json")["text_config"] | {"_class_name": "CLIPTextModelWithProjection"}
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    return Architecture(model, "StableDiffusion3Pipeline", {}, parts | {"scheduler": scheduler, "text_encoder": text})


def _read_folder(model: str, folder: Path) -> Architecture:
    index = read_json(folder / "model_index.json")
    parts = {}
    for name in parts_of(index):
        for file in (folder / name / "config.json", folder / name / "scheduler_config.json"):
            if file.is_file():
                parts[name] = read_json(file) | {"_class_name": index[name][1]}
    missing = {"transformer", "vae", "scheduler"} - set(parts)
    if missing:
        raise ValueError(f"`model` ({model!r}) has no configuration of its {min(missing)}: download it again.")
    settings = {k: v for k, v in index.items() if not k.startswith("_") and not isinstance(v, list)}
    return Architecture(model, index["_class_name"], settings, parts)


@cache  # transformers takes a quarter of a second to list its names
def _class(name: str) -> Any:
    """A class of diffusers, of ours, or of transformers."""
    for module in (diffusers, sit, transformers):
        if name in dir(module):
            return getattr(module, name)
    raise ValueError(f"The pipeline has a part of the class {name!r}, which none of its libraries knows: update them.")
