"""A resumed run is the run it says it is: other prompts, rewards, adapters, base models and settings are refused."""

import pytest
import torch
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from torch import nn

from flowrl_trainers import ACFlowConfig, ACFlowTrainer
from flowrl_trainers.rewards import differentiable
from flowrl_trainers.run_folder.identity import texts_identity, weights_identity

from .helpers import redness
from .tiny import tiny_sd3

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green") for shape in ("circle", "cross")]


@differentiable
def greenness(images, prompts, **columns):
    return images[:, 1].mean(dim=(1, 2))


class Judge(nn.Module):
    """A critic that looks at the latents alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(width), nn.Linear(width, 1))

    def forward(self, latents, sigma, features, mask):
        return self.layers(latents).squeeze(1)


def make(folder, reward=redness, prompts=PROMPTS, columns=None, lora=None, pipeline=None, own_critic=None, **settings):
    defaults = dict(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=4, num_generations=2, num_inference_steps=2,
        steps_per_generation=2, guidance_scale=1.0, max_sequence_length=8, critic="none", wasserstein_coefficient=0.0,
        save_strategy="steps", save_steps=1, log_images=0, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return ACFlowTrainer(
        pipeline or tiny_sd3(), reward, ACFlowConfig(**(defaults | settings)),
        Dataset.from_dict({"prompt": prompts} | (columns or {})), peft_config=lora or LoraConfig(r=2, lora_alpha=4),
        critic=own_critic,
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run that was saved in the middle of a rollout."""
    folder = tmp_path_factory.mktemp("saved")
    make(folder).train()
    return folder


def other_base():
    pipeline = tiny_sd3()
    with torch.no_grad():
        pipeline.transformer.pos_embed.proj.weight.mul_(1.1)
    return {"pipeline": pipeline}


def other_part(name):
    pipeline = tiny_sd3()
    with torch.no_grad():
        next(getattr(pipeline, name).parameters()).mul_(1.01)
    return {"pipeline": pipeline}


def other_scheduler():
    pipeline = tiny_sd3()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=7.0)
    return {"pipeline": pipeline}


@pytest.mark.parametrize(("change", "sentence"), [
    (other_scheduler, r"noise levels 3 \(sha256 \w+\), but this run has 3 \(sha256 \w+\)"),
    *((lambda name=name: other_part(name), r"text encoders and decoder 4 \(sha256 \w+\), but this run has 4 \(sha256 \w+\)")
      for name in ("vae", "text_encoder", "text_encoder_3")),
    (lambda: {"prompts": PROMPTS[::-1]}, r"prompts 4 \(sha256 \w+\), but this run has 4 \(sha256 \w+\)"),
    (lambda: {"prompts": [*PROMPTS, "a blue square"]}, r"prompts 4 \(sha256 \w+\), but this run has 5 \(sha256 \w+\)"),
    (lambda: {"columns": {"answer": ["yes"] * 4}}, r"columns of the prompts \['prompt'\], but this run has \['answer', 'prompt'\]"),
    (lambda: {"reward": greenness}, r"reward_funcs \['redness'\], but this run has \['greenness'\]"),
    (lambda: {"reward_weights": [2.0]}, r"reward_weights \[1.0\], but this run has \[2.0\]"),
    (lambda: {"lora": LoraConfig(r=2, lora_alpha=64)}, "peft_config.lora_alpha 4, but this run has 64"),
    (lambda: {"lora": LoraConfig(r=4, lora_alpha=4)}, "peft_config.r 2, but this run has 4"),
    (lambda: {"lora": LoraConfig(r=2, lora_alpha=4, target_modules=["attn.to_q"])}, "peft_config.target_modules .*, but this run has .*"),
    (other_base, r"base model sha256 \w+, but this run has sha256 \w+"),
    (lambda: {"optim": "sgd"}, "optim adamw_torch_fused, but this run has sgd"),
    (lambda: {"learning_rate": 5e-4}, "learning_rate 0.0001, but this run has 0.0005"),
    (lambda: {"wasserstein_coefficient": 0.5}, "wasserstein_coefficient 0.0, but this run has 0.5"),
])  # fmt: skip
def test_another_run_is_refused_by_what_differs(saved, change, sentence):
    t = make(saved, max_steps=2, **change())
    with pytest.raises(ValueError, match=f"checkpoint-1 was saved with {sentence}: a resumed run repeats"):
        t.train(resume_from_checkpoint=True)
    assert t.state.global_step == 0


def test_other_values_in_a_column_are_refused(tmp_path):
    """Of strings, numbers and lists; the same values in another data set go on."""
    columns = {"answer": ["a", "b", "c", "d"], "weight": [1.0, 2.0, None, 4.0], "words": [["x"], [], ["y"], ["z"]]}
    make(tmp_path, columns=columns).train()
    for name, value in (("answer", "e"), ("weight", 3.0), ("words", ["x", "y"])):
        t = make(tmp_path, max_steps=2, columns=columns | {name: [*columns[name][:3], value]})
        with pytest.raises(ValueError, match=r"was saved with values of the other columns 4 \(sha256 \w+\), but this"):
            t.train(resume_from_checkpoint=True)
    assert make(tmp_path, max_steps=2, columns=columns).train(resume_from_checkpoint=True).global_step == 2


def test_another_network_as_the_critic_is_refused(tmp_path):
    make(tmp_path, critic="module", own_critic=Judge(4)).train()
    t = make(tmp_path, max_steps=2, critic="module", own_critic=Judge(5))
    with pytest.raises(
        ValueError, match=r"was saved with networks beside it \{'critic': 'sha256 .*\}, but this run has"
    ):
        t.train(resume_from_checkpoint=True)
    t = make(tmp_path, max_steps=2, critic="module", own_critic=Judge(4))
    assert t.train(resume_from_checkpoint=True).global_step == 2


def test_another_optimizer_is_refused(saved):
    t = make(saved, max_steps=2)
    t.optimizer = torch.optim.SGD(t.trained_parameters(), lr=1e-4)
    with pytest.raises(ValueError, match="was saved with optimizer AdamW, but this run has SGD"):
        t.train(resume_from_checkpoint=True)


def test_the_same_run_goes_on(saved, tmp_path):
    t = make(tmp_path, max_steps=2)
    assert t.train(resume_from_checkpoint=str(saved / "checkpoint-1")).global_step == 2


def test_texts_are_told_apart_by_their_order_and_borders():
    assert texts_identity(["ab", "c"]) == texts_identity(["ab", "c"])
    assert len({texts_identity(texts) for texts in (["ab", "c"], ["c", "ab"], ["a", "bc"], ["abc"])}) == 4


def test_weights_are_told_apart_by_what_is_frozen_of_them():
    def network(value: float, trained: float = 0.0) -> nn.Module:
        layer = nn.Linear(300, 3)
        nn.init.constant_(layer.weight, value).requires_grad_(False)
        nn.init.constant_(layer.bias, trained)
        return layer

    assert weights_identity(network(1.0, trained=0.0)) == weights_identity(network(1.0, trained=5.0))
    assert weights_identity(network(1.0)) != weights_identity(network(1.0).to(torch.bfloat16))
    assert weights_identity(network(1.0)) != weights_identity(network(1.5))
