"""Loads the checkpoints of reward models from a folder or the Hugging Face Hub, and refuses incomplete ones."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import is_offline_mode
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor


def load_model(
    model_class: Any,
    checkpoint: str | Path,
    revision: str | None,
    dtype: torch.dtype,
    files: str = "config.json and model.safetensors",
) -> Any:
    """Load a transformers model, freeze it and put it into evaluation mode.

    Weights are read from safetensors, or from a `.bin` file as plain tensors.

    Args:
        model_class: The class of the model.
        checkpoint: A folder or a repository of the Hub.
        revision: Branch, tag or commit on the Hub.
        dtype: The precision of the weights.
        files: The files that a folder needs, for the error message.

    Raises:
        ValueError: If the checkpoint cannot be loaded, or lacks a weight: transformers would draw that weight at
            random, and the scores would be random too.
    """
    try:
        model, found = model_class.from_pretrained(
            checkpoint, revision=revision, dtype=dtype, output_loading_info=True
        )
    except SafetensorError as error:
        raise ValueError(
            f"The weights of checkpoint {str(checkpoint)!r} were cut off or damaged ({error}): get them again."
        ) from error
    except (RuntimeError, UnpicklingError, EOFError) as error:
        # A `.bin` file that ends too early, or weights of other shapes.
        raise ValueError(
            f"Checkpoint {str(checkpoint)!r} was cut off, or is of another architecture than {model_class.__name__} "
            "expects: get it again, or pass another."
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(_how_to_get(checkpoint, files)) from error
    if found["missing_keys"]:
        raise ValueError(
            f"Checkpoint {str(checkpoint)!r} has no {min(found['missing_keys'])!r}, a weight of "
            f"{model_class.__name__}: pass a checkpoint of this architecture."
        )
    return model.eval().requires_grad_(False)


def model_of(
    model_class: Any, architecture: Any, tensors: dict[str, Tensor], dtype: torch.dtype, name: str, file: str
) -> Any:
    """Make a transformers model of the given weights, freeze it and put it into evaluation mode.

    Args:
        model_class: The class of the model.
        architecture: The configuration of the model.
        tensors: The weights by their names in the model.
        dtype: The precision of the weights.
        name: The name of the reward, for the error message.
        file: The name of its official checkpoint file, for the error message.

    Raises:
        ValueError: If a tensor is missing, unknown or of another shape.
    """
    with torch.device("meta"):  # elsewhere torch would draw every weight at random, only to overwrite it
        expected = {key: tensor.shape for key, tensor in model_class(architecture).state_dict().items()}
    wrong = {
        key
        for key in expected.keys() | tensors.keys()
        if key not in tensors or tensors[key].shape != expected.get(key)
    }
    if wrong:
        raise ValueError(
            f"The {name} checkpoint has {len(wrong)} missing, unknown or differently shaped weights, {min(wrong)!r} "
            f"among them: pass the official {file}, or the `architecture` of your checkpoint."
        )
    model = model_class.from_pretrained(None, config=architecture, state_dict=tensors, dtype=dtype)
    return model.eval().requires_grad_(False)


def read_tensors(path: Path, mend: str) -> dict[str, Tensor]:
    """Read a dictionary of plain tensors, wherever they were saved, and nothing else.

    Args:
        path: A file that `torch.save` wrote.
        mend: What the user can do about another file, for the error message.

    Raises:
        ValueError: If the file holds anything else.
    """
    refusal = f"{str(path)!r} holds no dictionary of plain tensors: {mend}."
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make an unpickler raise any exception
        raise ValueError(refusal) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(refusal)
    return tensors


def load_tokenizer(checkpoint: str | Path, revision: str | None) -> Any:
    """The tokenizer of a checkpoint. Raises `ValueError` if it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(_how_to_get(checkpoint, "tokenizer.json and tokenizer_config.json")) from error


def load_normalisation(checkpoint: str | Path, revision: str | None) -> tuple[list[float], list[float]]:
    """The image processor's mean and standard deviation of red, green and blue, for pixels in [0, 1].

    Raises `ValueError` if the checkpoint cannot be loaded.
    """
    try:
        settings, _ = CLIPImageProcessor.get_image_processor_dict(checkpoint, revision=revision)
        return settings["image_mean"], settings["image_std"]
    except (OSError, ValueError, KeyError) as error:
        needed = "preprocessor_config.json with image_mean and image_std"
        raise ValueError(_how_to_get(checkpoint, needed)) from error


def find_file(checkpoint: str | Path, name: str, revision: str | None) -> Path:
    """Find one file of a checkpoint.

    Args:
        checkpoint: A folder or a repository of the Hub.
        name: The name of the file.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ValueError: If there is no such file.
    """
    try:
        if Path(checkpoint).is_dir():
            path = Path(checkpoint) / name
        else:
            path = Path(hf_hub_download(str(checkpoint), name, revision=revision))
    except (OSError, ValueError) as error:
        raise ValueError(_how_to_get(checkpoint, name)) from error
    if not path.is_file():
        raise ValueError(_how_to_get(checkpoint, name))
    return path


def _how_to_get(checkpoint: str | Path, files: str) -> str:
    if Path(checkpoint).is_dir():
        return f"The folder {str(checkpoint)!r} is no checkpoint that this reward can read: it needs {files}."
    if Path(checkpoint).is_absolute():
        return (
            f"There is no folder {str(checkpoint)!r}: pass one with {files}, or the name of a repository on the "
            "Hugging Face Hub."
        )
    if is_offline_mode():
        return (
            f"Checkpoint {str(checkpoint)!r} is not in the local cache and HF_HUB_OFFLINE forbids downloading it: "
            f"make this reward once with a connection, or pass a folder with {files}."
        )
    return (
        f"Checkpoint {str(checkpoint)!r} could not be had from the Hugging Face Hub: check its name, the revision and "
        "the connection, and if it is gated accept its terms there and run `hf auth login`; or pass a folder with "
        f"{files}."
    )
