"""Options that save memory or time: gradients of checkpointing are those without, weights stay float32, compilation is
refused.
"""

import math

import pytest
import torch
from peft import LoraConfig

from flowrl_trainers import AdjointMatchingConfig, FlowPipeline
from flowrl_trainers.sampling.flow_model import FlowModel

from .helpers import adjoint_matching, first_rollout, make_trainer, update_rows
from .tiny import tiny_sd3


@pytest.mark.parametrize("adjoint", ["lean", "full", "current"])
def test_gradient_checkpointing_changes_nothing(tmp_path, adjoint):
    """Also for the adjoint, whose checkpoints are recomputed with the adapter as it is then."""
    results = []
    for checkpointing in (False, True):
        t = adjoint_matching(
            tmp_path,
            tiny_sd3(),
            activation_checkpointing=checkpointing,
            max_steps=3,
            learning_rate=0.1,
            adjoint=adjoint,
        )
        assert t.flow.pipeline.vae.decoder.gradient_checkpointing is checkpointing
        t.train()
        results.append([p.detach().clone() for p in t.trained_parameters()])
        assert t.flow.pipeline.vae.decoder.gradient_checkpointing is False  # as it was
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_checkpointing_of_a_network_that_has_none_is_refused(tiny_pipeline):
    model = FlowModel(FlowPipeline.from_pipeline(tiny_pipeline), has_adapter=True)
    model.transformer = torch.nn.Linear(1, 1)
    with pytest.raises(
        ValueError, match="`activation_checkpointing` is True, but Linear is no `ModelMixin` of diffusers"
    ):
        model.activation_checkpointing_enable()


def test_checkpointing_reaches_the_frozen_reference_of_full_fine_tuning(tiny_pipeline):
    model = FlowModel(FlowPipeline.from_pipeline(tiny_pipeline), has_adapter=False)
    model.activation_checkpointing_enable()
    assert model.transformer.gradient_checkpointing
    assert model.frozen.gradient_checkpointing


def test_compilation_that_accelerate_alone_was_told_of_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match="`torch_compile` must be False"):
        AdjointMatchingConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")


def test_mixed_precision_that_accelerate_alone_was_told_of_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(
        ValueError, match="accelerate's configuration says `mixed_precision` 'bf16' and this one 'no': set `bf16`"
    ):
        AdjointMatchingConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    AdjointMatchingConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=True)


def test_bfloat16_autocast_trains_float32_weights(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline, bf16=True, max_steps=2)
    t.train()
    assert {p.dtype for p in t.trained_parameters()} == {torch.float32}
    assert all(math.isfinite(r["loss"]) for r in update_rows(t))
    _, (batch,) = first_rollout(t)
    assert {v.dtype for v in batch.record.tensors()} == {torch.float32}


@pytest.mark.parametrize("lora", [LoraConfig(r=2), None], ids=["lora", "all weights"])
def test_a_folder_is_trained_in_bfloat16_with_float32_where_it_matters(tmp_path, tiny_pipeline, lora):
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    t = adjoint_matching(tmp_path / "run", str(tmp_path / "pipeline"), lora=lora, bf16=True, max_steps=2)
    assert {p.dtype for p in t.trained_parameters()} == {torch.float32}
    assert {p.dtype for p in t.flow.decoders()[0].parameters()} == {torch.float32}
    assert {p.dtype for p in t.model.transformer.parameters() if not p.requires_grad} <= {torch.bfloat16}
    t.train()
    assert all(math.isfinite(r["loss"]) for r in update_rows(t))
    t.save_model()


def test_black_boxes_get_float32_pictures_of_a_decoder_in_bfloat16(tmp_path, tiny_pipeline):
    """Within the 8 bits of bfloat16 of those of a float32 decoder, and not nearer than its rounding."""
    seen: list[torch.Tensor] = []

    def judge(images, prompts, **columns):
        seen.append(images)
        return images.mean(dim=(1, 2, 3))

    for dtype in ("float32", "bfloat16"):
        t = make_trainer("TAFSGRPOTrainer", tmp_path / dtype, tiny_sd3(), judge, decoder_dtype=dtype, max_steps=1)
        vae = t.flow.pipeline.vae
        assert {p.dtype for p in vae.parameters()} == {getattr(torch, dtype)}
        first_rollout(t)
        t.train()
        assert {p.dtype for p in vae.parameters()} == {torch.float32}
    before, after = seen[0], seen[len(seen) // 2]
    assert before.shape == after.shape
    assert before.dtype == after.dtype == torch.float32
    assert 1e-6 < float((before - after).abs().max()) < 0.05
    t.create_model_card()
    assert "bfloat16" in (tmp_path / "bfloat16" / "README.md").read_text(encoding="utf-8")


def test_gradients_of_rewards_are_not_taken_through_a_decoder_in_lower_precision(tmp_path, tiny_pipeline):
    with pytest.raises(ValueError, match=r"`decoder_dtype` \('bfloat16'\) must be 'float32' with AdjointMatchingTr"):
        adjoint_matching(tmp_path, tiny_pipeline, decoder_dtype="bfloat16")
