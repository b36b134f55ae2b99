"""What lowers memory or time, one by one and in pairs, with the network whole or shared: a trainer can be made, or says
in one sentence why not and what to take instead.
"""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flowrl_trainers.cli import _is_ours

from .fsdp2 import ENVIRONMENT, on_two_processes, pretend_gpus
from .helpers import make_trainer
from .quantized import quantize
from .tiny_families import tiny

SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {"quantization": "nf4"},
    "int8": {"quantization": "int8"},
    "float8": {"quantization": "float8"},
    "nf4 of the user": {"quantised": "nf4"},
    "int8 of the user": {"quantised": "int8"},
    "frozen_copy": {"frozen_copy": "as_loaded", "lora": False},
    "merge_adapter": {"merge_adapter": True},
    "compile_blocks": {"compile_blocks": True},
    "offload_between_phases": {"offload_between_phases": True},
    "cache_base_pictures": {"cache_base_pictures": True},
    "embedding_memory_gib": {"embedding_memory_gib": 0.0},
    "cache_encoded_prompts": {"cache_encoded_prompts": True},
    "fp16": {"fp16": True},
    "attention_backend": {"attention_backend": "native"},
}
SMALL = {"height": 32, "width": 32, "per_device_train_batch_size": 2}
BITS = list(SETTINGS)[:5]
NOT_SHARED = ("int8", "float8", "int8 of the user", "merge_adapter", "compile_blocks", "cache_base_pictures")
RAW = "raw: "
MENDS = r"(: |, or |; )(take|leave|pass|load|quantise|set|start)\b"


def combinations(pairs: bool) -> Iterator[tuple[str, ...]]:
    """One setting, and two that are no two ways to quantise: all of them, or those that ended in a raw error once."""
    yield from ((name,) for name in SETTINGS)
    chosen = itertools.combinations(SETTINGS, 2) if pairs else [("nf4 of the user", "attention_backend")]
    yield from (pair for pair in chosen if not set(pair) <= set(BITS))


def is_refused(names: tuple[str, ...], shared: bool) -> bool:
    """Whether settings do not go together, or not with a network that processes share. No GPU is here for nf4."""
    asked = set(names)
    pairs: list[tuple[str, str]] = [("frozen_copy", "merge_adapter"), ("merge_adapter", "fp16")]
    pairs += [(bits, other) for bits in BITS for other in ("frozen_copy", "merge_adapter")]
    return "nf4" in asked or any(asked >= set(pair) for pair in pairs) or (shared and bool(asked & set(NOT_SHARED)))


def outcomes(folder: Path, model: Path, pairs: bool, **settings: Any) -> dict[str, str | None]:
    """By combination: None where a trainer can be made, or what it says; of another error, the class too."""
    found: dict[str, str | None] = {}
    for names in combinations(pairs):
        asked = {key: value for name in names for key, value in SETTINGS[name].items()}
        quantised = asked.pop("quantised", None)
        pipeline: Any = str(model)
        if "quantization" not in asked:
            pipeline = tiny("flux")
            if quantised is not None:
                quantize(pipeline.transformer, quantised)
        said = None
        try:
            make_trainer("AdjointMatchingTrainer", folder, pipeline, **settings | SMALL | asked)
        except Exception as error:
            said = str(error) if _is_ours(error) else f"{RAW}{error!r}"
        found[" + ".join(names)] = said
    return found


def try_all(folder: Path, model: Path, pairs: bool, shared: bool) -> None:
    """On each of two processes."""
    torch.set_num_threads(1)
    if shared:
        pretend_gpus()
    place = {"use_cpu": False} if shared else {"ddp_backend": "gloo"}
    found = outcomes(folder / "run", model, pairs, **place)
    (folder / f"found_{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny("flux").save_pretrained(path)
    return path


WAYS = ("one process", "ddp", "fsdp2")
CASES = [("one process", False), *(pytest.param(way, True, marks=pytest.mark.slow) for way in WAYS)]


@pytest.mark.parametrize(("way", "pairs"), CASES)
def test_every_combination_is_made_or_refused_in_a_sentence(tmp_path, model, way, pairs, assets):
    if way == "one process":
        found = outcomes(tmp_path / "run", model, pairs)
    else:
        variables = {"HF_ASSETS_CACHE": str(assets)} | (ENVIRONMENT if way == "fsdp2" else {})
        for process in on_two_processes(try_all, tmp_path, model, pairs, way == "fsdp2", **variables):
            assert process.returncode == 0, process.stderr
        first, found = (json.loads((tmp_path / f"found_{rank}.json").read_text()) for rank in (0, 1))
        assert first == found
    print(json.dumps(found, indent=1))  # shown where this fails
    said = {names: sentence for names, sentence in found.items() if sentence is not None}
    assert {names: s for names, s in said.items() if s.startswith(RAW)} == {}
    assert {names: s for names, s in said.items() if not re.search(MENDS, s)} == {}
    assert list(said) == [" + ".join(names) for names in combinations(pairs) if is_refused(names, way == "fsdp2")]
