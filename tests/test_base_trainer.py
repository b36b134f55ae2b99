"""What all trainers share: probes, bad samples, averages, checkpoint files, wrong folders."""

import asyncio
import json
import math
import shutil
from itertools import combinations

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from flowrl_trainers import AdjointMatchingConfig, AdjointMatchingTrainer, FlowPipeline
from flowrl_trainers.rewards import Reward, differentiable
from flowrl_trainers.trainers.checkpoints import MANIFEST
from flowrl_trainers.trainers.conditioning import ConditioningCache
from flowrl_trainers.trainers.flow_model import FlowModel
from flowrl_trainers.trainers.prompt_groups import Image

from .gaussian import GaussianFlow
from .test_adjoint_matching import constant, one_rollout, redness, trainer
from .test_wrong_input import make
from .tiny import tiny_sd3


@differentiable
def square(images, prompts, **columns):
    """Of vectors (B, d)."""
    return -images.square().mean(dim=1)


# ---- the probe ---------------------------------------------------------------------------------------------------------------


def test_the_probe_tries_the_rewards_of_the_evaluation_too(tmp_path, tiny_pipeline):
    held_out = Dataset.from_dict({"prompt": ["a cat"]})
    t = trainer(tmp_path, tiny_pipeline, eval_dataset=held_out, eval_reward_funcs="checker")
    with pytest.raises(ValueError, match="'a cat' is not a caption of this world"):
        t.train()


def test_the_probe_tries_the_rewards_of_training_on_the_rows_of_the_evaluation(tmp_path, tiny_pipeline):
    @differentiable
    def needs_answers(images, prompts, answer, **columns):
        return images.mean(dim=(1, 2, 3))

    rows = Dataset.from_dict({"prompt": [f"prompt {i}" for i in range(8)], "answer": ["yes"] * 8})
    t = trainer(tmp_path, tiny_pipeline, reward=needs_answers, dataset=rows, eval_dataset=Dataset.from_dict({"prompt": ["a cat"]}))
    with pytest.raises(TypeError, match="answer"):
        t.train()
    assert t.state.global_step == 0


def test_what_a_reward_logs_stands_in_metrics_pictures_and_card(tmp_path, tiny_pipeline):
    @differentiable
    def talkative(images, prompts, log_metric, log_extra, **columns):
        log_metric("brightness", float(images.detach().mean()))
        log_extra("length", [len(prompt) for prompt in prompts])
        return images.mean(dim=(1, 2, 3))

    t = trainer(
        tmp_path, tiny_pipeline, reward=talkative, eval_dataset=Dataset.from_dict({"prompt": ["a cat", "a dog, sitting"]}), max_steps=1
    )
    t.train()
    assert "brightness" in next(row for row in t.state.log_history if "loss" in row)
    assert "eval_brightness" in t.evaluate()
    t.save_model()
    assert "| brightness |" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "samples" / "step-000001.json").read_text())["extra"] == {"length": [5, 14]}
    assert "(samples/step-000001.png)" in (tmp_path / "README.md").read_text()
    t.save_model(str(tmp_path / "elsewhere"))
    assert ".png" not in (tmp_path / "elsewhere" / "README.md").read_text()  # no picture is there


def test_the_diversity_of_an_evaluation_is_that_of_its_pictures(tmp_path, tiny_pipeline):
    """Whatever the order of the rows and the size of the batches."""
    seen: list[tuple[str, torch.Tensor]] = []

    @differentiable
    def looks(images, prompts, **columns):
        seen.extend(zip(prompts, images, strict=True))
        return images.mean(dim=(1, 2, 3))

    rows = Dataset.from_dict({"prompt": ["a fox", "a cat", "a dog", "a cat", "a dog", "a cat"]})
    t = trainer(tmp_path, tiny_pipeline, reward=looks, eval_dataset=rows, per_device_eval_batch_size=2, log_images=0)
    found = t.evaluate()["eval_diversity"]
    prompts, images = zip(*seen[:6], strict=True)  # of the tuned model
    assert sorted(prompts) == sorted(rows["prompt"])
    cats, dogs = ([image for prompt, image in zip(prompts, images, strict=True) if prompt == name] for name in ("a cat", "a dog"))
    distances = [[float((a - b).square().mean() ** 0.5) for a, b in combinations(group, 2)] for group in (cats, dogs)]
    assert found == pytest.approx(sum(sum(d) / len(d) for d in distances) / 2, rel=1e-5)


