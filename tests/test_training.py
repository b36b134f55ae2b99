"""How a training goes and ends: its optimizer, the moving average, the target reward, a break, a second call."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file

from flowrl_trainers import AdjointMatchingConfig, AdjointMatchingTrainer
from flowrl_trainers.rewards import differentiable
from flowrl_trainers.run_folder.checkpoints import MANIFEST

from .helpers import adjoint_matching, redness
from .tiny import tiny_sd3

PROMPTS = ["a red circle", "a blue square"]


def test_a_second_training_starts_with_a_rollout_of_its_own(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline, num_iterations=2, max_steps=1)
    for _ in range(2):
        t.train()
        assert t.buffer.step == 1
        assert [name for name in t.state.log_history[0] if name.startswith("reward/")] == ["reward/redness"]


def test_the_moving_average_is_what_is_saved_and_evaluated(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline, ema_decay=0.5, max_steps=3, learning_rate=0.1)
    t.train()
    raw = [p.detach().clone() for p in t.trained_parameters()]
    with t.average.in_place():
        averaged = [p.detach().clone() for p in t.trained_parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(raw, averaged, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(raw, t.trained_parameters(), strict=True))
    t.save_model()
    fresh = tiny_sd3()
    fresh.load_lora_weights(str(tmp_path))
    stored = [p for n, p in fresh.transformer.named_parameters() if "lora_" in n]
    assert sorted(float(p.double().sum()) for p in stored) == pytest.approx(
        sorted(float(p.double().sum()) for p in averaged)
    )
    found = t.evaluate(PROMPTS)["eval_reward/redness"]

    def judged(weights: list[torch.Tensor]) -> float:
        """By a run that keeps no average."""
        other = adjoint_matching(tmp_path / "other", tiny_sd3(), max_steps=1)
        for parameter, value in zip(other.trained_parameters(), weights, strict=True):
            parameter.data.copy_(value)
        return other.evaluate(PROMPTS)["eval_reward/redness"]

    assert found == pytest.approx(judged(averaged), abs=1e-6)
    assert abs(found - judged(raw)) > 1e-5


def test_a_sheet_of_more_pixels_than_pillow_opens_is_shown(tmp_path, tiny_pipeline, monkeypatch):
    t = adjoint_matching(tmp_path, tiny_pipeline, log_images=2)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 5_000)  # a line of text may have so many
    t.evaluate(PROMPTS)
    sheet = tmp_path / "samples" / "step-000000.png"
    with pytest.raises(Image.DecompressionBombError):
        Image.open(sheet)


def test_an_optimizer_of_ones_own_must_hold_what_is_trained(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline)
    t.optimizer = torch.optim.SGD(t.trained_parameters()[1:], lr=0.1)
    with pytest.raises(
        ValueError,
        match=r"The optimizer that was given lacks some of the trained parameters, .*: set `trainer\.optimizer`",
    ):
        t.train()
    pipeline, config = (
        tiny_sd3(),
        AdjointMatchingConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none"),
    )
    given = torch.optim.SGD(pipeline.transformer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="The optimizer that was given lacks some"):  # the LoRA was not there yet
        AdjointMatchingTrainer(
            pipeline,
            redness,
            config,
            Dataset.from_dict({"prompt": ["a"] * 8}),
            optimizers=(given, None),
            peft_config=LoraConfig(r=2),
        )


def test_training_stops_at_the_target_reward(tmp_path, tiny_pipeline):
    """With all that a regular end has: the last log, an evaluation and a checkpoint."""
    t = adjoint_matching(
        tmp_path, tiny_pipeline, eval_dataset=Dataset.from_dict({"prompt": ["a cat"]}), target_reward=-1e9,
        max_steps=5, logging_steps=3, save_strategy="steps", eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    t.train()
    assert t.state.global_step == 1
    assert any("reward/redness" in row for row in t.state.log_history)
    assert any("eval_reward/redness" in row for row in t.state.log_history)
    assert (tmp_path / "checkpoint-1" / MANIFEST).exists()
    again = adjoint_matching(tmp_path, tiny_sd3(), target_reward=-1e9, max_steps=5)
    assert again.train(resume_from_checkpoint=True).global_step == 1
    assert again.rows == t.rows  # of the last evaluation, for card and metrics.json
    further = adjoint_matching(tmp_path, tiny_sd3(), target_reward=1e9, max_steps=2)
    assert further.train(resume_from_checkpoint=True).global_step == 2


def test_steps_of_an_evaluation_that_is_off_are_said_to_do_nothing(tmp_path, tiny_pipeline, caplog):
    adjoint_matching(tmp_path, tiny_pipeline, eval_steps=5)
    assert "`eval_steps` is 5, but `eval_strategy` is 'no'" in caplog.text


def test_what_was_learned_is_kept_when_training_breaks_off(tmp_path, tiny_pipeline, caplog):
    calls = []

    @differentiable
    def breaks(images, prompts, **columns):
        calls.append(1)
        if len(calls) > 3:  # the probe and two rollouts
            raise OSError("the judge is gone")
        return redness(images, prompts)

    t = adjoint_matching(tmp_path, tiny_pipeline, reward=breaks, max_steps=9, learning_rate=0.1)
    with pytest.raises(OSError, match="the judge is gone"):
        t.train()
    assert "Training broke off after 2 updates" in caplog.text
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert any(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name)


def test_nothing_is_written_where_training_never_began(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline, max_steps=2)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        t.train(resume_from_checkpoint=True)
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()
