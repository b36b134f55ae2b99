"""Rewards are weighted and summed, pictures are decoded in parts, and judges make room for training."""

import asyncio

import pytest
import torch
from datasets import Dataset

from flowrl_trainers.rewards import Reward, differentiable
from flowrl_trainers.sampling.prompt_groups import ImageKey

from .helpers import adjoint_matching, first_rollout, make_trainer, redness, update_rows
from .tiny import tiny_sd3


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
        t = adjoint_matching(tmp_path, tiny_sd3(), reward=rewards, reward_weights=weights, max_steps=1)
        t.train()
        rows.append(update_rows(t)[0])
    assert rows[0]["reward"] == pytest.approx(rows[0]["reward/redness"] - 2 * rows[0]["reward/brightness"], rel=1e-5)
    for name in ("reward", "reward_gradient_norm", "loss"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4)


def test_decoding_in_parts_changes_nothing(tmp_path):
    """Each image gets its own gradient, whatever part it is decoded in."""
    found = []
    for size in (None, 1):
        t = adjoint_matching(tmp_path, tiny_sd3(), decode_batch_size=size, per_device_train_batch_size=4, max_steps=1)
        _, (batch,) = first_rollout(t)
        found.append(batch.record.adjoints)
    together, parts = found
    torch.testing.assert_close(together, parts, rtol=1e-4, atol=1e-4 * float(together.abs().max()))
    assert float((together[0] - together[1]).abs().max()) > 0.01 * float(together.abs().max())


@pytest.mark.parametrize("name", ["AdjointMatchingTrainer", "ACFlowTrainer"])
def test_a_megapixel_is_decoded_at_a_time(tmp_path, monkeypatch, name):
    """A reward that is differentiated is called on as many; any other sees the whole batch."""
    monkeypatch.setattr("flowrl_trainers.sampling.scoring.MEGAPIXEL", 3 * 32 * 32)
    seen, decodings = [], []

    @differentiable
    def looks(images, prompts, **columns):
        seen.append(len(images))
        return images.mean(dim=(1, 2, 3))

    t = make_trainer(name, tmp_path, reward=looks, max_steps=1)
    decode = t.flow.decode
    monkeypatch.setattr(t.flow, "decode", lambda latents: decodings.append(len(latents)) or decode(latents))
    first_rollout(t)
    assert decodings == [3, 1]
    decodings.clear()
    monkeypatch.setattr("flowrl_trainers.sampling.scoring.MEGAPIXEL", 32 * 32)
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
    t = adjoint_matching(
        tmp_path,
        tiny_pipeline,
        reward=Judge("trained"),
        eval_dataset=rows,
        eval_reward_funcs=Judge("judge"),
        max_steps=1,
    )
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


def test_asynchronous_rewards_look_at_pictures_while_the_next_are_decoded(tmp_path, monkeypatch):
    """Each call ends only when the batch after its own has been decoded; of four batches the last has none
    after it.
    """
    decoded, asked = [], []

    async def patient(images, prompts, **columns):
        asked.append(prompts)
        for _ in range(500):
            if len(decoded) >= min(len(asked) + 1, 4):
                return images.mean(dim=(1, 2, 3))
            await asyncio.sleep(0.01)
        raise AssertionError("the next pictures were not decoded")

    t = make_trainer("ACFlowTrainer", tmp_path, reward=patient, num_generations=2, decode_batch_size=1)
    examples = [t.train_dataset[ImageKey(row, row, 0)] for row in range(4)]
    latents = t.initial_latents([e.key for e in examples], "test")
    expected = t.flow.images(latents).mean(dim=(1, 2, 3))
    images = t.flow.images
    monkeypatch.setattr(t.flow, "images", lambda part: (decoded.append(len(part)), images(part))[1])
    torch.testing.assert_close(t.scorer.score(latents, examples)[:, 0], expected)
    assert (decoded, len(asked)) == ([1] * 4, 4)
