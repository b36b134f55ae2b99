"""Wrong input gets one sentence before training, and what is not finite is left out. For every trainer."""

import math
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import EarlyStoppingCallback

from flowrl_trainers import FlowPipeline, VGGFlowConfig, VGGFlowTrainer
from flowrl_trainers.rewards import differentiable
from flowrl_trainers.trainers import optimizer_checks

from .helpers import CAPTIONS, FIXED_TARGET, FORMS, make_trainer, redness, update_rows
from .tiny import tiny_sd3
from .tiny_families import tiny

NEED_GRADIENTS = ["AdjointMatchingTrainer", "VGGFlowTrainer"]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("changes", "sentence"), [
    ({"dataset": Dataset.from_dict({"caption": ["a"], "url": ["b"]})}, r"has 'caption' and 'url' but no 'prompt': pass `train_dataset.rename_column\('caption', 'prompt'\)`"),
    ({"dataset": Dataset.from_dict({"prompt": []})}, "`train_dataset` is empty"),
    ({"dataset": Dataset.from_dict({"prompt": ["a", None, "b", "c"]})}, r"`train_dataset` has a prompt that is no string in row 1 \(None\)"),
    ({"per_device_train_batch_size": 0}, r"`per_device_train_batch_size` \(0\) must be at least 1"),
    ({"decode_batch_size": 0}, r"`decode_batch_size` \(0\) must be at least 1, or None"),
    ({"eval_strategy": "epoch"}, "`eval_strategy` is '.*', but there is no `eval_dataset`"),
    ({"ignore_data_skip": True}, r"`ignore_data_skip` \(True\) must be False"),
    *(({"optim": name}, rf"`optim` is '{name}', which is not supported here: choose one of adamw_torch,")
      for name in ("schedule_free_adamw", "galore_adamw", "lomo", "stable_adamw", "adamw_torch_8bit", "rmsprop_bnb")),
    ({"quantization": "int4"}, "`quantization` is 'int4': choose 'nf4', 'int8', 'float8' or None"),
    ({"quantization": "nf4", "pipeline": "no/such/folder"}, "`quantization` is 'nf4', which diffusers loads on a GPU alone, and this run is on the CPU: take 'int8'"),
    ({"text_encoder_quantization": "nf4", "pipeline": "no/such/folder"}, "`text_encoder_quantization` is 'nf4', which diffusers loads on a GPU alone"),
    ({"quantization": "int8"}, r"`quantization` \('int8'\) says how a model is loaded, but `model` is a StableDiffusion3Pipeline, which is: pass its Hub id"),
    ({"embedding_memory_gib": -1.0}, r"`embedding_memory_gib` \(-1.0\) must be at least 0"),
    ({"optim_args": "momentum"}, r"`optim_args` \('momentum'\) must be written as"),
    ({"optim_args": "momentum=0.9"}, "`optim_args` names 'momentum', but `optim` 'adamw_torch.*' reads none"),
    ({"optim": "lion_32bit", "adam_epsilon": 1e-6}, r"`adam_epsilon` \(1e-06\) has no effect with `optim` 'lion_32bit'"),
    ({"optim": "sgd", "optim_args": "nope=1"}, "'sgd' reads momentum, dampening, nesterov: take it out"),
    ({"optim": "sgd", "optim_args": "weight_decay=0.1"}, "'sgd' reads momentum, dampening, nesterov and the setting `weight_decay`: take it out"),
    ({"optim": "sgd", "adam_beta1": 0.5}, r"`adam_beta1` \(0.5\) has no effect with `optim` 'sgd'"),
    ({"optim": "sgd", "optim_args": "momentum=fast"}, "`optim_args` sets 'momentum' to 'fast': make it a number"),
    ({"optim": "sgd", "optim_args": "momentum=0.9,nesterov=ture"}, "`optim_args` sets 'nesterov' to 'ture': make it true or false"),
    ({"optim": "sgd", "optim_args": "nesterov=true"}, r"`optim` 'sgd' refuses `optim_args` \('nesterov=true'\): Nesterov momentum requires"),
    ({"optim_target_modules": ["x"]}, "`optim_target_modules` .* must be None"),
    ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "has no effect without `gradient_checkpointing`"),
    *(({"output_dir": name}, r"`output_dir` \(.*\) must be the path of a folder") for name in ("", " ", "a\0b")),
    ({"save_strategy": "best"}, "`save_strategy` is 'best', but `metric_for_best_model` is None"),
    ({"reward_weights": [0.0]}, r"`reward_weights` \(\[0.0\]\) are all 0"),
    ({"reward_weights": [True]}, r"`reward_weights` is \[True\]: name one number per reward"),
    ({"eval_strategy": "steps"}, "`eval_strategy` is 'steps', but `eval_steps` is None"),
    ({"eval_strategy": "steps", "eval_steps": 0}, "`eval_strategy` is 'steps', but `eval_steps` is 0"),
    ({"warmup_steps": 10}, "`lr_scheduler_type` 'constant' knows no warm-up and no options: take 'constant_with_warmup'"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, "`lr_scheduler_type` 'reduce_lr_on_plateau' takes less for better"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"mode": "max"}, "warmup_steps": 5, "eval_strategy": "epoch"}, r"`warmup_steps` \(5\) has no effect with `lr_scheduler_type` 'reduce_lr_on_plateau': leave it out"),
    ({"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {"num_cycles": 2}}, r"`lr_scheduler_kwargs` \({'num_cycles': 2}\) has no effect with `lr_scheduler_type` 'constant_with_warmup': leave it out"),
    ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"num_cycles": 2}}, r"`lr_scheduler_type` 'linear' does not go with `lr_scheduler_kwargs` \({'num_cycles': 2}\): .*num_cycles"),
    ({"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": "many"}}, "`lr_scheduler_type` 'cosine_with_restarts' does not go with"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, r"`lr_scheduler_type` 'warmup_stable_decay' does not go with `lr_scheduler_kwargs` \({}\): .*num_decay_steps"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "`lr_scheduler_type` 'cosine_with_min_lr' does not go with .*min_lr"),
    ({"torch_compile": True}, r"`torch_compile` \(True\) must be False: it would compile updates alone"),
    ({"enable_jit_checkpoint": True}, r"`enable_jit_checkpoint` \(True\) must be False"),
    ({"data_seed": 1}, r"`data_seed` \(1\) must be None: it has no effect here, as `seed` orders the prompts"),
    ({"train_sampling_strategy": "sequential"}, r"`train_sampling_strategy` \('sequential'\) must be 'random': it has no effect here"),
    ({"torch_empty_cache_steps": 2}, r"`torch_empty_cache_steps` \(2\) must be None: it has no effect here"),
    ({"dataloader_num_workers": 2}, r"`dataloader_num_workers` \(2\) must be 0: it has no effect here"),
    ({"dataset": ("a prompt",)}, "`train_dataset` is a tuple: pass a `datasets.Dataset`"),
    ({"dataset": ["a prompt"]}, "`train_dataset` has 1 prompts but one rollout takes [24]"),
    ({"dataset": Dataset.from_dict({"prompt": ["a"]})}, "`train_dataset` has 1 prompts but one rollout takes [24]"),
    ({"reward_weights": [1.0, 2.0]}, "`reward_weights` has 2 numbers for 1 rewards"),
    ({"num_generations": 3}, r"images per update \(4 = .*\) must be a multiple of `num_generations` \(3\), the images per prompt: make it 3 or 6"),
    ({"reward": "taste"}, "`reward_funcs` names 'taste', which is no known reward"),
    ({"pipeline": "no/such/folder"}, "'no/such/folder' is no diffusers pipeline: pass a Hub id or a folder"),
    ({"pipeline": FlowPipeline}, "`model` is a ABCMeta: pass a Hub id, a folder"),
    ({"height": 33}, r"`height` \(33\) must be a multiple of 4 pixels"),
    ({"push_to_hub": True, "output_dir": "runs/my first run"}, "`push_to_hub` is True, but the Hub has no repository called 'my first run', after `output_dir`: set `hub_model_id`"),
    ({"push_to_hub": True, "hub_model_id": "me/team/model"}, "the Hub has no repository called 'me/team/model', after `hub_model_id`"),
    ({"push_to_hub": True, "hub_model_id": "me/a--b"}, "the Hub has no repository called 'me/a--b', after `hub_model_id`"),
])  # fmt: skip
def test_wrong_input_is_refused_before_training(tmp_path, name, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_trainer(name, tmp_path, **changes)


def test_an_optimizer_of_a_package_that_is_missing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizer_checks, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match="`optim` is 'adamw_8bit', which needs bitsandbytes: install it"):
        make_trainer("AdjointMatchingTrainer", tmp_path, optim="adamw_8bit")


