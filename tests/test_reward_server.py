"""The server of rewards: wrong requests get a sentence and do no harm, wrong arguments of its command are refused."""

import base64
import json
import struct
import threading
import zlib

import httpx2
import pytest
import uvicorn

from flowrl_trainers.cli import serve_reward as command
from flowrl_trainers.rewards import FunctionReward, remote

from .reward_servers import asked, noise, png, serving


def broken() -> bytes:
    """A PNG that breaks off in its pixels."""
    return base64.b64decode(remote.png_base64(noise(1)[0]))[:400]


def bomb() -> bytes:
    """A PNG of 900 million pixels in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("body", "status", "sentence"), [
    (b'{"images": ', 400, "The body is no JSON: Expecting value"),
    (b"\xff\xfe", 400, "The body is no JSON"),
    (b"[" * 30000, 422, "The request has lists or objects nested deeper than 32: flatten the columns"),
    (b"[1, 2]", 422, "The body must be an object with 'images', 'prompts'"),
    (asked(png(), pictures=[]), 422, "and nothing else"),
    (asked(png(), prompts="a circle"), 422, "'prompts' must be a list of strings"),
    (asked(png()) | {"images": [3]}, 422, "'images' must be a list of strings"),
    (asked(), 422, "'images' is empty"),
    (asked(*[png()] * 5), 413, "The request has 5 pictures, more than `max_batch` (4) allows: make `batch_size` smaller"),
    (asked(png(), prompts=["a", "b"]), 422, "The request has 1 pictures but 2 prompts"),
    (asked("no base64!"), 422, "Picture 0 is no base64 of a PNG"),
    (asked(png(), b"no picture"), 422, "Picture 1 is no base64 of a PNG"),
    (asked(broken()), 422, "Picture 0 is a broken PNG"),
    (asked(png((100, 50))), 413, "Picture 0 has 100 x 50 pixels, more than `max_pixels` (4096) allows"),
    (asked(bomb()), 413, "Picture 0 is far larger than `max_pixels` (4096) allows"),
    (asked(png(mode="RGBA")), 422, "Picture 0 has the mode 'RGBA': send RGB"),
    (asked(png(), png((4, 8))), 422, "The pictures differ in size"),
    (asked(png(), columns=[1]), 422, "'columns' must be an object"),
    (asked(png(), columns={"answer": [1, 2]}), 422, "The column 'answer' must be a list of 1 values"),
    (asked(png(), columns={"log_metric": [1]}), 422, "No column may be called 'log_metric'"),
    (b" " * 40001, 413, "The request has 40001 bytes, more than `max_bytes` (40000) allows"),
    (b" " * 30_000_000, 413, "The request has 30000000 bytes"),
    (asked(png(), prompts=["raise"]), 500, "Reward 'by_prompt' raised ArithmeticError: the judge is tired"),
    (asked(png(), prompts=["short"]), 500, "Reward 'by_prompt' returned scores of shape (0,) for 1 images"),
    (asked(png(), prompts=["text"]), 500, "Reward 'by_prompt' returned a str ('1') for 1 images: return one score per image"),
    (asked(png(), prompts=["mapping"]), 500, "Reward 'by_prompt' returned a dict ({0: 1.0}) for 1 images"),
    (asked(png(), prompts=["rows"]), 500, "Reward 'by_prompt' returned scores of shape (1, 1) for 1 images"),
    (asked(png(), prompts=["half a pair"]), 500, r"Reward 'by_prompt' raised ArithmeticError: \ud800"),
    (asked(png(), prompts=["exit"]), 500, "Reward 'by_prompt' raised SystemExit: 3"),
    (asked(png(), prompts=["column"]), 500, "Reward 'by_prompt' raised KeyError: 'answer'"),
])  # fmt: skip
def test_a_wrong_request_gets_a_sentence_and_the_server_lives_on(reward_server, body, status, sentence):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx2.post(f"{reward_server}/score", content=content, timeout=60)
    assert (response.status_code, list(response.json())) == (status, ["error"])
    assert sentence in response.json()["error"]
    assert httpx2.post(f"{reward_server}/score", json=asked(png())).json() == {"scores": [0.0]}


def test_other_addresses_and_methods_are_refused_in_json(reward_server):
    assert httpx2.get(f"{reward_server}/score").json() == {"error": "Method Not Allowed"}
    assert httpx2.get(f"{reward_server}/").json() == {"error": "Not Found"}


def test_a_request_whose_sender_gave_up_is_not_computed():
    """The first holds the reward; the second times out while it waits, the third comes after."""
    begun, go, calls = threading.Event(), threading.Event(), []

    def held(images, prompts, **columns):
        calls.append(prompts[0])
        begun.set()
        go.wait(30)
        return [0.0] * len(images)

    with serving(FunctionReward(held)) as address:
        first = threading.Thread(
            target=httpx2.post, args=[f"{address}/score"], kwargs={"json": asked(png(), prompts=["1"]), "timeout": 60}
        )
        first.start()
        assert begun.wait(30)
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{address}/score", json=asked(png(), prompts=["2"]), timeout=0.5)
        assert httpx2.get(f"{address}/health", timeout=30).status_code == 200  # answers while the reward computes
        go.set()
        httpx2.post(f"{address}/score", json=asked(png(), prompts=["3"]), timeout=60)
        first.join()
    assert calls == ["1", "3"]


def test_health_says_name_and_readiness(reward_server):
    assert httpx2.get(f"{reward_server}/health").json() == {"name": "by_prompt", "ready": True}


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["beauty"], "`NAME` names 'beauty', which is no known reward"),
    (["no_such_module.reward"], "The reward 'no_such_module.reward' cannot be imported"),
    (["checker", "--port", "70000"], r"`port` \(70000\) must be between 0 and 65535"),
    (["checker", "--max_batch", "0"], r"`max_batch` \(0\) must be at least 1"),
    (["checker", "--max_seconds", "0"], r"`max_seconds` \(0\) must be above 0"),
    (["checker", "--max_seconds", "30"], r"`max_upload_seconds` \(60\) must not exceed `max_seconds` \(30\)"),
    (["checker", "--token_file", "no such file"], r"`token_file` \('no such file'\) cannot be read as text"),
])  # fmt: skip
def test_wrong_arguments_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        command.serve_reward(arguments)


@pytest.mark.parametrize(
    ("host", "warned"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("gpu-7", True)],
)
def test_an_address_that_others_reach_is_warned_of(monkeypatch, capsys, host, warned):
    told = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **settings: told.update(settings))
    command.serve_reward(["checker", "--host", host, "--port", "0"])
    assert told["host"] == host
    assert ("there is no authentication" in capsys.readouterr().err) == warned
