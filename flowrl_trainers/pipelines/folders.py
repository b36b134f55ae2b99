"""What is wrong with a folder that should hold a diffusers pipeline, in one sentence that names the file."""

import json
from pathlib import Path
from typing import Any

AGAIN = "download or save the pipeline again"


def no_pipeline(path: Path) -> str:
    """What a path without a `model_index.json` is instead, as the end of a sentence."""
    if path.is_file():
        return (
            "but a single file: load it by `from_single_file` of its pipeline's class in diffusers, and pass the "
            "loaded pipeline"
        )
    if any((path / name).exists() for name in ("pytorch_lora_weights.safetensors", "adapter_config.json")):
        return (
            "but the folder of a LoRA: pass its base model, with the LoRA loaded by `pipeline.load_lora_weights` to "
            "train it further"
        )
    if (path / "config.json").is_file():
        return "but the folder of one network: pass that of the whole pipeline, which holds a `model_index.json`"
    if path.is_dir() and not any(path.iterdir()):
        return "but an empty folder: pass a Hub id or a folder that holds a `model_index.json`"
    return ""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises `ValueError` for a file that holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): {AGAIN}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__} where an object belongs: {AGAIN}.")
    return content


def parts_of(index: dict[str, Any]) -> list[str]:
    """The parts that a `model_index.json` names, each with a folder of its own."""
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    return [name for name, value in pairs.items() if all(isinstance(word, str) for word in value)]


def check_parts(folder: Path, index: dict[str, Any]) -> str | None:
    """Check the files of a pipeline by their beginnings and sizes.

    Args:
        folder: That of the pipeline.
        index: The content of its `model_index.json`.

    Returns:
        The variant of which alone it has weights, such as `fp16`; None for plain weights.

    Raises:
        ValueError: A part is missing, or a file is no JSON or was cut off.
    """
    variants = set()
    for part in parts_of(index):
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} has no folder `{part}`, which its `model_index.json` names: {AGAIN}.")
        for file in sorted((folder / part).glob("*config.json")):
            read_json(file)
        weights = sorted((folder / part).glob("*.safetensors"))
        for file in weights:
            _check_size(file)
        named = {_variant(file) for file in weights}
        if named and None not in named:
            variants |= named
    return min(variants, key=str, default=None)


def _variant(file: Path) -> str | None:
    """`fp16` of `model.fp16.safetensors`, and of the shards `model.fp16-00001-of-00002.safetensors`."""
    words = file.name.split(".")
    return words[1].split("-")[0] if len(words) > 2 else None


def _check_size(file: Path) -> None:
    """A safetensors file is 8 bytes with the length of its header, the header in JSON, and the numbers."""
    with file.open("rb") as opened:
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        try:
            header = json.loads(opened.read(length) if length < file.stat().st_size else b"")
        except ValueError as error:
            raise ValueError(f"{file} was cut off or damaged: {AGAIN}.") from error
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    size, expected = file.stat().st_size, 8 + length + max(ends, default=0)
    if size != expected:
        raise ValueError(f"{file} was cut off or damaged: it has {size} bytes, not {expected}; {AGAIN}.")
