"""Before training: what is encoded, in which order, and the probe, which tries every reward on two pictures."""

import pytest
import torch
from datasets import Dataset

from flowrl_trainers import FlowPipeline
from flowrl_trainers.rewards import differentiable
from flowrl_trainers.sampling.conditioning import ConditioningCache
from flowrl_trainers.sampling.flow_model import FlowModel

from .helpers import adjoint_matching, make_trainer, redness


@pytest.mark.parametrize("held_out", [["a cat"], ["a red circle", "a green cross", "a cat"]], ids=["one", "the last"])
def test_the_probe_tries_the_rewards_of_the_evaluation_too(tmp_path, tiny_pipeline, held_out):
    def no_cats(images, prompts, **columns):
        if "a cat" in prompts:
            raise ValueError("a cat is not for me")
        return [0.0] * len(images)

    t = adjoint_matching(tmp_path, tiny_pipeline, eval_dataset=held_out, eval_reward_funcs=no_cats)
    with pytest.raises(ValueError, match="a cat is not for me"):
        t.train()
    assert t.state.global_step == 0


def test_a_judge_waits_for_rows_with_its_columns(tmp_path, tiny_pipeline):
    """Those of training lack them, and there are no others yet."""

    def agrees(images, prompts, answer, **columns):
        return [float(a == "yes") for a in answer]

    t = adjoint_matching(tmp_path, tiny_pipeline, eval_reward_funcs=agrees)
    t.train()
    found = t.evaluate(Dataset.from_dict({"prompt": ["a cat", "a dog"], "answer": ["yes", "no"]}))
    assert found["eval_reward/agrees"] == 0.5
    with pytest.raises(ValueError, match="Reward 'agrees' needs the column 'answer', which `eval_dataset` lacks"):
        t.evaluate(["a cat"])


def test_a_judge_that_takes_no_columns_waits_for_rows_without_them(tmp_path, tiny_pipeline):
    def plain(images, prompts, trainer_state, log_metric, log_extra):
        return [0.5] * len(images)

    rows = Dataset.from_dict({"prompt": ["a cat", "a dog"], "answer": ["yes", "no"]})
    t = adjoint_matching(tmp_path, tiny_pipeline, dataset=rows, eval_reward_funcs=plain, max_steps=1)
    t.train()
    assert t.evaluate(["a cat"])["eval_reward/plain"] == 0.5
    with pytest.raises(ValueError, match=r"Reward 'plain' must take `images, prompts, \*\*columns` by name.*'answer'"):
        t.evaluate(rows)


class Scored(torch.nn.Module):
    """A reward with weights of its own, behind a step of numpy."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, images, prompts, **columns):
        seen = torch.from_numpy(images.detach().cpu().numpy()).mean(dim=(2, 3))
        return self.layer(seen).squeeze(1)


@pytest.mark.parametrize("beside", [[], [redness]], ids=["alone", "beside another"])
def test_a_reward_whose_weights_alone_have_gradients_is_refused(tmp_path, beside):
    t = make_trainer("VGGFlowTrainer", tmp_path, reward=[*beside, differentiable(Scored())])
    with pytest.raises(ValueError, match="Reward 'Scored' is marked differentiable, but its scores carry no gradient"):
        t.train()
    assert t.state.global_step == 0


def test_pictures_of_new_prompts_are_drawn(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline)
    base, tuned = t.pictures(["a green square", "a blue moon"], 2)
    assert base.images.shape == tuned.images.shape
    assert len(base.images) == 2


def test_more_updates_than_were_planned_ask_for_more_prompts(tmp_path, tiny_pipeline):
    rows = Dataset.from_dict({"prompt": [f"prompt {i}" for i in range(16)]})
    t = adjoint_matching(tmp_path, tiny_pipeline, dataset=rows, max_steps=1)
    t.train()
    t.args.max_steps = 6
    t.train()
    assert t.state.global_step == 6


def test_notes_that_nobody_logs_are_not_kept(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline, logging_strategy="no", max_steps=1)
    t.train()
    once = {name: len(values) for name, values in t.metrics.noted.items()}
    t.args.max_steps = 3
    t.train()
    assert {name: len(values) for name, values in t.metrics.noted.items()} == once


def test_the_probe_tries_the_rewards_of_training_on_the_rows_of_the_evaluation(tmp_path, tiny_pipeline):
    @differentiable
    def needs_answers(images, prompts, **columns):
        assert columns["answer"]
        return images.mean(dim=(1, 2, 3))

    rows = Dataset.from_dict({"prompt": [f"prompt {i}" for i in range(8)], "answer": ["yes"] * 8})
    t = adjoint_matching(
        tmp_path,
        tiny_pipeline,
        reward=needs_answers,
        dataset=rows,
        eval_dataset=Dataset.from_dict({"prompt": ["a cat"]}),
    )
    with pytest.raises(KeyError, match="answer"):
        t.train()
    assert t.state.global_step == 0


def test_only_prompts_that_will_be_asked_for_are_encoded(tmp_path, tiny_pipeline):
    many = Dataset.from_dict({"prompt": [f"a red circle {n}" for n in range(50)]})
    t = adjoint_matching(tmp_path, tiny_pipeline, dataset=many, max_steps=3)
    assert len(t.conditioning.index) <= 8  # two of the probe, two of each rollout
    t.train()


def test_prompts_are_encoded_before_the_network_is_placed(tmp_path, tiny_pipeline, monkeypatch):
    """Text encoders and transformer need not fit onto the device together."""
    order = []
    encode, to = ConditioningCache.encode, FlowModel.to
    monkeypatch.setattr(
        ConditioningCache,
        "encode",
        lambda self, *args, **kwargs: order.append("encode") or encode(self, *args, **kwargs),
    )
    monkeypatch.setattr(
        FlowModel, "to", lambda self, *args, **kwargs: order.append("place") or to(self, *args, **kwargs)
    )
    adjoint_matching(tmp_path, tiny_pipeline)
    assert order[0] == "encode"
    assert "place" in order


def test_the_negative_prompt_is_encoded_once(tiny_pipeline, monkeypatch):
    flow, asked = FlowPipeline.from_pipeline(tiny_pipeline, guidance_scale=3.0), []
    encode = flow._encode
    monkeypatch.setattr(
        flow,
        "_encode",
        lambda prompts, negative: asked.append((len(prompts), negative)) or encode(prompts, negative=negative),
    )
    conditioning = flow.encode_prompts(["a cat", "a dog", "a fox"])
    assert asked == [(3, False), (1, True)]
    assert {len(value) for value in conditioning.values()} == {3}