@pytest.mark.parametrize("name", NEED_GRADIENTS)
def test_a_black_box_reward_is_refused_by_trainers_that_need_gradients(tmp_path, name):
    with pytest.raises(ValueError, match=f"Reward 'checker' is not differentiable, which {name} needs"):
        make_trainer(name, tmp_path, reward="checker")


@pytest.mark.parametrize("name", FORMS)
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        ValueError,
        match=r"`output_dir` \(.*file/run\) cannot be written to \(Not a directory\): choose another folder",
    ):
        make_trainer(name, tmp_path / "file" / "run")


@pytest.mark.parametrize("name", FORMS)
def test_a_pipeline_that_carries_a_lora_is_refused_or_trained_further(tmp_path, name):
    pipeline = tiny_sd3()
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"]))
    with pytest.raises(ValueError, match=r"already carries a LoRA: call `pipeline.fuse_lora\(\)`"):
        make_trainer(name, tmp_path, pipeline)
    trained = [
        n
        for n, p in make_trainer(name, tmp_path, pipeline, lora=False).model.transformer.named_parameters()
        if p.requires_grad
    ]
    assert trained
    assert all("lora_" in n for n in trained)


@pytest.mark.parametrize("name", FORMS)
def test_settings_of_a_flow_pipeline_are_not_overridden(tmp_path, name):
    with pytest.raises(ValueError, match="`guidance_scale` is set in `args`, but `model` is a `FlowPipeline`"):
        make_trainer(name, tmp_path, FlowPipeline.from_pipeline(tiny_sd3()), guidance_scale=2.0)