def test_a_second_training_starts_with_a_rollout_of_its_own(tmp_path, tiny_pipeline):
    t = trainer(tmp_path, tiny_pipeline, num_iterations=2, max_steps=1)
    for _ in range(2):
        t.train()
        assert t._micro_step == 1
        assert [name for name in t.state.log_history[0] if name.startswith("reward/")] == ["reward/redness"]


def test_only_prompts_that_will_be_asked_for_are_encoded(tmp_path, tiny_pipeline):
    many = Dataset.from_dict({"prompt": [f"a red circle {n}" for n in range(50)]})
    t = trainer(tmp_path, tiny_pipeline, dataset=many, max_steps=3)
    assert len(t.conditioning.index) <= 8  # two of the probe, two of each rollout
    t.train()


# ---- what is not finite ------------------------------------------------------------------------------------------------------


def flaky(bad_calls: set[int]):
    """Redness, but not a number for the first image of the calls listed; the probe is call 0."""
    calls = iter(range(1000))

    def reward(images, prompts, **columns):
        scores = redness(images=images, prompts=prompts)
        if next(calls) in bad_calls:
            scores = torch.cat([scores[:1] * math.nan, scores[1:]])
        return scores

    return differentiable(reward)


def test_a_sample_that_is_not_finite_is_left_out_and_counted(tmp_path, tiny_pipeline):
    """Two images, the second of which is lost: the update is that of the other alone, at half weight."""
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_bad_sample_share": 0.5}
    t = trainer(tmp_path, tiny_pipeline, reward=flaky({1}), **settings)
    t.train()
    (row,) = [r for r in t.state.log_history if "loss" in r]
    assert row["bad_samples/reward_gradient"] == 0.5
    assert row["skipped_updates"] == 0
    assert math.isfinite(row["reward/reward"])
    assert all(p.isfinite().all() for p in t.trained_parameters())
    assert any(p.abs().max() > 0 for n, p in t.model.named_parameters() if "lora_B" in n)


def test_an_image_whose_velocity_is_not_finite_is_left_out_and_does_not_spoil_the_scale(tmp_path, tiny_pipeline):
    t = trainer(tmp_path, tiny_pipeline, reward_scale=None, max_bad_sample_share=0.5)
    velocity = t.flow.velocity

    def poisoned(transformer, latents, sigma, conditioning, *, guidance):
        v = velocity(transformer, latents, sigma, conditioning, guidance=guidance)
        if torch.is_grad_enabled() and t.sampler is not None and not transformer.training:  # the adjoint's calls
            v = torch.cat([v[:1] * math.nan, v[1:]])
        return v

    t.flow.velocity = poisoned
    (batch,) = t._make_rollout(next(iter(t.get_train_dataloader())))
    assert batch.good.tolist() == [False, True]
    assert all(value.isfinite().all() for value in batch.tensors.values())
    assert 0 < t.reward_scale < 1e6


def test_too_many_bad_samples_end_the_run(tmp_path, tiny_pipeline):
    t = trainer(tmp_path, tiny_pipeline, reward=flaky({2}), max_bad_sample_share=0.4)
    with pytest.raises(
        RuntimeError, match=r"The reward_gradient is not finite for 50 % of the samples, more than `max_bad_sample_share` \(0.4\)"
    ):
        t.train()
    assert t.state.global_step == 1


