"""Checkpoints of reward models, from a folder or the Hugging Face Hub, whole or not at all."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import is_offline_mode
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor


def load_model(
    model_class: Any,
    checkpoint: str | Path,
    revision: str | None,
    dtype: torch.dtype,
    files: str = "config.json and model.safetensors",
) -> Any:
    """A transformers model of a given class, frozen, in evaluation mode, from safetensors or from a `.bin` read as plain tensors.

    files: what an error message says that a folder needs. Raises `ValueError` for a checkpoint that cannot be had, and for one that lacks
    a weight: a random weight would score at random.
    """
    try:
        model, found = model_class.from_pretrained(
            checkpoint, revision=revision, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(_how_to_get(checkpoint, files)) from error
    if found["missing_keys"]:
        raise ValueError(
            f"Checkpoint {str(checkpoint)!r} has no {min(found['missing_keys'])!r}, a weight of {model_class.__name__}: pass a checkpoint "
            "of this architecture."
        )
    return model.eval().requires_grad_(False)


def model_of(
    model_class: Any, architecture: Any, tensors: dict[str, Tensor], dtype: torch.dtype, name: str, file: str
) -> Any:
    """A transformers model of a given class and configuration, frozen, in evaluation mode, with these tensors for weights.

    name, file: of the official checkpoint, for the message. Raises `ValueError` if a tensor is missing, unknown or of another shape.
    """
    with torch.device("meta"):  # as many random numbers as there are weights would be drawn to be overwritten
        expected = {key: tensor.shape for key, tensor in model_class(architecture).state_dict().items()}
    wrong = {
        key
        for key in expected.keys() | tensors.keys()
        if key not in tensors or tensors[key].shape != expected.get(key)
    }
    if wrong:
        raise ValueError(
            f"The {name} checkpoint has {len(wrong)} missing, unknown or differently shaped weights, {min(wrong)!r} among them: pass the "
            f"official {file}, or the `architecture` of yours."
        )
    model = model_class.from_pretrained(None, config=architecture, state_dict=tensors, dtype=dtype)
    return model.eval().requires_grad_(False)


def load_tokenizer(checkpoint: str | Path, revision: str | None) -> Any:
    """The tokenizer of a checkpoint. Raises `ValueError` if it cannot be had."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(_how_to_get(checkpoint, "tokenizer.json and tokenizer_config.json")) from error


def load_normalisation(checkpoint: str | Path, revision: str | None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of red, green and blue that a checkpoint's image processor takes pixels in [0, 1] to have.

    Raises `ValueError` if the checkpoint cannot be had.
    """
    try:
        settings, _ = CLIPImageProcessor.get_image_processor_dict(checkpoint, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(_how_to_get(checkpoint, "preprocessor_config.json")) from error
    return settings["image_mean"], settings["image_std"]


def find_file(checkpoint: str | Path, name: str, revision: str | None) -> Path:
    """One file of a checkpoint. Raises `ValueError` if it cannot be had."""
    try:
        path = (
            Path(checkpoint) / name
            if Path(checkpoint).is_dir()
            else Path(hf_hub_download(str(checkpoint), name, revision=revision))
        )
    except (OSError, ValueError) as error:
        raise ValueError(_how_to_get(checkpoint, name)) from error
    if not path.is_file():
        raise ValueError(_how_to_get(checkpoint, name))
    return path


def _how_to_get(checkpoint: str | Path, files: str) -> str:
    if Path(checkpoint).is_dir():
        return f"The folder {str(checkpoint)!r} is no checkpoint that this reward can read: it needs {files}."
    if Path(checkpoint).is_absolute():
        return f"There is no folder {str(checkpoint)!r}: pass one with {files}, or the name of a repository on the Hugging Face Hub."
    if is_offline_mode():
        return (
            f"Checkpoint {str(checkpoint)!r} is not in the local cache and HF_HUB_OFFLINE forbids downloading it: make this reward once "
            f"with a connection, or pass a folder with {files}."
        )
    return (
        f"Checkpoint {str(checkpoint)!r} could not be had from the Hugging Face Hub: check its name, the revision and the connection, "
        f"and if it is gated accept its terms there and run `hf auth login`; or pass a folder with {files}."
    )
