"""What around a trainer would change what it computes is refused: torch's modes, and what was done to the networks."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import EarlyStoppingCallback

from flowrl_trainers import AdjointMatchingTrainer

from .helpers import LORA, adjoint_matching, adjoint_matching_config, redness
from .tiny import tiny_sd3


@pytest.mark.parametrize(("mode", "sentence"), [
    (lambda: torch.autocast("cpu", dtype=torch.bfloat16), "stands inside a `torch.autocast`, which would change"),
    (torch.inference_mode, r"switched off by a `torch.inference_mode\(\)` around this call"),
])  # fmt: skip
def test_a_mode_around_the_trainer_or_around_training_is_refused(tmp_path, tiny_pipeline, mode, sentence):
    with mode(), pytest.raises(ValueError, match=sentence):
        adjoint_matching(tmp_path, tiny_pipeline)
    t = adjoint_matching(tmp_path, tiny_pipeline)
    with mode(), pytest.raises(ValueError, match=sentence):
        t.train()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_precision_is_refused(tmp_path, tiny_pipeline, dtype):
    torch.set_default_dtype(dtype)
    try:
        with pytest.raises(ValueError, match=f"torch's default precision is {dtype}, and states and scores"):
            adjoint_matching(tmp_path, tiny_pipeline)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_default_device_without_numbers_is_refused(tmp_path, tiny_pipeline):
    with torch.device("meta"), pytest.raises(ValueError, match="torch's default device is meta"):
        adjoint_matching(tmp_path, tiny_pipeline)


def fused():
    pipeline = tiny_sd3()
    pipeline.transformer.fuse_qkv_projections()
    return pipeline


def compiled():
    pipeline = tiny_sd3()
    pipeline.transformer.compile()
    return pipeline


def compiled_in_blocks():
    pipeline = tiny_sd3()
    pipeline.transformer.transformer_blocks[0].compile()
    return pipeline


def on_meta():
    pipeline = tiny_sd3()
    pipeline.transformer.to("meta")
    return pipeline


def without_transformer():
    pipeline = tiny_sd3()
    pipeline.transformer = None
    return pipeline


def loaded_for_inference():
    with torch.inference_mode():
        return tiny_sd3()


def spoiled():
    pipeline = tiny_sd3()
    with torch.no_grad():
        pipeline.transformer.pos_embed.proj.weight[0] = float("nan")
    return pipeline


def rising():
    pipeline = tiny_sd3()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, invert_sigmas=True)
    return pipeline


def beyond():
    pipeline = tiny_sd3()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=-3.0)
    return pipeline


@pytest.mark.parametrize(("pipeline", "sentence"), [
    (fused, r"attention is fused \(`fuse_qkv_projections`\), which passes by the layers that a LoRA adapts"),
    (compiled, r"transformer is compiled in place \(`transformer.compile\(\)`\)"),
    (compiled_in_blocks, r"transformer is compiled in place \(`transformer.compile\(\)`\)"),
    (on_meta, "transformer is on the device 'meta' and has no weights: load the pipeline again"),
    (without_transformer, "The pipeline's `transformer` is None, which training needs"),
    (loaded_for_inference, r"transformer was loaded inside a `torch.inference_mode\(\)`"),
    (spoiled, "The model's own pictures are not finite before training: its weights are damaged"),
    (rising, r"The noise levels of the pipeline's scheduler \(.*, ...\) do not fall from 1 to 0"),
    (beyond, r"The noise levels of the pipeline's scheduler \(.*, ...\) do not fall from 1 to 0"),
])  # fmt: skip
def test_networks_that_cannot_be_trained_are_refused(tmp_path, pipeline, sentence):
    with pytest.raises(ValueError, match=sentence):
        adjoint_matching(tmp_path, pipeline()).train()


@pytest.mark.parametrize(("name", "value", "sentence"), [
    ("num_generations", 3, r"must be a multiple of `num_generations` \(3\)"),
    ("learning_rate", "abc", "`learning_rate` .*must be a finite number"),
    ("adjoint_steps", -1, r"`adjoint_steps` \(-1\) must be at least 1"),
])  # fmt: skip
def test_a_setting_that_was_changed_later_is_checked_too(tmp_path, tiny_pipeline, name, value, sentence):
    args = adjoint_matching_config(tmp_path)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=sentence):
        AdjointMatchingTrainer(tiny_pipeline, redness, args, ["a red circle"] * 4, peft_config=LORA)


def test_what_is_no_callback_and_what_has_nothing_to_watch(tmp_path, tiny_pipeline):
    for callbacks, error, sentence in (
        ([5], TypeError, "`callbacks` holds 5: pass `transformers.TrainerCallback`s"),
        ([EarlyStoppingCallback()], ValueError, "An `EarlyStoppingCallback` needs `metric_for_best_model`: set it"),
    ):
        with pytest.raises(error, match=sentence):
            adjoint_matching(tmp_path, tiny_pipeline, callbacks=callbacks)


def test_only_a_folder_can_be_resumed_from(tmp_path, tiny_pipeline):
    with pytest.raises(
        TypeError, match=r"`resume_from_checkpoint` \(2.5\) must be True, 'auto' or a checkpoint's folder"
    ):
        adjoint_matching(tmp_path, tiny_pipeline).train(resume_from_checkpoint=2.5)


def test_everybody_who_may_read_the_folder_may_read_its_weights(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline, max_steps=1, save_strategy="steps", save_steps=1)
    t.train()
    t.save_model()
    files = [*tmp_path.glob("*.safetensors"), *tmp_path.glob("checkpoint-1/*.safetensors")]
    assert len(files) == 3
    assert {path.stat().st_mode for path in files} == {(tmp_path / "config.yaml").stat().st_mode}