def test_an_update_whose_gradient_is_not_finite_is_skipped(tmp_path, tiny_pipeline):
    t = trainer(tmp_path, tiny_pipeline, max_steps=3, save_strategy="no")
    losses, calls = t.micro_batch_losses, iter(range(100))

    def poisoned(*args):
        value = losses(*args)
        return value + torch.sqrt(value * 0) if next(calls) in (3, 4, 5) else value  # finite, but its gradient is not

    t.micro_batch_losses = poisoned
    before = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            before.append([p.detach().clone() for p in t.trained_parameters()])

    t.add_callback(Watch())
    t.train()
    assert [r["skipped_updates"] for r in t.state.log_history if "loss" in r] == [0, 1, 0]
    assert all(torch.equal(a, b) for a, b in zip(before[0], before[1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before[1], before[2], strict=True))


def test_rewards_are_summed_with_their_weights(tmp_path):
    """Two rewards with weights against one function that computes the sum itself."""

    @differentiable
    def brightness(images, prompts, **columns):
        return images.mean(dim=(1, 2, 3))

    @differentiable
    def both(images, prompts, **columns):
        return redness(images=images, prompts=prompts) - 2 * brightness(images=images, prompts=prompts)

    rows = []
    for rewards, weights in (([redness, brightness], [1.0, -2.0]), ([both], None)):
        t = trainer(tmp_path, tiny_sd3(), reward=rewards, reward_weights=weights, max_steps=1)
        t.train()
        rows.append(next(r for r in t.state.log_history if "loss" in r))
    assert rows[0]["reward"] == pytest.approx(rows[0]["reward/redness"] - 2 * rows[0]["reward/brightness"], rel=1e-5)
    for name in ("reward", "reward_gradient_norm", "loss"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4)


# ---- the average and the target ----------------------------------------------------------------------------------------------


def test_the_moving_average_is_what_is_saved_and_evaluated(tmp_path, tiny_pipeline):
    t = trainer(tmp_path, tiny_pipeline, ema_decay=0.5, max_steps=3, learning_rate=0.1)
    t.train()
    raw = [p.detach().clone() for p in t.trained_parameters()]
    with t.averaged_weights():
        averaged = [p.detach().clone() for p in t.trained_parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(raw, averaged, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(raw, t.trained_parameters(), strict=True))
    t.save_model()
    fresh = tiny_sd3()
    fresh.load_lora_weights(str(tmp_path))
    stored = [p for n, p in fresh.transformer.named_parameters() if "lora_" in n]
    assert sorted(float(p.double().sum()) for p in stored) == pytest.approx(sorted(float(p.double().sum()) for p in averaged))


def test_an_optimizer_of_ones_own_must_hold_what_is_trained(tmp_path, tiny_pipeline):
    t = trainer(tmp_path, tiny_pipeline)
    t.optimizer = torch.optim.SGD(t.trained_parameters()[1:], lr=0.1)
    with pytest.raises(
        ValueError, match=r"The optimizer that was given lacks some of the trained parameters, .*: set `trainer\.optimizer`"
    ):
        t.train()
    pipeline, config = tiny_sd3(), AdjointMatchingConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
    given = torch.optim.SGD(pipeline.transformer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="The optimizer that was given lacks some"):  # the LoRA was not there yet
        AdjointMatchingTrainer(
            pipeline, redness, config, Dataset.from_dict({"prompt": ["a"] * 8}), optimizers=(given, None), peft_config=LoraConfig(r=2)
        )


def test_what_has_no_score_has_no_part_in_the_reward(tmp_path, tiny_pipeline):
    t = trainer(tmp_path, tiny_pipeline)
    t.log_rewards(torch.tensor([[-2.0], [math.nan], [-4.0], [math.inf]]))
    assert t.rollout_reward == -3.0
    assert t._metrics["reward/redness"] == [-3.0]
    t.log_rewards(torch.tensor([[math.nan], [math.nan]]))
    assert t.rollout_reward is None  # not 0, which may be more than any reward is
    assert t._metrics["reward"] == [-3.0]


def test_training_stops_at_the_target_reward(tmp_path, tiny_pipeline):
    """With all that a regular end has: the last log, an evaluation and a checkpoint."""
    t = trainer(
        tmp_path, tiny_pipeline, eval_dataset=Dataset.from_dict({"prompt": ["a cat"]}), target_reward=-1e9, max_steps=5, logging_steps=3,
        save_strategy="steps", eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    t.train()
    assert t.state.global_step == 1
    assert any("reward/redness" in row for row in t.state.log_history)
    assert any("eval_reward/redness" in row for row in t.state.log_history)
    assert (tmp_path / "checkpoint-1" / MANIFEST).exists()
    again = trainer(tmp_path, tiny_sd3(), target_reward=-1e9, max_steps=5)
    assert again.train(resume_from_checkpoint=True).global_step == 1
    assert again.rows == t.rows  # of the last evaluation, for card and metrics.json
    further = trainer(tmp_path, tiny_sd3(), target_reward=1e9, max_steps=2)
    assert further.train(resume_from_checkpoint=True).global_step == 2


def test_a_finished_run_of_a_fraction_of_an_epoch_is_resumed_without_another_update(tmp_path):
    settings = {"max_steps": -1, "num_train_epochs": 0.5, "save_strategy": "steps", "save_steps": 1}
    t = trainer(tmp_path, tiny_sd3(), **settings)
    t.train()
    assert t.state.global_step == t._updates_per_epoch / 2
    assert trainer(tmp_path, tiny_sd3(), **settings).train(resume_from_checkpoint=True).global_step == t.state.global_step


def test_what_was_learned_is_kept_when_training_breaks_off(tmp_path, tiny_pipeline, caplog):
    calls = []

    @differentiable
    def breaks(images, prompts, **columns):
        calls.append(1)
        if len(calls) > 3:  # the probe and two rollouts
            raise OSError("the judge is gone")
        return redness(images, prompts)

    t = trainer(tmp_path, tiny_pipeline, reward=breaks, max_steps=9, learning_rate=0.1)
    with pytest.raises(OSError, match="the judge is gone"):
        t.train()
    assert "Training broke off after 2 updates" in caplog.text
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert any(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name)


def test_nothing_is_written_where_training_never_began(tmp_path, tiny_pipeline):
    t = trainer(tmp_path, tiny_pipeline, max_steps=2)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        t.train(resume_from_checkpoint=True)
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()


def test_the_same_call_starts_a_run_and_resumes_it(tmp_path, caplog):
    for steps in (1, 2):
        t = trainer(tmp_path, tiny_sd3(), save_strategy="steps", save_steps=1, max_steps=steps)
        assert t.train(resume_from_checkpoint="auto").global_step == steps
        assert t._updates == 1
    for manifest in tmp_path.glob(f"checkpoint-*/{MANIFEST}"):
        manifest.unlink()
    again = trainer(tmp_path, tiny_sd3(), save_strategy="steps", save_steps=1, max_steps=1)
    assert again.train(resume_from_checkpoint="auto").global_step == 1
    assert "is complete: the run starts anew" in caplog.text


def test_a_finished_run_is_resumed_without_another_update(tmp_path):
    t = trainer(tmp_path, tiny_sd3(), save_strategy="steps", save_steps=1, max_steps=3, learning_rate=0.1)
    t.train()
    again = trainer(tmp_path, tiny_sd3(), save_strategy="steps", save_steps=1, max_steps=3, learning_rate=0.1)
    assert again.train(resume_from_checkpoint=True).global_step == 3
    assert again.state.global_step == 3
    assert all(torch.equal(a, b) for a, b in zip(t.trained_parameters(), again.trained_parameters(), strict=True))
    assert not (tmp_path / "checkpoint-4").exists()


# ---- options that must not change the result ---------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", ["lean", "full", "current"])
def test_gradient_checkpointing_changes_nothing(tmp_path, adjoint):
    """Also for the adjoint, whose checkpoints are recomputed with the adapter as it is then."""
    results = []
    for checkpointing in (False, True):
        t = trainer(tmp_path, tiny_sd3(), activation_checkpointing=checkpointing, max_steps=3, learning_rate=0.1, adjoint=adjoint)
        t.train()
        results.append([p.detach().clone() for p in t.trained_parameters()])
        assert t.flow.pipeline.vae.decoder.gradient_checkpointing is checkpointing
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_checkpointing_of_a_network_that_has_none_is_refused(tiny_pipeline):
    model = FlowModel(FlowPipeline.from_pipeline(tiny_pipeline), has_adapter=True)
    model.transformer = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="`activation_checkpointing` is True, but Linear is no `ModelMixin` of diffusers"):
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
    with pytest.raises(ValueError, match="accelerate's configuration says `mixed_precision` 'bf16' and this one 'no': set `bf16`"):
        AdjointMatchingConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    AdjointMatchingConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=True)


@pytest.mark.parametrize("metric", [None, "eval_loss", "reward/taste", "eval_diversity"])
def test_a_best_checkpoint_by_a_metric_that_no_evaluation_has_is_refused(tmp_path, tiny_pipeline, metric):
    with pytest.raises(
        ValueError, match=r"`metric_for_best_model` is '.*', which evaluations do not have, or not each of them: choose reward/redness"
    ):
        trainer(
            tmp_path, tiny_pipeline, eval_dataset=Dataset.from_dict({"prompt": ["a cat"]}), save_strategy="steps", save_steps=1, eval_strategy="steps",
            eval_steps=1, load_best_model_at_end=True, metric_for_best_model=metric,
        )  # fmt: skip


def test_the_best_of_a_reward_that_is_lowered_is_the_lowest(tmp_path, tiny_pipeline):
    settings = dict(
        eval_dataset=Dataset.from_dict({"prompt": ["a cat"]}), save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="reward/redness", reward_weights=[-1.0],
    )  # fmt: skip
    with pytest.raises(ValueError, match="`greater_is_better` is True for 'redness', which a weight of -1 lowers: set it to False"):
        trainer(tmp_path, tiny_pipeline, **settings)
    with pytest.raises(ValueError, match="which a weight of -1 lowers"):  # of TAFS-GRPO's further row
        trainer(tmp_path, tiny_pipeline, **(settings | {"metric_for_best_model": "eval_ode_reward/redness"}))
    trainer(tmp_path, tiny_pipeline, greater_is_better=False, **settings)


def test_a_larger_reward_is_better_whatever_it_is_called(tmp_path):
    for metric, greater in (("eval_reward/gloss", True), ("reward/redness", True), ("eval_clarity", True), ("eval_gloss", False)):
        config = AdjointMatchingConfig(output_dir=str(tmp_path), metric_for_best_model=metric, use_cpu=True, report_to="none")
        assert config.greater_is_better is greater


def test_running_statistics_are_part_of_a_checkpoint(tmp_path):
    class Normalised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.scale = torch.nn.BatchNorm1d(1), torch.nn.Parameter(torch.ones(1))
            self.register_buffer("scratch", torch.zeros(1), persistent=False)

        def forward(self, x, sigma):
            return self.scale * self.norm(x)

    prompts = Dataset.from_dict({"prompt": [str(n) for n in range(8)]})
    config = AdjointMatchingConfig(
        output_dir=str(tmp_path), max_steps=2, save_strategy="steps", save_steps=2, num_inference_steps=4, report_to="none", use_cpu=True
    )
    t, again = (AdjointMatchingTrainer(GaussianFlow(Normalised(), 1), square, config, prompts) for _ in range(2))
    t.train()
    assert t.model.transformer.norm.running_mean.abs() > 0
    again.train(resume_from_checkpoint=True)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(again.model.transformer.norm, name), getattr(t.model.transformer.norm, name))
    assert "transformer.scratch" not in load_file(tmp_path / "checkpoint-2" / "trained_parameters.safetensors")


