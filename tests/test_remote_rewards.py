"""Rewards in another process: the scores are those of this one, requests hold what they should, wrong settings are
refused.
"""

import math
import re
import threading

import pytest
import torch
from datasets import Dataset

from flowrl_trainers.rewards import FunctionReward, RemoteReward, ShapesReward, remote
from flowrl_trainers.sampling.scoring import call_rewards
from flowrl_trainers.trainers.input_checks import check_columns

from .helpers import redness
from .reward_servers import ROOT, decoded, examples, fake, noise, scores_of, serving


def test_scores_equal_those_in_process_on_8_bit_pictures(reward_server):
    """To the last bit, over three requests of at most three pictures."""
    images = noise(7)
    assert torch.equal(scores_of(RemoteReward(reward_server, batch_size=3), images), redness(images, []))


def test_scores_of_a_network_equal_those_in_process():
    reward, images, prompts = ShapesReward(), noise(3, 32), ["a red circle", "a blue square", "a green cross"]
    with serving(reward) as address, torch.no_grad():
        assert torch.equal(scores_of(RemoteReward(address), images, prompts), reward(images, prompts))


def test_other_pictures_are_off_by_half_a_level_of_255_at_most(reward_server):
    """Redness moves by at most twice the largest change of a channel, and does move."""
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sent = torch.stack([decoded(remote.png_base64(x)) for x in images])
    assert (sent - images).abs().max() <= 0.5 / 255 + 1e-6
    distance = (scores_of(RemoteReward(reward_server, batch_size=4), images) - redness(images, [])).abs().max()
    assert 0 < distance <= 2 * 0.5 / 255


def test_none_what_is_not_finite_columns_and_coroutines_cross_the_wire(reward_server):
    reward = RemoteReward(reward_server, name="judge", columns=["answer"], batch_size=4)
    nan, inf = math.nan, math.inf
    for prompts, answers, expected in (
        (["none", "some", "none"], [0, 0, 0], [nan, 1.0, nan]),
        (["not finite", "."], [0, 0], [inf, inf]),  # call_rewards tells None, which is NaN, from what is not finite
        (["column", "."], [7, 8.5], [7.0, 8.5]),
        (["later", "."], [0, 0], [4.0, 4.0]),
    ):
        got = scores_of(reward, noise(len(prompts)), prompts, answer=answers)
        torch.testing.assert_close(got, torch.tensor(expected), equal_nan=True)


def test_a_picture_that_is_not_finite_is_a_bad_sample_and_is_not_sent():
    images = noise(3)
    images[1, 0, 0, 0] = math.nan
    with fake() as server:
        got = scores_of(RemoteReward(server.address), images, ["a", "b", "c"])
        assert got.isfinite().tolist() == [True, False, True]
        assert [body["prompts"] for body in server.bodies] == [["a", "c"]]


def test_requests_have_batch_size_pictures_with_their_prompts_and_columns():
    images, answers = noise(5), [[1], [2], [3], [4], [5]]
    with fake() as server:
        scores_of(
            RemoteReward(f"{server.address}/", columns=["answer"], batch_size=2),
            images,
            list("abcde"),
            answer=answers,
            secret=[0] * 5,
        )
    assert [body["prompts"] for body in server.bodies] == [["a", "b"], ["c", "d"], ["e"]]
    assert [body["columns"] for body in server.bodies] == [
        {"answer": [[1], [2]]},
        {"answer": [[3], [4]]},
        {"answer": [[5]]},
    ]
    assert torch.equal(torch.stack([decoded(p) for body in server.bodies for p in body["images"]]), images)


def test_several_servers_share_the_requests():
    """Each has one request at a time: with two at work on the first two, the third goes to whoever is done."""
    images, both = noise(5), threading.Barrier(2)

    def judge(images, prompts, **columns):
        if prompts[0] in "ab":
            both.wait(20)
        return redness(images, prompts)

    with serving(FunctionReward(judge)) as one, serving(FunctionReward(judge)) as two:
        reward = RemoteReward([one, two], batch_size=1, retries=0)
        assert torch.equal(scores_of(reward, images, list("abcde")), redness(images, []))


