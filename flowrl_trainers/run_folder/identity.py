"""What a resumed run must have as the run before: most settings, its prompts, rewards, adapter and base model."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import TrainingArguments

from ..pipelines.quantization import stored_tensors
from ..sampling.sharding import whole

FREE = {
    "where and how much is written": (
        "output_dir", "overwrite_output_dir", "run_name", "project", "report_to", "trackio_space_id",
        "trackio_bucket_id", "trackio_static_space_id", "log_level", "log_on_each_node", "logging_strategy",
        "log_level_replica", "logging_first_step", "logging_steps", "logging_nan_inf_filter", "disable_tqdm",
        "include_num_input_tokens_seen", "log_images", "debug", "skip_memory_metrics",
    ),
    "when it is saved and pushed": (
        "save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node",
        "push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push",
        "hub_revision", "enable_jit_checkpoint", "resume_from_checkpoint", "restore_callback_states_from_checkpoint",
    ),
    "when and how it is evaluated": (
        "do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
        "per_device_eval_batch_size", "eval_accumulation_steps", "eval_num_inference_steps", "eval_do_concat_batches",
        "eval_use_gather_object", "prediction_loss_only", "batch_eval_metrics", "include_for_metrics",
        "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "ode_num_inference_steps",
        "cache_base_pictures",
    ),
    "when it ends": (
        "max_steps", "num_train_epochs", "target_reward", "max_bad_sample_share",
    ),
    "where it computes": (
        "use_cpu", "local_rank", "ddp_backend", "ddp_timeout", "dataloader_pin_memory", "offload_between_phases",
        "embedding_memory_gib", "cache_encoded_prompts",
    ),
}  # fmt: skip
"""The fields that may change from one resumption to the next, by what they decide; all others must be as they were."""

FREE_FIELDS = frozenset(name for names in FREE.values() for name in names)

WAITS_FOR_METRIC = ("reduce_lr_on_plateau", "greedy")
"""The schedules of the learning rate that follow an evaluation."""
OF_ANY_LENGTH = ("constant", "constant_with_warmup", "inverse_sqrt", *WAITS_FOR_METRIC)
"""Those that are the same in a longer run."""
DECIDES_METRIC = frozenset((
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_num_inference_steps",
    "ode_num_inference_steps", "per_device_eval_batch_size", "metric_for_best_model", "greater_is_better",
))  # fmt: skip
"""The free fields that are not free beside such a schedule."""


SAMPLED = 256  # elements of every tensor: enough to tell two models apart, and read in no time


def identity(args: TrainingArguments, **resolved: Any) -> dict[str, Any]:
    """What a resumed run must have as before: every field of its configuration that is not free, and what is no field.

    Args:
        args: The configuration.
        resolved: What fields that may be None mean, under their names, and what is no field.
    """
    values = args.to_dict()
    free = FREE_FIELDS - DECIDES_METRIC if args.lr_scheduler_type in WAITS_FOR_METRIC else FREE_FIELDS
    # A share of the updates, as a warm-up of 0.1, is another number in a longer run.
    if args.lr_scheduler_type not in OF_ANY_LENGTH or 0 < args.warmup_steps < 1:
        free = free - ({"max_steps"} if args.max_steps > 0 else {"max_steps", "num_train_epochs"})
    names = [field.name for field in fields(args) if field.name not in free]
    return json.loads(json.dumps({name: values[name] for name in names} | resolved, default=str))  # plain types alone


def adapter_identity(config: LoraConfig | None) -> dict[str, Any]:
    """Every field of a LoRA's configuration, as `peft_config.NAME`; without one, that there is none."""
    if config is None:
        return {"peft_config": None}
    kept = {name: value for name, value in config.to_dict().items() if name not in ("peft_version", "inference_mode")}
    return {f"peft_config.{name}": sorted(v) if isinstance(v, set) else v for name, v in kept.items()}


def texts_identity(texts: Iterable[str]) -> str:
    """The number of texts and a hash of them in their order."""
    texts = list(texts)
    return f"{len(texts)} (sha256 {hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]})"


def values_identity(dataset: Dataset) -> str:
    """The number of rows and a hash of all that stands in their columns, pictures as they are stored."""
    found = hashlib.sha256()
    for rows in dataset.with_format("arrow").iter(batch_size=1000):
        found.update(json.dumps(rows.to_pydict(), sort_keys=True, default=str).encode())
    return f"{len(dataset)} (sha256 {found.hexdigest()[:12]})"


def shapes_identity(network: nn.Module) -> str:
    """A hash of the names and shapes of what a network keeps in a checkpoint."""
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    return f"sha256 {hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:12]}"


@torch.no_grad()
def weights_identity(network: nn.Module, trained: Collection[str] = ()) -> str:
    """A hash of the names and shapes of a network's frozen parameters, and of up to 256 elements of each.

    Of a quantised parameter, the numbers and the scales that are stored count. Of a sharded network, all processes
    must ask for it.

    Args:
        network: Any.
        trained: The names of parameters that are left out also where they take no gradient, as those of an adapter
            that is switched off.
    """
    found = hashlib.sha256()
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad and name not in trained:
            found.update(f"{name.replace('.base_layer', '')} {tuple(parameter.shape)} {parameter.dtype}".encode())
            for stored in stored_tensors(parameter):
                values: Tensor = whole(stored.detach()).flatten()
                sample = values[:: max(1, len(values) // SAMPLED)][:SAMPLED].contiguous().cpu()
                found.update(sample.view(torch.uint8).numpy().tobytes())
    return f"sha256 {found.hexdigest()[:12]}"


def refuse_another_run(saved: Mapping[str, Any], present: Mapping[str, Any], folder: Path) -> None:
    """Raises `ValueError` for the first thing that differs between a checkpoint and the run that is to go on from it.

    Args:
        saved: The `identity` in the checkpoint.
        present: That of this run.
        folder: The checkpoint.
    """
    for name in [*saved, *(name for name in present if name not in saved)]:
        if saved.get(name) != present.get(name):
            raise ValueError(
                f"{folder} was saved with {name} {saved.get(name)}, but this run has {present.get(name)}: a resumed "
                "run repeats the uninterrupted one only with the same."
            )