@pytest.mark.parametrize("metric", ["eval_colour_entropy", "velocity_distance", "reward/redness"])
def test_a_best_checkpoint_may_be_by_whatever_an_evaluation_returns(tmp_path, tiny_pipeline, metric):
    t = trainer(
        tmp_path, tiny_pipeline, eval_dataset=Dataset.from_dict({"prompt": ["a cat"]}), save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, max_steps=1, load_best_model_at_end=True, metric_for_best_model=metric,
    )  # fmt: skip
    t.train()
    assert t.state.best_model_checkpoint.endswith("checkpoint-1")


def test_bfloat16_autocast_trains_float32_weights(tmp_path, tiny_pipeline):
    t = trainer(tmp_path, tiny_pipeline, bf16=True, max_steps=2)
    t.train()
    assert {p.dtype for p in t.trained_parameters()} == {torch.float32}
    assert all(math.isfinite(r["loss"]) for r in t.state.log_history if "loss" in r)
    _, (batch,) = one_rollout(t)
    assert {v.dtype for v in batch.tensors.values()} == {torch.float32}


@pytest.mark.parametrize("lora", [LoraConfig(r=2), None], ids=["lora", "all weights"])
def test_a_folder_is_trained_in_bfloat16_with_float32_where_it_matters(tmp_path, tiny_pipeline, lora):
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    t = trainer(tmp_path / "run", str(tmp_path / "pipeline"), lora=lora, bf16=True, max_steps=2)
    assert {p.dtype for p in t.trained_parameters()} == {torch.float32}
    assert {p.dtype for p in t.flow.decoders()[0].parameters()} == {torch.float32}
    assert {p.dtype for p in t.model.transformer.parameters() if not p.requires_grad} <= {torch.bfloat16}
    t.train()
    assert all(math.isfinite(r["loss"]) for r in t.state.log_history if "loss" in r)
    t.save_model()


