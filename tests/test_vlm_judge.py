"""The example of a reward that asks a vision-language model: what it sends, and which answers are numbers."""

import importlib.util
import json
import math

import pytest
import torch

from flowrl_trainers.rewards import as_rewards

from .reward_servers import ROOT, decoded, fake, noise, scores_of


@pytest.fixture
def judge(monkeypatch):
    spec = importlib.util.spec_from_file_location("vlm_judge", ROOT / "examples" / "vlm_judge.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("VLM_MODEL", "some-vlm")
    monkeypatch.delenv("VLM_API_KEY", raising=False)
    return module


def said(words: str) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": words}}]})


def test_the_judge_sends_picture_and_prompt_and_reads_a_number(judge, monkeypatch):
    """One question at a time, so that the fake server's answers keep their order."""
    monkeypatch.setattr(judge, "AT_ONCE", 1)
    monkeypatch.setenv("VLM_API_KEY", "sesame")
    images = noise(3)
    with fake(said("7"), said("I cannot tell."), said("10/10")) as server:
        monkeypatch.setenv("VLM_URL", f"{server.address}/v1")
        (reward,) = as_rewards(judge.vlm_judge)
        got = scores_of(reward, images, ["a red circle", "a square", "a cross"])
    torch.testing.assert_close(got, torch.tensor([0.7, math.nan, 1.0]), equal_nan=True)
    assert reward.name == "vlm_judge"
    assert [h["Authorization"] for h in server.headers] == ["Bearer sesame"] * 3
    assert server.bodies[0]["model"] == "some-vlm"
    picture, question = server.bodies[0]["messages"][0]["content"]
    assert torch.equal(decoded(picture["image_url"]["url"].removeprefix("data:image/png;base64,")), images[0])
    assert "'a red circle'" in question["text"]


@pytest.mark.usefixtures("quick_retries")
def test_the_judge_asks_again_when_its_server_is_away(judge, monkeypatch):
    with fake(503, 500, said("5")) as server:
        monkeypatch.setenv("VLM_URL", f"{server.address}/v1")
        assert scores_of(as_rewards(judge.vlm_judge)[0], noise(1)).tolist() == [0.5]


@pytest.mark.parametrize(("answer", "score"), [
    ("7", 0.7), ("7.5", 0.75), ("Score: 9.", 0.9), ("8 / 10", 0.8), ("0", 0.0),
    ("no idea", None), ("11", None), ("-3", None), ("between 3 and 4", None), (None, None),
])  # fmt: skip
def test_what_is_a_number_and_what_is_none(judge, answer, score):
    assert judge.number(answer) == score
