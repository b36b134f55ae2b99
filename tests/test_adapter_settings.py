"""`config.yaml` keeps the whole adapter, and the command line makes it again."""

import inspect
import json
from dataclasses import fields

import numpy as np
import pytest
import yaml
from peft import AdaLoraConfig, LoraConfig, get_peft_model

from flowrl_trainers import FlowPipeline
from flowrl_trainers.cli import main
from flowrl_trainers.cli.adapter import lora_fields, make_lora_config
from flowrl_trainers.run_folder.identity import adapter_identity
from flowrl_trainers.run_folder.settings import FLAGS, KEPT, adapter_settings
from flowrl_trainers.trainers.adapters import prepare_adapter

from .helpers import adjoint_matching
from .tiny import tiny_sd3


def again(settings: dict) -> LoraConfig:
    """What the command line makes of the settings in a YAML file."""
    read = yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(settings))))
    return make_lora_config(
        read["lora_r"], read["lora_alpha"], read["lora_dropout"], read["lora_target_modules"],
        lora_fields(read.get("lora_config", {})),
    )  # fmt: skip


@pytest.mark.parametrize("config", [
    LoraConfig(r=4),
    LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["attn.to_q", "attn.to_k"]),
    LoraConfig(r=4, use_dora=True, init_lora_weights="gaussian", exclude_modules=["transformer_blocks.0.attn.to_q"]),
    LoraConfig(r=4, init_lora_weights=False, use_rslora=True, exclude_modules=r".*\.to_v"),
    LoraConfig(r=4, rank_pattern={"attn.to_q": 2}, alpha_pattern={"attn.to_k": 1}),
    LoraConfig(r=4, target_modules=["to_q"], layers_to_transform=[0], layers_pattern="transformer_blocks"),
    LoraConfig(r=4, target_modules=r".*attn\.to_[qk]"),
    LoraConfig(r=4, target_modules="transformer_blocks.0.attn.to.q"),  # a dot is its only sign
    LoraConfig(r=4, target_modules="all-linear"),
], ids=["default", "layers", "dora", "rslora", "patterns", "one block", "expression", "full name", "all-linear"])  # fmt: skip
def test_the_settings_of_an_adapter_make_it_again(config):
    """The same layers with the same weights' shapes, and the same settings."""
    first, second = FlowPipeline.from_pipeline(tiny_sd3()), FlowPipeline.from_pipeline(tiny_sd3())
    settings = adapter_settings(prepare_adapter(first, config))
    made = prepare_adapter(second, again(settings))
    assert adapter_settings(made) == settings
    shapes = [{n: p.shape for n, p in f.transformer.named_parameters() if p.requires_grad} for f in (first, second)]
    assert shapes[0] == shapes[1]
    # A pattern is another text, and is held by its layers above.
    kept = [{k: v for k, v in adapter_identity(c).items() if "target_modules" not in k} for c in (config, made)]
    assert kept[0] | {"peft_config.exclude_modules": None} == kept[1] | {"peft_config.exclude_modules": None}


def test_every_field_of_a_lora_is_a_setting_or_no_part_of_the_adapter():
    left = {f.name for f in fields(LoraConfig)} - {*FLAGS, *KEPT}
    assert left == {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "runtime_config",
    }  # fmt: skip
    assert {*FLAGS, *KEPT} <= set(inspect.signature(LoraConfig).parameters)


@pytest.mark.parametrize("changes", [{"rank_pattern": {"attn.to_q": np.int64(2)}}, {"lora_dropout": np.float32(0.5)},
                                     {"lora_alpha": np.float32(8)}])  # fmt: skip