def test_decoding_in_parts_changes_nothing(tmp_path):
    rows = []
    for size in (None, 1):
        t = trainer(tmp_path, tiny_sd3(), decode_batch_size=size, per_device_train_batch_size=4, max_steps=1)
        t.train()
        rows.append(next(r for r in t.state.log_history if "loss" in r))
    assert rows[0]["reward_gradient_norm"] == pytest.approx(rows[1]["reward_gradient_norm"], rel=1e-5)


# ---- folders -----------------------------------------------------------------------------------------------------------------


def test_prompts_are_encoded_before_the_network_is_placed(tmp_path, tiny_pipeline, monkeypatch):
    """Text encoders and transformer need not fit onto the device together."""
    order = []
    encode, to = ConditioningCache.encode, FlowModel.to
    monkeypatch.setattr(ConditioningCache, "encode", lambda self, *args, **kwargs: order.append("encode") or encode(self, *args, **kwargs))
    monkeypatch.setattr(FlowModel, "to", lambda self, *args, **kwargs: order.append("place") or to(self, *args, **kwargs))
    trainer(tmp_path, tiny_pipeline)
    assert order[0] == "encode"
    assert "place" in order


def test_the_card_says_where_the_adapter_is_and_what_was_told_of_it(tmp_path, tiny_pipeline):
    t = trainer(tmp_path, tiny_pipeline)
    t.hub_model_id = "me/red"  # as `push_to_hub` makes it, whatever `args.push_to_hub` says
    t.create_model_card(dataset_name="me/prompts", license="apache-2.0", tags="red")
    t.save_model()
    card = (tmp_path / "README.md").read_text()
    assert 'pipe.load_lora_weights("me/red")' in card
    head = yaml.safe_load(card.split("---")[1])
    assert (head["datasets"], head["license"]) == (["me/prompts"], "apache-2.0")
    assert "red" in head["tags"]
    t.create_model_card(model_name="Red")
    t.create_model_card(model_name=tmp_path.name)  # as Trainer's `push_to_hub` says
    assert "# Red\n" in (tmp_path / "README.md").read_text()
    with pytest.raises(TypeError, match="colour"):
        t.create_model_card(colour="red")


