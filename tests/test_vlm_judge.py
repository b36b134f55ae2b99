"""A vision-language model as a reward: what it sends, which answers count, and a server that answers wrongly."""

import asyncio
import json
import logging
import math

import httpx2
import pytest
import torch

from flowrl_trainers.cli.run import load_prompts
from flowrl_trainers.rewards import GenEvalJudge, NumberQuestion, VLMJudge, YesNoQuestion, as_rewards
from flowrl_trainers.rewards.vlm_judge import Cost, expected_score
from flowrl_trainers.rewards.vlm_questions import QUESTIONS, geneval_questions

from .helpers import make_trainer
from .reward_servers import decoded, fake, noise, scores_of
from .text_pictures import DATA


def said(words: str | None, **choice) -> str:
    usage = {"prompt_tokens": 100, "completion_tokens": 2}
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": words}} | choice], "usage": usage})


def likely(**probabilities: float) -> str:
    """An answer whose first token has these probabilities; `n7` is the token "7"."""
    tokens = [
        {"token": name.removeprefix("n").replace("_", " "), "logprob": math.log(p)}
        for name, p in probabilities.items()
    ]
    return said("?", logprobs={"content": [{"token": "?", "logprob": 0, "top_logprobs": tokens}]})


def judge(server, **settings) -> VLMJudge:
    """One question at a time, so that the server's answers keep their order."""
    return VLMJudge(f"{server.address}/v1", "some-vlm", **({"concurrency": 1} | settings))


def test_the_name_takes_its_server_from_the_environment_and_sends_picture_and_prompt(monkeypatch):
    images = noise(3)
    with fake(said("7"), said("I cannot tell."), said("9/9")) as server:
        monkeypatch.setenv("VLM_URL", f"{server.address}/v1/")
        monkeypatch.setenv("VLM_MODEL", "some-vlm")
        monkeypatch.setenv("VLM_API_KEY", "sesame")
        (reward,) = as_rewards("vlm_judge")
        reward.concurrency = 1
        got = scores_of(reward, images, ["a red circle", "a square", "a cross"])
    torch.testing.assert_close(got, torch.tensor([7 / 9, math.nan, 1.0]), equal_nan=True)
    assert [h["Authorization"] for h in server.headers] == ["Bearer sesame"] * 3
    assert server.bodies[0]["model"] == "some-vlm"
    assert "logprobs" not in server.bodies[0]
    picture, question = server.bodies[0]["messages"][0]["content"]
    assert torch.equal(decoded(picture["image_url"]["url"].removeprefix("data:image/png;base64,")), images[0])
    assert "'a red circle'" in question["text"]


@pytest.mark.parametrize(("answer", "score"), [
    ("7", 7), ("7.5", 7.5), ("Score: 9.", 9), ("8 / 9", 8), ("0", 0), ("**4**", 4),
    # what is none
    ("no idea", None), ("10", None), ("-3", None), ("between 3 and 4", None), ("3 / 4", None), ("NaN", None), ("", None),
])  # fmt: skip
def test_what_is_a_number_and_what_is_none(answer, score):
    assert QUESTIONS["alignment"].score(answer) == (None if score is None else pytest.approx(score / 9))


def test_other_questions_read_other_answers():
    """UnifiedReward argues first and ends in a number from 1 to 5."""
    unified = QUESTIONS["unified_reward"]
    assert unified.score("1. The 2 cats are there.\nFinal Score: 3.5") == pytest.approx(2.5 / 4)
    assert unified.score("3.5") is None
    yes_no = YesNoQuestion("{prompt}?")
    assert [yes_no.score(a) for a in ("Yes.", "no", "yes, or no", "maybe", "Noway")] == [1, 0, None, None, None]
    assert NumberQuestion("?", lowest=1, highest=5).answers() == {"1": 0, "2": 0.25, "3": 0.5, "4": 0.75, "5": 1}


