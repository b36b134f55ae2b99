"""What an evaluation finds and a reward logs stands in metrics, pictures, trackers and the card."""

import json
import random
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset

from flowrl_trainers.rewards import CheckerReward, differentiable
from flowrl_trainers.run_folder.card import read_facts, write_card

from .helpers import adjoint_matching, update_rows


def test_what_a_reward_logs_stands_in_metrics_pictures_and_card(tmp_path, tiny_pipeline):
    @differentiable
    def talkative(images, prompts, log_metric, log_extra, **columns):
        log_metric("brightness", float(images.detach().mean()))
        log_extra("length", [len(prompt) for prompt in prompts])
        return images.mean(dim=(1, 2, 3))

    t = adjoint_matching(
        tmp_path,
        tiny_pipeline,
        reward=talkative,
        eval_dataset=Dataset.from_dict({"prompt": ["a cat", "a dog, sitting"]}),
        max_steps=1,
    )
    t.train()
    assert "brightness" in update_rows(t)[0]
    assert "eval_brightness" in t.evaluate()
    t.save_model()
    assert "| brightness |" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "samples" / "step-000001.json").read_text())["extra"] == {"length": [5, 14]}
    card = (tmp_path / "README.md").read_text()
    assert "(samples/step-000001.png)" in card
    head = yaml.safe_load(card.split("---")[1])
    assert [shown["text"] for shown in head["widget"]] == ["a cat", "a dog, sitting"]
    assert all((tmp_path / shown["output"]["url"]).exists() for shown in head["widget"])
    write_card(tmp_path, read_facts(tmp_path))
    assert (tmp_path / "README.md").read_text() == card
    t.save_model(str(tmp_path / "elsewhere"))
    assert ".png" not in (tmp_path / "elsewhere" / "README.md").read_text()  # no picture is there
    t.evaluate(Dataset.from_dict({"prompt": ["a fox"]}))
    assert [path.name for path in tmp_path.glob("samples/tuned-*")] == ["tuned-000001-0.png"]


def test_an_evaluation_leaves_the_random_numbers_of_training_alone(tmp_path, tiny_pipeline):
    """So a resumed run, which scores the base model's pictures again, trains as the uninterrupted one."""

    @differentiable
    def restless(images, prompts, **columns):
        noise = torch.rand(1) + float(np.random.rand()) + random.random()
        return images.mean(dim=(1, 2, 3)) + noise

    def next_numbers() -> list[float]:
        return [float(torch.rand(1)), float(np.random.rand()), random.random()]

    t = adjoint_matching(tmp_path, tiny_pipeline, reward=restless, eval_dataset=["a cat"])
    found = []
    for evaluates in (False, True):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        if evaluates:
            t.evaluate()
        found.append(next_numbers())
    assert found[0] == found[1]


def test_a_process_beyond_the_held_out_rows_measures_no_velocity(tmp_path, tiny_pipeline, monkeypatch):
    """The twelfth of twelve, of two rows; what it exchanges with the others is stood in for."""
    t = adjoint_matching(tmp_path, tiny_pipeline)
    others = [(1.0, 4.0, [[0.5, 1.1, 1.0]])]
    monkeypatch.setattr("flowrl_trainers.sampling.comparison.gather_object", lambda mine: [*mine, *others])
    twelfth = SimpleNamespace(process_index=11, num_processes=12)
    monkeypatch.setattr(t.comparison.evaluator, "accelerator", twelfth)
    found = t.comparison.velocity_change(Dataset.from_dict({"prompt": ["a cat", "a dog"]}), t.sigmas)
    assert found["velocity_distance"] == 0.5


def test_the_diversity_of_an_evaluation_is_that_of_its_pictures(tmp_path, tiny_pipeline):
    """Whatever the order of the rows and the size of the batches."""
    seen: list[tuple[str, torch.Tensor]] = []

    @differentiable
    def looks(images, prompts, **columns):
        seen.extend(zip(prompts, images, strict=True))
        return images.mean(dim=(1, 2, 3))

    rows = Dataset.from_dict({"prompt": ["a fox", "a cat", "a dog", "a cat", "a dog", "a cat"]})
    t = adjoint_matching(
        tmp_path, tiny_pipeline, reward=looks, eval_dataset=rows, per_device_eval_batch_size=2, log_images=0
    )
    found = t.evaluate()["eval_diversity"]
    prompts, images = zip(*seen[:6], strict=True)  # of the tuned model
    assert sorted(prompts) == sorted(rows["prompt"])
    cats, dogs = (
        [image for prompt, image in zip(prompts, images, strict=True) if prompt == name] for name in ("a cat", "a dog")
    )
    distances = [[float((a - b).square().mean() ** 0.5) for a, b in combinations(group, 2)] for group in (cats, dogs)]
    assert found == pytest.approx(sum(sum(d) / len(d) for d in distances) / 2, rel=1e-5)


def test_the_card_says_where_the_adapter_is_and_what_was_told_of_it(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline)
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


def test_the_base_model_is_drawn_once_for_each_set_of_prompts(tmp_path, tiny_pipeline, monkeypatch):
    t = adjoint_matching(tmp_path, tiny_pipeline, eval_dataset=Dataset.from_dict({"prompt": ["a cat"]}), log_images=0)
    drawn, row = [], t.comparison.row
    monkeypatch.setattr(
        t.comparison, "row", lambda data, sampler, label: drawn.append(label) or row(data, sampler, label)
    )
    for _ in range(2):
        t.evaluate()
    t.evaluate(Dataset.from_dict({"prompt": ["a dog"]}))
    assert drawn == ["tuned", "base", "tuned", "tuned", "base"]


@pytest.mark.parametrize(("judge", "name"), [
    ({"exact": CheckerReward()}, "exact"), ({"checker": lambda images, prompts, **columns: [0.5] * len(images)}, None),
])  # fmt: skip
def test_frames_are_by_the_checker_whatever_it_is_called(tmp_path, tiny_pipeline, judge, name):
    t = adjoint_matching(tmp_path, tiny_pipeline, eval_reward_funcs=judge)
    base, _ = t.pictures(["a red circle", "a blue square"], 2)
    assert base.checker == name
    assert base.right == (None if name is None else [score == 1 for score in base.scores[name]])
