"""Every setting of every config refuses what it cannot use, in a sentence that names it, and takes what it can."""

import math
import re
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from flowrl_trainers import (
    ACFlowConfig,
    AdjointMatchingConfig,
    DiffusionNFTConfig,
    FlowRLConfig,
    TAFSGRPOConfig,
    VGGFlowConfig,
)
from flowrl_trainers.cli.arguments import TRAINERS, RunArguments, parse
from flowrl_trainers.run_folder.settings import run_settings
from flowrl_trainers.trainers.config_checks import UNSUPPORTED, Range, rules

CONFIGS = [FlowRLConfig, AdjointMatchingConfig, VGGFlowConfig, ACFlowConfig, DiffusionNFTConfig, TAFSGRPOConfig]
EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.yaml"))

OUT_OF_RANGE: dict[str, list[Any]] = {
    # FlowRLConfig
    "num_inference_steps": [0, -1],
    "eval_num_inference_steps": [0],
    "guidance_scale": [-1.0],
    "height": [0],
    "width": [-8],
    "max_sequence_length": [0],
    "num_generations": [0],
    "steps_per_generation": [0, -1],
    "num_iterations": [0],
    "rollout_batch_size": [0],
    "decode_batch_size": [0],
    "embedding_memory_gib": [-0.1],
    "log_images": [-1],
    "ema_decay": [0.0, 1.0, 1.5],
    "max_bad_sample_share": [-0.1, 1.1],
    # RewardGradientConfig
    "reward_scale": [0.0, -1.0],
    "control_to_velocity_ratio": [0.0, -1.0],
    "reward_gradient_clip_quantile": [0.0, 1.1],
    "product_batch_size": [0],
    # AdjointMatchingConfig
    "adjoint_steps": [0, 21],
    "prefix_pool_size": [0, 7],
    "adjoint_clip_quantile": [0.0, 1.1],
    "memoryless_loss_clip": [0.0],
    "control_cost_weight": [-1.0, 0.0],
    # VGGFlowConfig
    "timestep_bins": [0, -1],
    "value_network_learning_rate": [0.0],
    "boundary_coefficient": [0.0],
    "finite_difference_step": [0.0],
    # RenoisingConfig
    "reward_clip": [0.0],
    "old_policy_decay": [-0.1, 1.0],
    "old_policy_ramp": [0.0],
    "old_policy_flat": [-1],
    "norm_guard": [-0.1],
    # ACFlowConfig
    "reward_multiplier": [0.0],
    "old_policy_coefficient": [-1.0],
    "huber_power": [0.0, 1.5],
    "advantage_clip": [0.0, -1.0],
    "temperature": [0.0, -1.0],
    "wasserstein_coefficient": [-0.1],
    "critic_steps": [0],
    "critic_learning_rate": [0.0],
    "critic_warmup_max_steps": [-1],
    # DiffusionNFTConfig
    "branch_beta": [0.0],
    "reference_coefficient": [-1e-4],
    # TAFSGRPOConfig
    "ode_num_inference_steps": [0],
    "eta": [0.0, -1.0, 1.5],
    "credit_mix": [-0.1, 1.1],
    "credit_discount": [-0.1, 1.1],
    "epsilon": [0.0],
    "beta": [-0.1],
    "max_velocity_distance": [0.0],
    # transformers.TrainingArguments
    "per_device_train_batch_size": [0, -1],
    "per_device_eval_batch_size": [0],
    "gradient_accumulation_steps": [0],
    "num_train_epochs": [0.0, -1.0],
    "max_steps": [0, -2],
    "learning_rate": [-1e-4],
    "warmup_steps": [-1],
    "weight_decay": [-0.1],
    "adam_beta1": [-0.1, 1.0],
    "adam_beta2": [-0.1, 1.0],
    "adam_epsilon": [0.0, -1e-8],
    "max_grad_norm": [-1.0],
    "logging_steps": [0, -1],
    "save_steps": [-1],
    "save_total_limit": [0, -1],
    "eval_steps": [-1],
    "eval_delay": [-1],
    "seed": [-1, 2**32],
    "ddp_bucket_cap_mb": [0],
    "ddp_timeout": [0],
    "local_rank": [-2],
}