def test_remote_rewards_are_waited_for_together():
    """Neither server answers before the other has been asked too."""
    both = threading.Barrier(2)

    def wait(images, prompts, **columns):
        both.wait(20)
        return [1.0]

    with serving(FunctionReward(wait)) as one, serving(FunctionReward(wait)) as two:
        rewards = [RemoteReward(address, name=address, retries=0) for address in (one, two)]
        assert call_rewards(rewards, noise(1), examples(["a"])).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"url": "127.0.0.1:8000"}, r"`url` \('127.0.0.1:8000'\) is no address of a server"),
    ({"url": "http://127.0.0.1:99999"}, r"`url` \('http://127.0.0.1:99999'\) is no address of a server"),
    ({"url": "http://[::1"}, r"`url` \('http://\[::1'\) is no address of a server"),
    ({"url": ["http://127.0.0.1:1", "there"]}, r"`url` \('there'\) is no address of a server"),
    ({"url": []}, r"`url` \(\[\]\) must hold at least one address, and none of them twice"),
    ({"url": ["http://127.0.0.1:1"] * 2}, "must hold at least one address, and none of them twice"),
    ({"url": "http://"}, r"`url` \('http://'\) is no address of a server"),
    ({"url": "http://me:secret@127.0.0.1"}, "^`url` has a user name or a password, which errors would show"),
    ({"url": "http://me:p#ss@127.0.0.1:8000"}, "^`url` has a user name or a password, which errors would show"),
    ({"timeout": math.nan}, r"`timeout` \(nan\) must be above 0"),
    ({"batch_size": 0}, r"`batch_size` \(0\) must be at least 1"),
    ({"retries": -1}, r"`retries` \(-1\) must be at least 0"),
    ({"patience": -1}, r"`patience` \(-1\) must be at least 0"),
    ({"timeout": 0}, r"`timeout` \(0\) must be above 0"),
    ({"columns": "answer"}, r"`columns` \('answer'\) is a string: pass the list \['answer'\]"),
])  # fmt: skip
def test_wrong_settings_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        RemoteReward(**({"url": "http://127.0.0.1:1"} | settings))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16])
def test_scores_of_every_kind_of_tensor_arrive(dtype):
    def bright(images, prompts, **columns):
        return (images.mean(dim=(1, 2, 3)) > 0.5).to(dtype)

    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    with serving(FunctionReward(bright)) as address:
        assert scores_of(RemoteReward(address), images).tolist() == [0.0, 1.0]


def test_columns_that_are_absent_or_no_json_are_refused():
    reward = RemoteReward("http://127.0.0.1:1", columns=["answer"])
    with pytest.raises(ValueError, match="Reward 'remote' needs the column 'answer', which `train_dataset` lacks"):
        check_columns([reward], Dataset.from_dict({"prompt": ["a"]}), "train_dataset")
    with pytest.raises(ValueError, match="is to send the column 'answer', which the data set does not have"):
        scores_of(reward, noise(1))
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (b"bytes", math.nan, 10**5000, deep):
        with pytest.raises(ValueError, match=r"cannot send the column 'answer' as JSON \(.*leave it out of `columns`"):
            scores_of(reward, noise(1), answer=[value])
    with pytest.raises(ValueError, match=r"sends pictures \(B, 3, H, W\), but `images` has the shape \(4, 2\)"):
        scores_of(RemoteReward("http://127.0.0.1:1"), torch.zeros(4, 2))


def test_the_examples_of_the_docs_are_rewards():
    blocks = re.findall(r"```python\n(from .*?)```", (ROOT / "docs" / "remote_rewards.md").read_text(), flags=re.S)
    scope: dict = {}
    for code in blocks:
        exec(code, scope)
    assert [scope[name].name for name in ("alignment", "looks", "objects")] == ["vlm_judge", "looks", "geneval_judge"]
    assert scope["reader"].columns == ("text",)


def test_any_name_of_a_column_and_any_text_travel(reward_server):
    """`self` does not meet the method's first argument."""
    with fake() as server:
        reward = RemoteReward(server.address, columns=["self"])
        assert scores_of(reward, noise(1), ["\ud800"], self=["me"], function=["f"], url=["u"]).tolist() == [1.0]
        assert server.bodies[0]["columns"] == {"self": ["me"]}
        assert server.bodies[0]["prompts"] == ["\ud800"]
        assert scores_of(RemoteReward(server.address), noise(1), self=["me"]).tolist() == [1.0]
    with pytest.raises(ValueError, match="refuses the request with 422: No column may be called 'self': rename it"):
        scores_of(RemoteReward(reward_server, columns=["self"]), noise(1), self=["me"])
    with pytest.raises(ValueError, match="refuses the request with 422: The request has an integer of 310 digits"):
        scores_of(RemoteReward(reward_server, columns=["answer"]), noise(1), answer=[10**309])


def test_a_function_gets_a_column_called_self():
    def judge(images, prompts, **columns):
        return columns["self"]

    assert scores_of(FunctionReward(judge), noise(2), self=[1.0, 2.0]).tolist() == [1.0, 2.0]