def test_the_expected_value_is_the_weighted_mean_of_the_answers():
    """0.6 x 8 + 0.2 x 5 of a mass of 0.8; " 8" and "8" are the same answer, and other tokens do not count."""
    with fake(likely(n8=0.4, _8=0.2, n5=0.2, The=0.2), likely(The=1.0)) as server:
        scores = scores_of(judge(server, answer="expected"), noise(2))
    torch.testing.assert_close(scores, torch.tensor([(0.6 * 8 + 0.2 * 5) / 0.8 / 9, math.nan]), equal_nan=True)
    assert server.bodies[0]["logprobs"] is True
    assert server.bodies[0]["top_logprobs"] == 20
    entries = [{"token": "Yes", "logprob": math.log(0.3)}, {"token": "no", "logprob": math.log(0.1)}, "nonsense"]
    assert expected_score(YesNoQuestion("?"), entries) == pytest.approx(0.75)


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize(("answers", "settings", "sentence"), [
    # answers that are none: a line in the log, and no score
    ([said("The picture is lovely.")], {}, "'The picture is lovely.' is not one number from 0 to 9."),
    ([said("NaN")], {}, "'NaN' is not one number from 0 to 9."),
    ([said("between 3 and 4")], {}, "'between 3 and 4' is not one number from 0 to 9."),
    ([said("11")], {}, "'11' is not one number from 0 to 9."),
    ([said(None)], {}, "'' is not one number from 0 to 9."),
    ([likely(The=0.9, n1=0.04, n9=0.05)], {"answer": "expected"},
     "'?' is not a likely token of one number from 0 to 9."),
    # servers that are wrong: an error
    (["<html>hello</html>"], {}, "did not answer with the words of a chat but '<html>hello</html>': does `url` name"),
    ([json.dumps({"choices": []})], {}, "did not answer with the words of a chat but '{\"choices\": []}'"),
    ([said("7", logprobs={"content": [{"token": "7", "logprob": 0, "top_logprobs": None}]})],
     {"answer": "expected"}, "did not answer with the `top_logprobs` of a chat but"),
    ([said("7")], {"answer": "expected"}, "did not answer with the `top_logprobs` of a chat but"),
    ([404], {}, "refuses the request with 404: out of order"),
    ([500] * 3, {"retries": 2}, r"failed 3 times, more than `retries` (2) allows, at last with 500: out of order"),
    (["slow"], {"retries": 0, "timeout": 0.2}, "failed 1 times, more than `retries` (0) allows, at last with a time-out"),
    ([503] * 9, {"patience": 0.0}, "was away for longer than `patience` (0 s), at last with 503"),
])  # fmt: skip
def test_a_server_that_answers_wrongly_gets_one_sentence(caplog, answers, settings, sentence):
    with fake(*answers) as server, caplog.at_level(logging.WARNING):
        reward = judge(server, **settings)
        if "is not" in sentence:
            assert scores_of(reward, noise(1)).isnan().all()
            assert caplog.messages == [
                f"Reward 'vlm_judge': 1 answers cannot be used, and their pictures get no score: {sentence}"
            ]
        else:
            with pytest.raises((ValueError, RuntimeError)) as raised:
                scores_of(reward, noise(1))
            assert sentence in str(raised.value)
            assert str(raised.value).startswith("Reward 'vlm_judge': http://127.0.0.1:")


def test_a_host_that_is_away_is_told_from_a_slow_one(monkeypatch):
    """By a shorter limit to connect, so that it is waited for as long as `patience` says."""
    seen = []

    class Client(httpx2.AsyncClient):
        def __init__(self, **settings):
            super().__init__(**settings)
            seen.append((self.timeout.connect, self.timeout.read))

    monkeypatch.setattr(httpx2, "AsyncClient", Client)
    with fake(said("7")) as server:
        scores_of(judge(server, timeout=30), noise(1))
    assert seen == [(5.0, 30.0)]


@pytest.mark.usefixtures("quick_retries")
def test_a_run_whose_server_dies_and_comes_back_loses_no_step(tmp_path, caplog):
    """The second of two updates meets a connection that breaks off, a proxy without a server, and an error."""
    answers = [said(str(i % 10)) for i in range(40)]
    plan = [*answers[:5], "drop", 503, 502, 500, *answers[5:]]
    rows = []
    for given in (answers, plan):
        with fake(*given) as server:
            trainer = make_trainer("TAFSGRPOTrainer", tmp_path / str(len(given)), reward=judge(server, name="vlm"))
            trainer.train()
        assert trainer.state.global_step == 2
        rows.append([row["reward/vlm"] for row in trainer.state.log_history if "reward/vlm" in row])
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2
    assert sum("asking again in" in message for message in caplog.messages) == 4


def test_the_same_picture_is_asked_about_once_and_costs_are_counted():
    noted: dict = {}
    images = noise(2)[[0, 1, 0]]
    with fake(said("7"), said("2"), said("3"), said("4")) as server:
        reward = judge(server, memory=2)
        scores = asyncio.run(reward(images, ["a", "a", "a"], log_metric=noted.__setitem__))
        assert scores == [7 / 9, 2 / 9, 7 / 9]
        assert noted == {"vlm_judge_tokens": 68}
        assert reward.cost == Cost(2, 1, 200, 4)
        assert asyncio.run(reward(images[:1], ["b"])) == [3 / 9]  # another prompt is another question
        assert asyncio.run(reward(images[1:2], ["a"])) == [4 / 9]  # which the memory of two has forgotten
        assert len(server.bodies) == 4
    assert scores_of(reward, torch.full((1, 3, 8, 8), math.nan)).isinf().all()  # a fault that is not sent