@pytest.mark.parametrize("name", ["AdjointMatchingTrainer", "ACFlowTrainer"])
def test_a_megapixel_is_decoded_at_a_time(tmp_path, monkeypatch, name):
    """A reward that is differentiated is called on as many; any other sees the whole batch."""
    monkeypatch.setattr("flowrl_trainers.trainers.scoring.MEGAPIXEL", 3 * 32 * 32)
    seen, decodings = [], []

    @differentiable
    def looks(images, prompts, **columns):
        seen.append(len(images))
        return images.mean(dim=(1, 2, 3))

    t = make(name, tmp_path, reward=looks, max_steps=1)
    decode = t.flow.decode
    monkeypatch.setattr(t.flow, "decode", lambda latents: decodings.append(len(latents)) or decode(latents))
    t._make_rollout(next(iter(t.get_train_dataloader())))
    assert decodings == [3, 1]
    decodings.clear()
    monkeypatch.setattr("flowrl_trainers.trainers.scoring.MEGAPIXEL", 32 * 32)
    if name == "ACFlowTrainer":
        t.probe()
        assert decodings == [1, 1]
        seen.pop()
    assert seen == ([3, 1] if name == "AdjointMatchingTrainer" else [4])


def test_judges_leave_the_device_to_training(tmp_path, tiny_pipeline, monkeypatch):
    """A training reward that shares its network with a judge is there when training goes on."""
    places = []

    class Judge(Reward):
        differentiable = True

        def __init__(self, name):
            self.name = name

        def to(self, device):
            places.append((self.name, device.type))

        def __call__(self, images, prompts, **columns):
            return images.mean(dim=(1, 2, 3))

    rows = Dataset.from_dict({"prompt": ["a cat", "a dog"]})
    t = trainer(tmp_path, tiny_pipeline, reward=Judge("trained"), eval_dataset=rows, eval_reward_funcs=Judge("judge"), max_steps=1)
    assert places == [("trained", "cpu")]
    monkeypatch.setattr(type(t.args), "device", property(lambda self: torch.device("meta")))
    places.clear()
    with t.judges_at_hand():
        assert places == [("judge", "meta")]
    assert places[1:] == [("judge", "cpu"), ("trained", "meta")]
    monkeypatch.undo()
    for act in (t.probe, t.evaluate):
        places.clear()
        act()
        assert places[0] == ("judge", "cpu")
        assert places[-1] == ("trained", "cpu")


def test_the_negative_prompt_is_encoded_once(tiny_pipeline, monkeypatch):
    flow, asked = FlowPipeline.from_pipeline(tiny_pipeline, guidance_scale=3.0), []
    encode = flow._encode
    monkeypatch.setattr(
        flow, "_encode", lambda prompts, negative: asked.append((len(prompts), negative)) or encode(prompts, negative=negative)
    )
    conditioning = flow.encode_prompts(["a cat", "a dog", "a fox"])
    assert asked == [(3, False), (1, True)]
    assert {len(value) for value in conditioning.values()} == {3}