ANY_NUMBER = {
    "target_reward": "a reward may have any scale and sign",
    "reward_weights": "a negative weight lowers a reward, and 0 only watches it",
}

NOT_SUPPORTED: dict[str, Any] = {
    "optim_target_modules": ["to_q"],
    "remove_unused_columns": True,
    "ignore_data_skip": True,
    "auto_find_batch_size": True,
    "enable_jit_checkpoint": True,
    "fsdp": "full_shard",
    "fsdp_config": {"min_num_params": 1},
    "deepspeed": "ds.json",
    "parallelism_config": "tp",
    "fp16_full_eval": True,
    "bf16_full_eval": True,
    "torch_compile": True,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "torch_empty_cache_steps": 1,
    "accelerator_config": {"split_batches": True},
    "data_seed": 0,
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "tokens",
    "dataloader_num_workers": 1,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 2,
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_in_order": False,
    "dataloader_drop_last": True,
    "label_names": ["labels"],
    "label_smoothing_factor": 0.1,
    "include_num_input_tokens_seen": "all",
    "average_tokens_across_devices": False,
    "neftune_noise_alpha": 5.0,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "use_cache": True,
    "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True,
    "prediction_loss_only": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 1,
    "do_predict": True,
    "save_on_each_node": True,
}

WORK = """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules
gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs
gradient_checkpointing gradient_checkpointing_kwargs logging_strategy logging_steps logging_first_step log_on_each_node
logging_nan_inf_filter log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start
save_only_model save_strategy save_steps save_total_limit push_to_hub hub_token hub_private_repo
hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better
restore_callback_states_from_checkpoint full_determinism seed use_cpu ddp_find_unused_parameters ddp_bucket_cap_mb
ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout debug skip_memory_metrics resume_from_checkpoint
""".split()  # noqa: SIM905
HARMLESS = {
    "dataloader_pin_memory": "Trainer sets it to False on the CPU; prompts are no tensors, so that nothing is pinned",
    "do_train": "a flag of scripts: `flowrl` trains in any case",
    "do_eval": "a flag of scripts, which Trainer sets where there is an `eval_strategy`",
    "local_rank": "old launchers pass it to the script",
}


def make(config: type[FlowRLConfig], folder: Path, **settings: Any) -> FlowRLConfig:
    return config(**{"output_dir": str(folder), "use_cpu": True, "report_to": "none"} | settings)


