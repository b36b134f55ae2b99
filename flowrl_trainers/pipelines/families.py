"""Find the family of a diffusers pipeline, and refuse a pipeline that has none."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from ..sit import SiTPipeline
from .aura_flow import AuraFlowFlowPipeline
from .base import FlowPipeline
from .checkpoints import CHECKPOINTS
from .chroma import ChromaFlowPipeline
from .cogview_4 import CogView4FlowPipeline
from .diffusers_pipeline import DiffusersFlowPipeline
from .flux import FluxFlowPipeline
from .flux_2 import Flux2FlowPipeline, Flux2KleinFlowPipeline
from .folders import check_parts, no_pipeline, read_json
from .lumina_2 import Lumina2FlowPipeline
from .quantization import Quantization, quantization_config
from .qwen_image import QwenImageFlowPipeline
from .sana import SanaFlowPipeline
from .sit import SiTFlowPipeline
from .stable_diffusion_3 import StableDiffusion3FlowPipeline
from .z_image import ZImageFlowPipeline

FAMILIES: dict[str, type[DiffusersFlowPipeline]] = {
    "StableDiffusion3Pipeline": StableDiffusion3FlowPipeline,
    "FluxPipeline": FluxFlowPipeline,
    "Flux2Pipeline": Flux2FlowPipeline,
    "Flux2KleinPipeline": Flux2KleinFlowPipeline,
    "QwenImagePipeline": QwenImageFlowPipeline,
    "ZImagePipeline": ZImageFlowPipeline,
    "SanaPipeline": SanaFlowPipeline,
    "Lumina2Pipeline": Lumina2FlowPipeline,
    "AuraFlowPipeline": AuraFlowFlowPipeline,
    "CogView4Pipeline": CogView4FlowPipeline,
    "ChromaPipeline": ChromaFlowPipeline,
    "SiTPipeline": SiTFlowPipeline,
}
SUPPORTED = f"{', '.join(FAMILIES)}; video is not"


def wrap(pipeline: Any, settings: dict[str, Any]) -> FlowPipeline:
    """The `FlowPipeline` of a loaded pipeline; see `FlowPipeline.from_pipeline`."""
    if not isinstance(pipeline, DiffusionPipeline):
        raise ValueError(
            f"`model` is a {type(pipeline).__name__}: pass a Hub id, a folder, a diffusers pipeline, or a "
            "`FlowPipeline` of your own."
        )
    family = FAMILIES.get(type(pipeline).__name__)
    if family is None:
        raise ValueError(
            f"{type(pipeline).__name__} is not a supported family ({SUPPORTED}): for a flow-matching model of your "
            "own, subclass `FlowPipeline`."
        )
    scheduler = pipeline.components["scheduler"]
    sana = family is SanaFlowPipeline and _is_sana_solver(scheduler)
    if not (sana or isinstance(scheduler, FlowMatchEulerDiscreteScheduler)):
        raise ValueError(
            f"The pipeline's scheduler is {type(scheduler).__name__}, which is not the Euler sampler of flow "
            "matching: set `pipeline.scheduler` to a `FlowMatchEulerDiscreteScheduler` if the model was trained by "
            "flow matching."
        )
    return family(pipeline, **_known(settings, type(pipeline).__name__))


def _is_sana_solver(scheduler: Any) -> bool:
    """Whether it is the solver that Sana ships with, which integrates the same flow."""
    return isinstance(scheduler, DPMSolverMultistepScheduler) and scheduler.config.prediction_type == "flow_prediction"


def _known(settings: dict[str, Any], class_name: str) -> dict[str, Any]:
    """The settings that are not None; raises `ValueError` for a setting that the pipeline's family does not have."""
    settings = {name: value for name, value in settings.items() if value is not None}
    known = FAMILIES[class_name].setting_names()
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(
            f"{class_name} has no setting {', '.join(f'`{name}`' for name in unknown)}: "
            f"it takes {', '.join(f'`{name}`' for name in known)}."
        )
    return settings


@dataclass(frozen=True)
class Loading:
    """The precision in which networks are loaded.

    Attributes:
        dtype: That in which they compute.
        transformer: The quantisation of the network that is trained.
        text_encoders: That of the text encoders.
    """

    dtype: torch.dtype
    transformer: Quantization | None = None
    text_encoders: Quantization | None = None

    def arguments(self, parts: Iterable[str]) -> dict[str, Any]:
        """Those of diffusers' `from_pretrained` for a pipeline with these parts."""
        found = quantization_config(self.transformer, self.text_encoders, parts, self.dtype)
        return {"dtype": self.dtype} | ({} if found is None else {"quantization_config": found})


def load(id_or_folder: str | Path, loading: Loading, settings: dict[str, Any]) -> DiffusionPipeline:
    """Load a pipeline by diffusers, but refuse what cannot work before anything large is downloaded.

    Args:
        id_or_folder: The id of a model on the Hub, or a folder that holds a pipeline.
        loading: The precision of the networks.
        settings: The settings that `wrap` will get; only their names are checked.

    Returns:
        The pipeline.

    Raises:
        ValueError: There is no such pipeline, its family is not supported, or the family has no such setting.
    """
    name = str(id_or_folder)
    index = Path(name) / "model_index.json"
    try:
        if not Path(name).is_dir():
            index = Path(hf_hub_download(name, "model_index.json"))
        if not index.is_file():
            raise FileNotFoundError(index)
    except (GatedRepoError, RepositoryNotFoundError) as error:
        licence = f"the {CHECKPOINTS[name].licence} licence" if name in CHECKPOINTS else "the licence"
        raise ValueError(
            f"{name!r} is missing on the Hub or gated: check the name, accept {licence} on its page, and log in with "
            "`hf auth login`."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{name!r} is no folder, and the Hub cannot be reached: check the name and the connection."
        ) from error
    except (FileNotFoundError, EntryNotFoundError, HFValidationError) as error:
        instead = no_pipeline(Path(name))
        end = f", {instead}" if instead else ": pass a Hub id or a folder that holds a `model_index.json`"
        raise ValueError(f"{name!r} is no diffusers pipeline{end}.") from error
    config = read_json(index)
    if "_class_name" not in config:
        raise ValueError(f"{index} names no `_class_name`, the class of the pipeline: download or save it again.")
    class_name = config["_class_name"]
    if not isinstance(class_name, str) or class_name not in FAMILIES:  # it is a list where code of its own is named
        raise ValueError(f"{name!r} holds a {class_name}, which is not a supported family ({SUPPORTED}).")
    _known(settings, class_name)
    variant = check_parts(Path(name), config) if Path(name).is_dir() else None
    # A pipeline saved without one of its text encoders loads only if that encoder is None in the call too.
    absent = {part: None for part, value in config.items() if value == [None, None]}
    # `DiffusionPipeline` only finds classes that diffusers itself defines.
    loader = SiTPipeline if class_name == "SiTPipeline" else DiffusionPipeline
    chosen = {} if variant is None else {"variant": variant}
    try:
        return loader.from_pretrained(name, **loading.arguments(set(config) - set(absent)), **absent, **chosen)
    except Exception as error:  # of many kinds, from the depths of diffusers, transformers and safetensors
        said = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"{name!r} cannot be loaded ({type(error).__name__}: {said}): see that it is whole, or load it by "
            "diffusers in your own way, such as with a `variant`, and pass the loaded pipeline."
        ) from error