def test_columns_stand_in_the_question():
    with fake(said("9")) as server:
        reward = judge(server, question="Does it read {text!r}, as {prompt} asks? 0 to 9.")
        assert reward.needed_columns() == ["text"]
        assert scores_of(reward, noise(1), ["a sign"], text=["Open"]).tolist() == [1]
        (content,) = [part["text"] for part in server.bodies[0]["messages"][0]["content"] if part["type"] == "text"]
    assert content == "Does it read 'Open', as a sign asks? 0 to 9."


def test_geneval_asks_for_number_colour_and_place():
    """Rows of GenEval, read as a run reads them."""
    rows = load_prompts(str(DATA / "geneval_prompts.jsonl"), None, "train", "prompt")
    asked = {row["prompt"]: [question.text for question in geneval_questions(row["include"])] for row in rows}
    ending = " Answer with yes or no, and nothing else."
    assert asked["a photo of two wine glasses"] == [
        f"Does this picture show exactly 2 objects of the kind 'wine glass'?{ending}"
    ]
    assert asked["a photo of a pink handbag and a black scissors"] == [
        f"Does this picture show a handbag?{ending}", f"Is the handbag in this picture pink?{ending}",
        f"Does this picture show a scissors?{ending}", f"Is the scissors in this picture black?{ending}",
    ]  # fmt: skip
    assert asked["a photo of a cow right of a laptop"] == [
        f"Does this picture show a laptop?{ending}", f"Does this picture show a cow?{ending}",
        f"Is the cow right of the laptop in this picture?{ending}",
    ]  # fmt: skip
    cow = next(row for row in rows if "cow" in row["prompt"])
    with fake(said("Yes"), said("yes."), said("No")) as server:
        reward = GenEvalJudge(server.address, "some-vlm", concurrency=1)
        assert scores_of(reward, noise(1), [cow["prompt"]], include=[cow["include"]]).tolist() == pytest.approx(
            [2 / 3]
        )
        assert reward.needed_columns() == ["include"]
    with pytest.raises(ValueError, match=r"holds the position \['left of', 3\] for 1 objects: number them from 0"):
        geneval_questions([{"class": "cow", "position": ["left of", 3]}])
    with pytest.raises(ValueError, match="which has no 'class': name the object"):
        geneval_questions([{"count": 2}])


def test_an_empty_variable_is_no_key(monkeypatch):
    monkeypatch.setenv("VLM_API_KEY", "")
    with fake(said("7")) as server:
        assert scores_of(VLMJudge(server.address, "some-vlm"), noise(1)).tolist() == pytest.approx([7 / 9])
    assert all("authorization" not in headers for headers in server.headers)


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"url": None}, r"^`url` of the judge is missing: pass it, or set the environment variable VLM_URL\."),
    ({"model": None}, r"^`model` of the judge is missing: pass it, or set the environment variable VLM_MODEL\."),
    ({"url": "nowhere"}, r"^`url` \('nowhere'\) is no address of a server"),
    ({"url": "http://me:secret@host/v1"}, "^`url` has a user name or a password"),
    ({"question": "beauty"}, r"^`question` \('beauty'\) is none of alignment, aesthetics, unified_reward and does not"),
    ({"question": "{{prompt}}"}, "is none of alignment, aesthetics, unified_reward and does not mention '{prompt}'"),
    ({"question": "How good is {}?"}, r"^`question` \('How good is \{\}\?'\) has braces without a name: write '\{prompt\}'"),
    ({"question": NumberQuestion("How good is {0}?")}, "has braces without a name"),
    ({"question": "How good is {prompt?"}, r"^`question` \('How good is \{prompt\?'\) cannot be filled in: expected '}'"),
    ({"answer": "mean"}, r"^`answer` \('mean'\) must be 'number' or 'expected'\."),
    ({"answer": "expected", "question": "unified_reward"}, "^`answer` is 'expected', but the question's answer may take"),
    ({"answer": "expected", "question": NumberQuestion("{prompt}", highest=10)}, "ask for one number from 0 to 9 alone"),
    ({"concurrency": 0}, r"^`concurrency` \(0\) must be at least 1\."),
    ({"timeout": 0}, r"^`timeout` \(0\) must be above 0\."),
    ({"token": "two words"}, r"^`token` \(or VLM_API_KEY\) has a space"),
])  # fmt: skip
def test_wrong_settings_are_refused_in_one_sentence(monkeypatch, settings, sentence):
    for variable in ("VLM_URL", "VLM_MODEL", "VLM_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match=sentence) as raised:
        VLMJudge(**({"url": "http://127.0.0.1:8001/v1", "model": "some-vlm"} | settings))
    assert "two words" not in str(raised.value)
    assert "secret" not in str(raised.value)