def wrong_values(name: str, hint: Any) -> list[Any]:
    """Of another type, not finite, or no choice, by the annotation; None where the annotation does not say it."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    wrong = [object(), [object()], *([] if NoneType in parts else [None])]
    if int in parts or float in parts:
        wrong += ["4", math.nan, math.inf, -math.inf, [1]] + ([] if bool in parts else [True])
    if int in parts:
        wrong += [1.5, 2.0]
    if list[float] in parts:
        wrong += [[math.nan], [1.0, math.inf], "heavy", [None]]
    if bool in parts:
        wrong += ["false", 0, 1.0]
    if any(get_origin(part) is Literal for part in parts) and str not in parts:
        wrong += ["no such choice", 3, nn.Linear(2, 2)]
    return wrong + OUT_OF_RANGE.get(name, [])


CASES = [(config, name) for config in CONFIGS for name in rules(config) if name not in ("debug", "report_to")]


@pytest.mark.parametrize(("config", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_every_setting_refuses_wrong_values_and_names_itself(tmp_path, config, name):
    if name in ("output_dir", "resume_from_checkpoint"):
        values: list[Any] = [3, object(), ["a folder"]]
    elif name == "control_cost_order":
        values = [3, None, "6", object()]
    else:
        values = wrong_values(name, get_type_hints(config)[name])
    for value in values:
        with pytest.raises(ValueError, match=f"^`{name}` "):
            make(config, tmp_path, **{name: value})


@pytest.mark.parametrize("config", CONFIGS)
def test_no_setting_is_without_a_check_and_every_number_has_a_range(tmp_path, config):
    for field in fields(config):
        with pytest.raises(ValueError, match=f"^`{field.name}` "):
            make(config, tmp_path, **{field.name: object()})
    for name, annotation in rules(config).items():
        parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        if {int, float, list[float]} & set(parts):
            assert name in ANY_NUMBER
        if any(get_origin(part) is Annotated for part in parts):
            assert name in OUT_OF_RANGE


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_setting_that_would_do_nothing_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"^`{name}` \(.*\) must be .*: \w.*[^.]\.$"):
        make(FlowRLConfig, tmp_path, **{name: NOT_SUPPORTED[name]})


def test_every_setting_of_transformers_works_or_is_refused():
    """Where a new transformers fails here: read what its setting does, and put it on one of the lists."""
    assert {f.name for f in fields(TrainingArguments)} == {*WORK, *HARMLESS, *UNSUPPORTED}


@pytest.mark.parametrize(("config", "changes", "sentence"), [
    (TAFSGRPOConfig, {"eta": -1.0}, "`eta` (-1.0) must be at least 0.001."),
    (TAFSGRPOConfig, {"credit_mix": 2}, "`credit_mix` (2) must be between 0 and 1."),
    (TAFSGRPOConfig, {"kernel": "renois"}, "`kernel` is 'renois': choose 'renoise', 'precise' or 'flow_grpo'."),
    (FlowRLConfig, {"num_generations": "4"}, "`num_generations` ('4') must be a whole number."),
    (FlowRLConfig, {"learning_rate": math.nan}, "`learning_rate` (nan) must be a finite number."),
    (FlowRLConfig, {"seed": -1}, "`seed` (-1) must be between 0 and 4294967295."),
    (FlowRLConfig, {"height": 0}, "`height` (0) must be at least 1, or None."),
    (FlowRLConfig, {"height": "512"}, "`height` ('512') must be a whole number or None."),
    (FlowRLConfig, {"push_to_hub": "false"}, "`push_to_hub` ('false') must be True or False."),
    (
        FlowRLConfig, {"reward_weights": [math.inf]},
        "`reward_weights` ([inf]) must be a list of finite numbers or None.",
    ),
    (FlowRLConfig, {"max_steps": 0}, "`max_steps` (0) must be at least 1, or -1 to train for `num_train_epochs`."),
    (FlowRLConfig, {"save_strategy": "often"}, "`save_strategy` is 'often': choose 'no', 'steps', 'epoch' or 'best'."),
    (
        FlowRLConfig, {"log_level": "loud"},
        "`log_level` is 'loud': choose 'detail', 'debug', 'info', 'warning', 'error', 'critical' or 'passive'.",
    ),
    (FlowRLConfig, {"lr_scheduler_kwargs": 3}, "`lr_scheduler_kwargs` (3) must be a dictionary, a string or None."),
    (
        FlowRLConfig, {"debug": "tpu_metrics_debug"},
        "`debug` ('tpu_metrics_debug') must be '', 'underflow_overflow', a list of 'underflow_overflow' or None.",
    ),
    (FlowRLConfig, {"report_to": 1}, "`report_to` (1) must be None, a string or a list of strings."),
    (
        ACFlowConfig, {"critic": nn.Sequential(nn.Linear(2, 2))},
        "`critic` is a Sequential: choose 'reward_of_estimate', 'backbone', 'convolutional', 'module' or 'none'.",
    ),
    (
        FlowRLConfig, {"use_cache": True},
        "`use_cache` (True) must be False: it is made for language models, and the network is none.",
    ),
    (
        AdjointMatchingConfig, {"adjoint_clip_quantile": 1.5},
        "`adjoint_clip_quantile` (1.5) must be above 0 and at most 1, or None.",
    ),
])  # fmt: skip
def test_the_sentence_names_setting_value_and_rule(tmp_path, config, changes, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        make(config, tmp_path, **changes)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("changes", [
    {},
    {"learning_rate": 1, "logging_steps": 2, "max_steps": -1, "save_steps": 0.5, "seed": 2**32 - 1},
    {"learning_rate": np.float32(0.1), "max_steps": np.int64(3), "guidance_scale": np.float64(3)},
    {"learning_rate": 0, "adam_beta1": 0, "weight_decay": 0.1, "max_grad_norm": 0, "save_total_limit": 1},
    {"guidance_scale": 0, "height": 64, "ema_decay": 0.999, "max_bad_sample_share": 1, "target_reward": -5},
    {"eval_strategy": "steps", "eval_steps": 5, "lr_scheduler_type": "cosine", "warmup_steps": 0.1},
    {"debug": "underflow_overflow"},
    {"resume_from_checkpoint": True},
    {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
    {"accelerator_config": {}},
    {"accelerator_config": {"even_batches": True, "split_batches": False}},
    {"accelerator_config": AcceleratorConfig()},
    {"include_num_input_tokens_seen": False, "label_names": [], "activation_checkpointing": True, "log_level": "info"},
])  # fmt: skip
def test_right_values_are_taken(tmp_path, config, changes):
    made = make(config, tmp_path, **changes)
    assert replace(made).to_dict() == made.to_dict()  # what a config has become is right too
    for name in {"learning_rate", "max_steps", "guidance_scale", "seed"} & set(changes):
        assert getattr(made, name) == changes[name]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_config_yaml_lists_no_setting_that_nobody_made(tmp_path, config):
    """Whatever `TrainingArguments` makes of its own defaults; what a method computes of several settings is there."""
    computed = {"weighting", "normalize_weights", "wasserstein_coefficient"}
    assert run_settings(config(output_dir=str(tmp_path)), None).keys() - computed == {"lora_r"}
    made = run_settings(config(output_dir=str(tmp_path), activation_checkpointing=True, seed=7), None)
    assert (made["activation_checkpointing"], made["seed"]) == (True, 7)


def test_a_path_is_a_folder(tmp_path):
    assert FlowRLConfig(output_dir=tmp_path, use_cpu=True).output_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("given", "kept"),
    [(None, None), ([1, 2], [1.0, 2.0]), ((0.5, 1), [0.5, 1.0]), (2, [2.0]), ([1, "1e-2"], [1.0, 0.01])],
)
def test_weights_are_numbers(tmp_path, given, kept):
    assert make(FlowRLConfig, tmp_path, reward_weights=given).reward_weights == kept


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_taken(tmp_path, path):
    method = re.search(r"^# flowrl (\w+) --config", path.read_text())[1]
    flags = ["--config", str(path), "--use_cpu", "true", "--output_dir", str(tmp_path)]
    assert isinstance(parse(method, TRAINERS[method].config_class, flags, {})[1], TRAINERS[method].config_class)


def test_numbers_of_a_yaml_file_are_taken_as_they_look(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: shapes\ndataset: shapes\nreward_funcs: checker\nlearning_rate: 1e-4\nadam_epsilon: 1e-8\n"
        "ema_decay: null\n"
        "temperature: 2\nmax_steps: 10\nreward_weights: 1e-2\npush_to_hub: false\n"
    )
    run, config = parse("ac_flow", ACFlowConfig, ["--config", str(path), "--output_dir", str(tmp_path)], {})
    assert run.reward_funcs == ["checker"]
    assert (config.learning_rate, config.adam_epsilon, config.temperature, config.reward_weights) == (
        1e-4,
        1e-8,
        2,
        [0.01],
    )


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"lora_r": -1}, r"^`lora_r` \(-1\) must be at least 0\.$"),
    ({"lora_alpha": 0}, r"^`lora_alpha` \(0\) must be at least 1\.$"),
    ({"lora_dropout": 1.0}, r"^`lora_dropout` \(1\.0\) must be at least 0 and below 1\.$"),
    ({"lora_dropout": math.nan}, r"^`lora_dropout` \(nan\) must be a finite number\.$"),
    ({"reward_funcs": [1]}, r"^`reward_funcs` \(\[1\]\) must be a list of strings\.$"),
    ({"model": None}, r"^`model` \(None\) must be a string\.$"),
])  # fmt: skip
def test_what_the_command_line_adds_is_checked_in_the_same_way(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        RunArguments(**{"model": "shapes", "dataset": "shapes"} | changes)


def test_a_range_is_a_set_of_finite_numbers():
    assert 1 in Range(above=0, at_most=1)
    assert 0 not in Range(above=0, at_most=1)
    for number in (math.nan, math.inf, -math.inf):
        assert number not in Range()