@pytest.mark.parametrize(("callbacks", "optimizers", "sentence"), [
    (EarlyStoppingCallback(), (None, None), "`callbacks` is <.*EarlyStoppingCallback object.*: pass a list of `transformers.TrainerCallback`s"),
    (EarlyStoppingCallback, (None, None), "`callbacks` is <class .*: pass a list"),
    ([], torch.optim.SGD([torch.zeros(1)]), r"`optimizers` is SGD: pass the pair \(optimizer, schedule of the learning rate\)"),
    ([], (torch.optim.SGD([torch.zeros(1)]),), r"`optimizers` is \(SGD .*: pass the pair"),
    ([], (None, torch.optim.SGD([torch.zeros(1)])), r"`optimizers` is \(None, SGD .*: pass the pair"),
])  # fmt: skip
def test_callbacks_and_optimizers_of_another_form_are_refused_before_loading(
    tmp_path, callbacks, optimizers, sentence
):
    args = VGGFlowConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=1)
    with pytest.raises(TypeError, match=re.compile(sentence, re.DOTALL)):
        VGGFlowTrainer("no/such/folder", redness, args, CAPTIONS, callbacks=callbacks, optimizers=optimizers)


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"guidance_scale": "4.5"}, r"`guidance_scale` \('4.5'\) must be a number"),
    ({"guidance_scale": -1.0}, r"`guidance_scale` \(-1.0\) must be at least 0 and finite"),
    ({"guidance_scale": math.nan}, r"`guidance_scale` \(nan\) must be at least 0 and finite"),
    ({"height": "512"}, r"`height` \('512'\) must be a whole number"),
    ({"max_sequence_length": 8.0}, r"`max_sequence_length` \(8.0\) must be a whole number"),
    ({"negative_prompt": ["ugly"]}, r"`negative_prompt` \(\['ugly'\]\) must be a text"),
])  # fmt: skip
def test_settings_of_a_pipeline_of_another_type_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        FlowPipeline.from_pipeline(tiny_sd3(), **settings)


def test_a_scale_of_another_type_is_refused_where_there_is_no_guidance():
    with pytest.raises(ValueError, match=r"^`guidance_scale` \('3'\) must be a number"):
        FlowPipeline.from_pipeline(tiny("flux schnell"), height=32, width=32, guidance_scale="3")


def test_a_third_tokenizer_may_be_missing_with_its_encoder_alone():
    pipeline = tiny_sd3()
    pipeline.register_modules(tokenizer_3=None)
    with pytest.raises(ValueError, match="The pipeline's `tokenizer_3` is None, which training needs"):
        FlowPipeline.from_pipeline(pipeline)
    pipeline.register_modules(text_encoder_3=None)
    assert FlowPipeline.from_pipeline(pipeline, max_sequence_length=8).encode_prompts(["a cat"])


# ---- networks of the user's -----------------------------------------------------------------------------------------