def test_only_as_many_checkpoints_are_kept_as_asked(tmp_path, tiny_pipeline):
    t = trainer(tmp_path, tiny_pipeline, save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=3)
    t.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert t.args.save_total_limit == 1


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path, tiny_pipeline):
    settings = dict(
        eval_dataset=Dataset.from_dict({"prompt": ["a red circle"] * 2}), save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        max_steps=3, load_best_model_at_end=True, metric_for_best_model="eval_reward/redness", learning_rate=0.1,
    )  # fmt: skip
    t = trainer(tmp_path, tiny_pipeline, **settings)
    t.train()
    best = max((r for r in t.state.log_history if "eval_reward/redness" in r), key=lambda r: r["eval_reward/redness"])
    assert t.state.best_model_checkpoint.endswith(f"checkpoint-{best['step']}")
    # What is told of the model is what the best evaluation found.
    assert t.rows["tuned"]["reward/redness"] == best["eval_reward/redness"]
    t.save_model()
    card = (tmp_path / "README.md").read_text()
    assert f"| `updates` | {best['step']} |" in card
    assert f"(samples/step-{best['step']:06d}.png)" in card
    tuned, rows = [p.detach().clone() for p in t.trained_parameters()], t.rows
    again = t.evaluate()
    assert again["eval_reward/redness"] == pytest.approx(best["eval_reward/redness"], abs=1e-6)

    sheet = json.loads((tmp_path / "samples" / "step-000001.json").read_text())
    assert sheet["prompts"] == ["a red circle"]

    # A finished run that is resumed ends with the same model, wherever it was moved.
    (tmp_path / "moved").mkdir()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        checkpoint.rename(tmp_path / "moved" / checkpoint.name)
    resumed = trainer(tmp_path / "moved", tiny_sd3(), **settings)
    assert resumed.train(resume_from_checkpoint=True).global_step == 3
    assert all(torch.equal(a, b) for a, b in zip(tuned, resumed.trained_parameters(), strict=True))
    assert resumed.rows == rows
    shutil.copytree(tmp_path / "moved" / "checkpoint-3", tmp_path / "backup" / "checkpoint-3")  # of the last alone
    state = json.loads((tmp_path / "backup" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best['step']}")
    (tmp_path / "moved" / f"checkpoint-{best['step']}").rename(tmp_path / f"checkpoint-{best['step']}")
    resumed = trainer(tmp_path / "elsewhere", tiny_sd3(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "backup" / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(tuned, resumed.trained_parameters(), strict=True))
    shutil.rmtree(tmp_path / f"checkpoint-{best['step']}")
    assert trainer(tmp_path / "moved", tiny_sd3(), **settings).train(resume_from_checkpoint=True).global_step == 3


def test_the_card_names_the_update_of_the_best_checkpoint(tmp_path, tiny_pipeline, monkeypatch):
    """The best evaluation may have no checkpoint: then the best that has one is loaded."""
    t = trainer(
        tmp_path, tiny_pipeline, eval_dataset=Dataset.from_dict({"prompt": ["a cat"]}), save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=1, max_steps=4, load_best_model_at_end=True, metric_for_best_model="eval_score", greater_is_better=True,
    )  # fmt: skip
    scores = {1: 0.0, 2: 1.0, 3: 2.0, 4: -1.0}
    evaluation_row = t._evaluation_row

    def with_score(*args):
        row, found = evaluation_row(*args)
        return row | {"score": scores[t.state.global_step]}, found

    monkeypatch.setattr(t, "_evaluation_row", with_score)
    t.train()
    assert t.state.best_global_step == 3
    assert t.rows["tuned"]["score"] == 1.0
    t.save_model()
    assert "| `updates` | 2 |" in (tmp_path / "README.md").read_text()
    last = tmp_path / "samples" / "step-000004.json"
    of_the_last = last.read_bytes()
    t.evaluate()
    assert t.sheet.name == "step-000002.png"
    assert last.read_bytes() == of_the_last  # not of the weights as they are now


def test_tensorboard_gets_the_pictures(tmp_path, tiny_pipeline, monkeypatch):

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    t = trainer(tmp_path, tiny_pipeline, eval_dataset=Dataset.from_dict({"prompt": ["a red circle", "a cross"]}), report_to="tensorboard", max_steps=1,
                eval_strategy="steps", eval_steps=1)  # fmt: skip
    t.train()
    events = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0})
    events.Reload()
    assert {"samples/base", "samples/tuned"} <= {tag.split("/image")[0] for tag in events.Tags()["images"]}
    assert "train/reward/redness" in events.Tags()["scalars"]