def test_what_yaml_could_not_keep_is_refused(tmp_path, tiny_pipeline, changes):
    name = list(changes)[-1]
    with pytest.raises(ValueError, match=rf"`peft_config.{name}` \(.*\) cannot be written into config.yaml"):
        adjoint_matching(tmp_path, tiny_pipeline, lora=LoraConfig(r=2, **changes))


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"r": "8"}, r"r` \('8'\) must be a whole number"),
    ({"r": 8.0}, r"r` \(8.0\) must be a whole number"),
    ({"lora_alpha": "16"}, r"lora_alpha` \('16'\) must be a finite number"),
    ({"lora_alpha": 0}, r"lora_alpha` \(0\) must be above 0"),
    ({"lora_dropout": "0.1"}, r"lora_dropout` \('0.1'\) must be a finite number"),
    ({"lora_dropout": -0.1}, r"lora_dropout` \(-0.1\) must be at least 0 and below 1"),
    ({"use_dora": "yes"}, r"use_dora` \('yes'\) must be True or False"),
])  # fmt: skip
def test_a_number_that_makes_no_adapter_is_refused_before_loading(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=f"^`peft_config.{sentence}"):
        adjoint_matching(tmp_path, "no/such/folder", lora=LoraConfig(**({"r": 2} | changes)))


def test_another_kind_of_adapter_is_refused_though_it_is_derived_from_a_lora(tmp_path):
    with pytest.raises(TypeError, match=r"`peft_config` is a AdaLoraConfig: pass a `peft\.LoraConfig`"):
        adjoint_matching(tmp_path, "no/such/folder", lora=AdaLoraConfig(total_step=100))


@pytest.mark.parametrize("lora", [LoraConfig(r=2), None])
def test_a_network_that_peft_wrapped_is_refused(tmp_path, lora):
    pipeline = tiny_sd3()
    pipeline.transformer = get_peft_model(pipeline.transformer, LoraConfig(r=2, target_modules=["attn.to_q"]))
    with pytest.raises(ValueError, match="The pipeline's transformer is a `PeftModel`, whose adapter diffusers"):
        adjoint_matching(tmp_path, pipeline, lora=lora)


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"target_modules": ["attn.to_q", "attn.to_z"]}, "'attn.to_z' of `target_modules` matches none of its modules"),
    ({"target_modules": r".*to_z"}, r"'\.\*to_z' of `target_modules` matches none"),
    ({"exclude_modules": ["transformer_blocks.7"]}, "'transformer_blocks.7' of `exclude_modules` matches none"),
    ({"exclude_modules": "to_q"}, "'to_q' of `exclude_modules` matches none"),  # of whole paths
    ({"rank_pattern": {"attn.to_z": 2}}, "'attn.to_z' of `rank_pattern` matches none"),
    ({"alpha_pattern": {"attn.to_z": 2}}, "'attn.to_z' of `alpha_pattern` matches none"),
])  # fmt: skip
def test_a_name_that_matches_nothing_is_refused(tmp_path, tiny_pipeline, changes, sentence):
    with pytest.raises(ValueError, match=f"`peft_config` does not fit the transformer: {sentence}"):
        adjoint_matching(tmp_path, tiny_pipeline, lora=LoraConfig(r=2, **changes))


def test_what_a_run_leaves_as_configuration_runs_again_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module, name in (("quiet", "hush"), ("memory", "keep_freed_memory")):  # settings of the whole process
        monkeypatch.setattr(f"flowrl_trainers.cli.{module}.{name}", lambda: None)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    run = {
        "model": "shapes", "dataset": "prompts.txt", "reward_funcs": "shapes", "lora_r": 4, "lora_alpha": 8,
        "lora_target_modules": r".*attn\.to_[qkv]", "max_steps": 1, "num_inference_steps": 2, "adjoint_steps": 2,
        "per_device_train_batch_size": 2, "guidance_scale": 1.0, "max_sequence_length": 8, "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True,
        "lora_config": {"use_dora": True, "init_lora_weights": "gaussian",
                        "exclude_modules": ["transformer_blocks.0.attn.to_q"]},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    for source, folder in (("run.yaml", "first"), ("first/config.yaml", "again")):
        assert main(["adjoint_matching", "--config", source, "--output_dir", folder]) == 0
    for name in ("config.yaml", "pytorch_lora_weights.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    kept = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert kept["lora_target_modules"] == [r".*attn\.to_[qkv]"]
    assert kept["lora_config"] == run["lora_config"]