class Returning(torch.nn.Module):
    """A network that returns zeros of a shape for each image."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, latents, sigma, features, mask):
        return latents.new_zeros(len(latents), *self.shape)


@pytest.mark.parametrize(("network", "error", "sentence"), [
    (Returning(1), ValueError, r"^`critic` returned \(2, 1\) for two images: return \(2,\)\.$"),
    (torch.nn.Linear(1, 1), ValueError, r"^`critic` failed on two images \(TypeError: .*\): it is called with latents \(2, 4, 16, 16\)"),
    (lambda *arguments: 0, TypeError, r"^`critic` is a function: pass a `torch.nn.Module`\.$"),
], ids=["a column", "another call", "a function"])  # fmt: skip
def test_a_critic_that_cannot_judge_two_images_is_refused(tmp_path, network, error, sentence):
    with pytest.raises(error, match=sentence):
        make_trainer("ACFlowTrainer", tmp_path, own_critic=network, critic="module")


def test_a_value_network_of_one_channel_is_refused_and_not_spread_over_all(tmp_path):
    args = VGGFlowConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_sequence_length=8, max_steps=1)
    rows = Dataset.from_dict({"prompt": CAPTIONS * 2})
    with pytest.raises(
        ValueError, match=r"^`value_network` returned \(2, 1, 16, 16\) for two images: return \(2, 4, 16, 16\)"
    ):
        VGGFlowTrainer(tiny_sd3(), redness, args, rows, value_network=Returning(1, 16, 16))


# ---- the probe ------------------------------------------------------------------------------------------------------


@differentiable
def without_gradient(images, prompts, **columns):
    return images.detach().mean(dim=(1, 2, 3))


@differentiable
def never_finite(images, prompts, **columns):
    return images.mean(dim=(1, 2, 3)) / 0


@differentiable
def one_score(images, prompts, **columns):
    return images.mean().reshape(1)


@pytest.mark.parametrize(("name", "reward", "sentence"), [
    *((name, without_gradient, "Reward 'without_gradient' is marked differentiable, but its scores carry no gradient") for name in NEED_GRADIENTS),
    *((name, never_finite, "Reward 'never_finite' gave no score that is finite in float32 to 2 probe pictures") for name in FORMS),
    *((name, one_score, r"Reward 'one_score' returned scores of shape \(1,\) for 2 images") for name in FORMS),
])  # fmt: skip
def test_a_probe_of_two_pictures_refuses_a_reward_before_training(tmp_path, name, reward, sentence):
    t = make_trainer(name, tmp_path, reward=reward)
    with pytest.raises(ValueError, match=sentence):
        t.train()
    assert t.state.global_step == 0


# ---- what is not finite ---------------------------------------------------------------------------------------------


@differentiable
def blind_to_green(images, prompts, **columns):
    """Redness, but not a number for one of the four prompts; the probe does not ask for it."""
    bad = torch.tensor([math.nan if "green" in prompt else 0.0 for prompt in prompts], device=images.device)
    return redness(images=images, prompts=prompts) + bad


ONE_IMAGE = {  # of each prompt, where that can be
    "ACFlowTrainer": {"num_generations": 1, "reward_shaping": "none"},
    "DiffusionNFTTrainer": {"num_generations": 1, "reward_shaping": "none"},
    FIXED_TARGET: {"num_generations": 2, "per_device_train_batch_size": 8},
    "TAFSGRPOTrainer": {"num_generations": 2, "per_device_train_batch_size": 8},
}


@pytest.mark.parametrize("name", FORMS)
def test_a_sample_whose_reward_is_not_finite_is_left_out_and_counted(tmp_path, name):
    t = make_trainer(
        name, tmp_path, reward=blind_to_green, max_bad_sample_share=0.5, **ONE_IMAGE.get(name, {"num_generations": 1})
    )
    t.train()
    rows = update_rows(t)
    assert len(rows) == 2
    for row in rows:
        assert max(value for key, value in row.items() if key.startswith("bad_samples/")) == 0.25
        assert math.isfinite(row["loss"])
        assert row["skipped_updates"] == 0
    assert all(p.isfinite().all() for p in t.trained_parameters())
    assert any(p.abs().max() > 0 for n, p in t.model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("name", FORMS)
def test_too_large_a_share_of_bad_samples_ends_the_run(tmp_path, name):
    t = make_trainer(
        name, tmp_path, reward=blind_to_green, max_bad_sample_share=0.2, **ONE_IMAGE.get(name, {"num_generations": 1})
    )
    with pytest.raises(
        RuntimeError,
        match=r"is not finite in float32 for 25 % of the samples, more than `max_bad_sample_share` \(0.2\)",
    ):
        t.train()
    assert t.state.global_step == 0


def test_what_is_no_folder_or_no_prompts_after_training(tmp_path, tiny_pipeline):
    t = make_trainer("AdjointMatchingTrainer", tmp_path / "run", tiny_pipeline)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`output_dir` \(.*file\) cannot be written to \(File exists\)"):
        t.save_model(tmp_path / "file")
    with pytest.raises(TypeError, match=r"`output_dir` \(5\) must be a path"):
        t.save_model(5)
    with pytest.raises(ValueError, match="`dataset` has 'caption' but no 'prompt'"):
        t.pictures(Dataset.from_dict({"caption": ["a"]}), 1)
    with pytest.raises(ValueError, match=r"`count` \(0\) must be at least 1"):
        t.pictures(["a red circle"], 0)
    base, tuned = t.pictures(["a red circle"], 1)
    assert base.prompts == tuned.prompts == ["a red circle"]
    with pytest.raises(TypeError, match="make a trainer and a folder for each trial"):
        t.hyperparameter_search()