def test_full_fine_tuning_keeps_a_frozen_reference(tmp_path, tiny_pipeline):
    before = {n: p.detach().clone() for n, p in tiny_pipeline.transformer.named_parameters()}
    t = trainer(tmp_path, tiny_pipeline, lora=None, max_steps=2, learning_rate=0.01)
    t.train()
    assert any(not torch.equal(p, before[n]) for n, p in t.flow.transformer.named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in t.model.frozen.named_parameters())
    t.save_model()
    stored = type(tiny_pipeline.transformer).from_pretrained(tmp_path / "transformer")
    assert all(torch.equal(p, q) for p, q in zip(stored.parameters(), t.flow.transformer.parameters(), strict=True))


def test_continuing_an_adapter_measures_against_the_base_model(tmp_path, tiny_pipeline):
    tiny_pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q", "attn.to_v"], init_lora_weights=False))
    t = trainer(tmp_path, tiny_pipeline, lora=None)
    examples = next(iter(t.get_train_dataloader()))
    (batch,) = t._make_rollout(examples)
    bare = tiny_sd3().transformer
    with torch.no_grad():
        first, level = batch.tensors["latents"][:, 0], t.window_sigmas[0].expand(2)
        expected = t.flow.velocity(bare, first, level, t.condition(examples), guidance=True)
    torch.testing.assert_close(batch.tensors["velocities"][:, 0], expected)


def test_an_adapter_that_was_loaded_is_trained_further_and_saved(tmp_path, tiny_pipeline):
    """diffusers calls a loaded adapter default_0, not default."""
    t = trainer(tmp_path / "first", tiny_pipeline, max_steps=1)
    t.train()
    t.save_model()
    loaded = tiny_sd3()
    loaded.load_lora_weights(str(tmp_path / "first"))
    (name,) = loaded.get_active_adapters()
    loaded.set_adapters(name, 0.5)
    with pytest.raises(ValueError, match=r"has a weight of 0.5, which its file could not keep: call `pipeline.set_adapters"):
        trainer(tmp_path / "again", loaded, lora=None)
    loaded.set_adapters(name, 1.0)
    again = trainer(tmp_path / "again", loaded, lora=None, max_steps=1, learning_rate=0.1)
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
        trainer(tmp_path, tiny_pipeline, lora=config)


def test_two_active_adapters_are_one_too_many(tmp_path, tiny_pipeline):
    for name in ("a", "b"):
        tiny_pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"]), adapter_name=name)
    tiny_pipeline.transformer.set_adapters(["a", "b"])
    with pytest.raises(ValueError, match=r"has 2 active adapters \(a, b\): choose the one to train"):
        trainer(tmp_path, tiny_pipeline, lora=None)


def test_constant_rewards_are_named(tmp_path, tiny_pipeline):
    t = trainer(tmp_path, tiny_pipeline, reward=differentiable(constant), reward_scale=None)
    with pytest.raises(ValueError, match="gradient is zero on the whole first rollout"):
        t.train()


def test_asynchronous_rewards_look_at_pictures_while_the_next_are_decoded(tmp_path, monkeypatch):
    """Each call ends only when the batch after its own has been decoded; of four batches the last has none after it."""
    decoded, asked = [], []

    async def patient(images, prompts, **columns):
        asked.append(prompts)
        for _ in range(500):
            if len(decoded) >= min(len(asked) + 1, 4):
                return images.mean(dim=(1, 2, 3))
            await asyncio.sleep(0.01)
        raise AssertionError("the next pictures were not decoded")

    t = make("ACFlowTrainer", tmp_path, reward=patient, num_generations=2, decode_batch_size=1)
    examples = [t.train_dataset[Image(row, row, 0)] for row in range(4)]
    latents = t.initial_latents([e.key for e in examples], "test")
    expected = t.flow.images(latents).mean(dim=(1, 2, 3))
    images = t.flow.images
    monkeypatch.setattr(t.flow, "images", lambda part: (decoded.append(len(part)), images(part))[1])
    torch.testing.assert_close(t.score(latents, examples)[:, 0], expected)
    assert (decoded, len(asked)) == ([1] * 4, 4)
