"""What a whole run costs one process, from its configuration alone."""

import logging
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig
from torch import nn
from transformers.training_args import OptimizerNames

from ..pipelines.folders import read_json
from ..pipelines.tiny_decoder import TinyDecoder
from ..sampling.scoring import MEGAPIXEL
from .architectures import META, find
from .calls import Drawing
from .encoders import encoding
from .estimate import Estimate, Estimator
from .optimizers import state_bytes
from .rewards import BlankReward
from .table import lower

logger = logging.getLogger(__name__)

GIB = 2**30


def estimates_of_run(
    config: Any,
    model: str,
    settings: dict[str, Any],
    lora: LoraConfig | None,
    rewards: list[BlankReward],
    judges: list[BlankReward],
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
        rewards: Those of training.
        judges: Those that evaluation adds.
        evaluates: Whether there are held-out prompts.
        shared_by: The processes over which FSDP2 spreads the network, each a number of its own; 1 leaves it whole.

    Raises:
        ValueError: The architecture is not known, or a setting does not suit it.
    """
    half = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
    architecture = find(model)
    flow: Any = architecture.flow(half or torch.float32, settings)
    for decoder in flow.decoders():
        nn.Module.to(decoder, getattr(torch, config.decoder_dtype))
    together = max(1, MEGAPIXEL // (flow.settings["height"] * flow.settings["width"]))
    decodes = any(reward.sees == "images" for reward in rewards)
    drawing = Drawing(flow.guided, together, flow.guidance_in_one_call, decodes)
    estimator = Estimator(
        flow,
        rewards,
        deepcopy(lora),  # whose layers are named here
        autocast=half,
        head=config.head_kind,
        checkpointing=bool(config.activation_checkpointing),
        encoder_dtype=half or torch.float32,
        judges=judges,
        quantization=config.quantization,
        copy_as_loaded=config.frozen_copy == "as_loaded",
        apart=config.offload_between_phases,
        reward_decoder=blank_reward_decoder(config.reward_decoder_name, flow),
        optimizer_bytes=state_bytes(OptimizerNames(config.optim).value, config.optim_args),
        copies=["average"] * (config.ema_decay is not None) + ["old policy"] * config.keeps_old_policy,
        merged=config.merge_adapter,
    )
    beside = config.quantization if config.quantization == "nf4" and not config.offload_between_phases else None
    before = encoding(architecture, half or torch.float32, config.text_encoder_quantization, beside)
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
        estimates.append(replace(found.after(before), taken=taken(config, has_adapter=lora is not None)))
    return estimates


def taken(config: Any, *, has_adapter: bool) -> frozenset[str]:
    """The settings that save memory, by name, of which a configuration has all that they can give.

    Args:
        config: That of a trainer.
        has_adapter: Whether a LoRA is trained, not all weights.
    """
    at_the_least = {
        "quantization": config.quantization is not None or not has_adapter,
        "frozen_copy": config.frozen_copy == "as_loaded" or has_adapter,
        "text_encoder_quantization": config.text_encoder_quantization is not None,
        "activation_checkpointing": config.activation_checkpointing,
        "offload_between_phases": config.offload_between_phases,
        "decoder_dtype": config.decoder_dtype != "float32",
        "decode_batch_size": config.decode_batch_size == 1,
        "rollout_batch_size": config.rollout_batch_size in (None, 1),
        "per_device_train_batch_size": config.per_device_train_batch_size == 1,
        "per_device_eval_batch_size": config.per_device_eval_batch_size == 1,
    }
    return frozenset(name for name, is_so in at_the_least.items() if is_so)


def blank_reward_decoder(name: str | None, flow: Any) -> TinyDecoder | None:
    """The tiny autoencoder of a name, on the meta device.

    Args:
        name: A folder, or a Hub id, which is read from the cache; where it is not there, it is taken to be of the
            usual size, for the latents of the pipeline.
        flow: The pipeline.
    """
    if name is None:
        return None
    folder = Path(name)
    if not folder.is_dir():
        cached = try_to_load_from_cache(name, "config.json") if name.count("/") == 1 else None
        folder = Path(cached).parent if isinstance(cached, str) else folder
    known = (folder / "config.json").is_file()
    config = read_json(folder / "config.json") if known else {"latent_channels": flow.initial_latents(1).shape[1]}
    with META:
        return TinyDecoder(AutoencoderTiny.from_config(config))


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
            lower(found),
        )
