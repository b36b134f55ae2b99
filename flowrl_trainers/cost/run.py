"""What a whole run costs one process, from its configuration alone."""

import logging
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig

from ..sampling.scoring import MEGAPIXEL
from .architectures import find
from .calls import Drawing
from .estimate import Estimate, Estimator, encoding
from .rewards import blank_reward
from .table import LOWER

logger = logging.getLogger(__name__)

GIB = 2**30


def estimates_of_run(
    config: Any,
    model: str,
    settings: dict[str, Any],
    lora: LoraConfig | None,
    rewards: list[str],
    judges: list[str],
    *,
    evaluates: bool,
    shared_by: Sequence[int],
) -> list[Estimate]:
    """Calls, operations and memory by phase, for several numbers of processes, of which calls are measured once.

    Args:
        config: That of a trainer.
        model: A Hub id or folder; see `architectures.find`.
        settings: Those of the pipeline.
        lora: The adapter that is trained; None for all weights.
        rewards: The names of those of training.
        judges: The names of those that evaluation adds.
        evaluates: Whether there are held-out prompts.
        shared_by: The processes over which FSDP2 spreads the network, each a number of its own; 1 leaves it whole.

    Raises:
        ValueError: The architecture is not known, or a setting does not suit it.
    """
    half = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
    architecture = find(model)
    flow: Any = architecture.flow(half or torch.float32, settings)
    together = max(1, MEGAPIXEL // (flow.settings["height"] * flow.settings["width"]))
    drawing = Drawing(flow.guided, together, flow.guidance_in_one_call)
    estimator = Estimator(
        flow,
        [blank_reward(name) for name in rewards],
        deepcopy(lora),  # whose layers are named here
        autocast=half,
        head=config.head_kind,
        checkpointing=bool(config.activation_checkpointing),
        encoder_dtype=half or torch.float32,
        judges=[blank_reward(name) for name in judges],
        quantization=config.quantization,
        copy_as_loaded=config.frozen_copy == "as_loaded",
        apart=config.offload_between_phases,
    )
    before = encoding(architecture, half or torch.float32, config.text_encoder_quantization)
    estimates = []
    for processes in shared_by:
        estimator.shared_by = processes
        found = estimator.estimate(
            config.calls(drawing),
            config.evaluation_calls(drawing) if evaluates else [],
            config.updates_on_rollout,
            config.latents_kept * config.images_per_device,
            config.first_calls(drawing),
        )
        estimates.append(found.after(before))
    return estimates


def memory_of(device: torch.device) -> int | None:
    """The bytes that a GPU has; None for a CPU, whose memory nobody counts here."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None


def warn_of_memory(available: int, config: Any, model: str, *of_run: Any, evaluates: bool, shared_by: int = 1) -> None:
    """Log a warning where a run will need more than there is; nothing where its architecture is not known.

    Args:
        available: Bytes.
        config: That of a trainer.
        model: A Hub id or folder.
        *of_run: The further arguments of `estimates_of_run`.
        evaluates: Whether there are held-out prompts.
        shared_by: The processes over which FSDP2 spreads the network.
    """
    try:
        (found,) = estimates_of_run(config, model, *of_run, evaluates=evaluates, shared_by=[shared_by])
    except Exception as error:  # an estimate must not stop a run, whatever model it is asked for
        logger.info("No estimate of the memory: %s", error)
        return
    if found.peak_gib * GIB > available:
        logger.warning(
            "This run is estimated to need %.1f GiB in the phase '%s', and the device has %.1f; lower it by: %s.",
            found.peak_gib,
            found.peak_phase,
            available / GIB,
            LOWER[found.peak_phase],
        )
