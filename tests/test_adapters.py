"""Which weights are trained against which reference: a new adapter, one that was loaded, or all."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from .helpers import adjoint_matching, first_rollout, make_trainer
from .tiny import tiny_sd3


def test_full_fine_tuning_keeps_a_frozen_reference(tmp_path, tiny_pipeline):
    before = {n: p.detach().clone() for n, p in tiny_pipeline.transformer.named_parameters()}
    t = adjoint_matching(tmp_path, tiny_pipeline, lora=None, max_steps=2, learning_rate=0.01)
    t.train()
    assert any(not torch.equal(p, before[n]) for n, p in t.flow.transformer.named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in t.model.frozen.named_parameters())
    t.save_model()
    stored = type(tiny_pipeline.transformer).from_pretrained(tmp_path / "transformer")
    assert all(torch.equal(p, q) for p, q in zip(stored.parameters(), t.flow.transformer.parameters(), strict=True))


def test_continuing_an_adapter_measures_against_the_base_model(tmp_path, tiny_pipeline):
    tiny_pipeline.transformer.add_adapter(
        LoraConfig(r=2, target_modules=["attn.to_q", "attn.to_v"], init_lora_weights=False)
    )
    t = adjoint_matching(tmp_path, tiny_pipeline, lora=None)
    examples, (batch,) = first_rollout(t)
    bare = tiny_sd3().transformer
    with torch.no_grad():
        expected = t.flow.velocity(
            bare, batch.record.states[:, 0], t.window_sigmas[0].expand(2), t.condition(examples), guidance=True
        )
    torch.testing.assert_close(batch.record.base_velocities[:, 0], expected)


def test_an_adapter_that_was_loaded_is_trained_further_and_saved(tmp_path, tiny_pipeline):
    """diffusers calls a loaded adapter default_0, not default."""
    t = adjoint_matching(tmp_path / "first", tiny_pipeline, max_steps=1)
    t.train()
    t.save_model()
    loaded = tiny_sd3()
    loaded.load_lora_weights(str(tmp_path / "first"))
    (name,) = loaded.get_active_adapters()
    loaded.set_adapters(name, 0.5)
    with pytest.raises(
        ValueError, match=r"has a weight of 0.5, which its file could not keep: call `pipeline.set_adapters"
    ):
        adjoint_matching(tmp_path / "again", loaded, lora=None)
    loaded.set_adapters(name, 1.0)
    again = adjoint_matching(tmp_path / "again", loaded, lora=None, max_steps=1, learning_rate=0.1)
    again.train()
    again.save_model()
    first, second = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("first", "again"))
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("config", "sentence"), [
    (LoraConfig(r=2, bias="lora_only"), "`peft_config.bias` .* changes the base model itself"),
    (LoraConfig(r=2, init_lora_weights="pissa"), "`peft_config.init_lora_weights` .* changes the base model itself"),
    (LoraConfig(r=2, modules_to_save=["proj_out"]), "`peft_config.modules_to_save` .* changes the base model itself"),
])  # fmt: skip
def test_a_lora_that_changes_the_base_model_is_refused(tmp_path, tiny_pipeline, config, sentence):
    with pytest.raises(ValueError, match=sentence):
        adjoint_matching(tmp_path, tiny_pipeline, lora=config)


@pytest.mark.parametrize(("config", "sentence"), [
    *((LoraConfig(r=2, **{name: value}), rf"`peft_config.{name}` .* is not supported: leave it out")
      for name, value in (("target_parameters", ["proj_out.weight"]), ("inference_mode", True),
                          ("fan_in_fan_out", True), ("use_qalora", True), ("trainable_token_indices", [0]))),
    (LoraConfig(r=2, target_modules=[]), "`peft_config.target_modules` is empty"),
])  # fmt: skip
def test_a_lora_that_the_stock_loader_would_not_keep_is_refused(tmp_path, tiny_pipeline, config, sentence):
    with pytest.raises(ValueError, match=sentence):
        adjoint_matching(tmp_path, tiny_pipeline, lora=config)


def test_two_active_adapters_are_one_too_many(tmp_path, tiny_pipeline):
    for name in ("a", "b"):
        tiny_pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"]), adapter_name=name)
    tiny_pipeline.transformer.set_adapters(["a", "b"])
    with pytest.raises(ValueError, match=r"has 2 active adapters \(a, b\): choose the one to train"):
        adjoint_matching(tmp_path, tiny_pipeline, lora=None)


def deleted(pipeline) -> None:
    pipeline.transformer.delete_adapters("default")


def fused(pipeline) -> None:
    pipeline.fuse_lora()


def fused_and_deleted(pipeline) -> None:
    pipeline.fuse_lora()
    pipeline.transformer.delete_adapters("default")


def switched_off(pipeline) -> None:
    pipeline.disable_lora()


@pytest.mark.parametrize(("change", "sentence"), [
    (deleted, "still has the layers of a LoRA that was deleted: call `pipeline.unload_lora_weights"),
    (fused, "The pipeline's LoRA is fused into the transformer .* call `pipeline.unload_lora_weights"),
    (fused_and_deleted, "still has the layers of a LoRA that was deleted: call `pipeline.unload_lora_weights"),
    (switched_off, "The pipeline's adapter 'default' is switched off: call `pipeline.enable_lora.* or `pipeline.unload"),
])  # fmt: skip
def test_an_adapter_that_is_there_by_half_is_refused_with_a_mend_that_works(tmp_path, tiny_pipeline, change, sentence):
    """Before, training met tensors without gradients; a KL term hid it."""
    tiny_pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"], init_lora_weights=False))
    change(tiny_pipeline)
    settings = {"max_steps": 1, "beta": 0.0}
    with pytest.raises(ValueError, match=sentence):
        make_trainer("TAFSGRPOTrainer", tmp_path, tiny_pipeline, lora=False, **settings)
    tiny_pipeline.unload_lora_weights()
    t = make_trainer("TAFSGRPOTrainer", tmp_path, tiny_pipeline, **settings)
    t.train()
    assert any(p.abs().max() > 0 for name, p in t.model.named_parameters() if "lora_B" in name)
