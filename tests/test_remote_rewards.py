"""Rewards in another process: the scores are those of this one, wrong requests get a sentence, and what fails is waited for or said."""

import base64
import importlib.util
import io
import json
import math
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image as PILImage

from flowrl_trainers.cli import serve_reward as command
from flowrl_trainers.rewards import FunctionReward, RemoteReward, ShapesReward, as_rewards, remote
from flowrl_trainers.rewards.server import Limits, reward_app
from flowrl_trainers.sampling.prompt_groups import Example, ImageKey
from flowrl_trainers.sampling.scoring import call_rewards

from .test_wrong_input import make

ROOT = Path(__file__).parent.parent

# What the server's own process imports. The first prompt says what is wanted.
SERVED = '''
import os, signal
from pathlib import Path

def redness(images, prompts, **columns):
    red, green, blue = images.unbind(dim=1)
    return (red - (green + blue) / 2).mean(dim=(1, 2))

def by_prompt(images, prompts, trainer_state, log_metric, log_extra, **columns):
    async def later():
        return [4.0] * len(images)

    log_metric("calls", 1.0)
    match prompts[0]:
        case "raise":
            raise ArithmeticError("the judge is tired")
        case "short":
            return [1.0] * (len(images) - 1)
        case "none":
            return [None if prompt == "none" else 1.0 for prompt in prompts]
        case "not finite":
            return [float("nan"), float("-inf")]
        case "column":
            return [float(answer) for answer in columns["answer"]]
        case "later":
            return later()
    return redness(images, prompts)

calls = 0

def dies_once(images, prompts, **columns):
    """Redness; the third call of the first process never returns."""
    global calls
    calls += 1
    if calls == 3 and not Path("died").exists():
        Path("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return redness(images, prompts)
'''
# Ends with its standard input, that is with the tests, however those end.
START = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
from flowrl_trainers.cli.serve_reward import serve_reward
serve_reward(sys.argv[1:])
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(folder: Path, name: str, port: int, *flags: str) -> subprocess.Popen:
    (folder / "served.py").write_text(SERVED)
    return subprocess.Popen([sys.executable, "-c", START, name, "--port", str(port), *flags], cwd=folder, stdin=subprocess.PIPE)


def wait_for(process: subprocess.Popen, address: str) -> None:
    for _ in range(240):
        assert process.poll() is None, "the server ended by itself"
        try:
            httpx2.get(f"{address}/health")
            return
        except httpx2.TransportError:
            time.sleep(0.5)
    raise AssertionError("the server did not come up")


def stop(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdin.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of `served.by_prompt` in a process of its own."""
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    process = start(folder, "served.by_prompt", port, "--max_batch", "4", "--max_pixels", "4096", "--max_bytes", "40000", "--device", "cpu")
    try:
        wait_for(process, f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
        assert process.poll() is None, "the server did not live through the tests"
    finally:
        stop(process)


@contextmanager
def serving(reward, limits: Limits = Limits()):  # noqa: B008
    """The address of a reward on a uvicorn of this process."""
    uvicorn_server = uvicorn.Server(uvicorn.Config(reward_app(reward, limits, torch.device("cpu")), port=0, log_level="error"))
    thread = threading.Thread(target=uvicorn_server.run, daemon=True)
    thread.start()
    while not uvicorn_server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{uvicorn_server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        uvicorn_server.should_exit = True
        thread.join()


def pictures(count: int, size: int = 16) -> torch.Tensor:
    """Noise in multiples of 1/255, which survives a PNG."""
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(5)) / 255


def examples(prompts: list[str], **columns) -> list[Example]:
    return [Example(ImageKey(i, 0, 0), p, {name: values[i] for name, values in columns.items()}) for i, p in enumerate(prompts)]


def scores_of(reward, images: torch.Tensor, prompts: list[str] | None = None, **columns) -> torch.Tensor:
    """As a trainer asks for them."""
    asked = examples(prompts or ["a circle"] * len(images), **columns)
    return call_rewards([reward], images, asked, trainer_state=None, log_metric=None, log_extra=None)[:, 0]


def redness(images, prompts, **columns):
    red, green, blue = images.unbind(dim=1)
    return (red - (green + blue) / 2).mean(dim=(1, 2))


# ---- the scores ---------------------------------------------------------------------------------------------------------------


def test_scores_equal_those_in_process_on_8_bit_pictures(server):
    """To the last bit, over three requests of at most three pictures."""
    images = pictures(7)
    assert torch.equal(scores_of(RemoteReward(server, batch_size=3), images), redness(images, []))


def test_scores_of_a_network_equal_those_in_process():
    reward, images, prompts = ShapesReward(), pictures(3, 32), ["a red circle", "a blue square", "a green cross"]
    with serving(reward) as address, torch.no_grad():
        assert torch.equal(scores_of(RemoteReward(address), images, prompts), reward(images, prompts))


def test_other_pictures_are_off_by_half_a_level_of_255_at_most(server):
    """Redness moves by at most twice the largest change of a channel, and does move."""
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sent = torch.stack([decoded(remote.png_base64(x)) for x in images])
    assert (sent - images).abs().max() <= 0.5 / 255 + 1e-6
    distance = (scores_of(RemoteReward(server, batch_size=4), images) - redness(images, [])).abs().max()
    assert 0 < distance <= 2 * 0.5 / 255


def decoded(png: str) -> torch.Tensor:
    return torch.from_numpy(np.array(PILImage.open(io.BytesIO(base64.b64decode(png))))).permute(2, 0, 1) / 255


def test_none_what_is_not_finite_columns_and_coroutines_cross_the_wire(server):
    reward = RemoteReward(server, name="judge", columns=["answer"], batch_size=4)
    nan, inf = math.nan, math.inf
    for prompts, answers, expected in (
        (["none", "some", "none"], [0, 0, 0], [nan, 1.0, nan]),
        (["not finite", "."], [0, 0], [inf, inf]),  # call_rewards tells None, which is NaN, from what is not finite
        (["column", "."], [7, 8.5], [7.0, 8.5]),
        (["later", "."], [0, 0], [4.0, 4.0]),
    ):
        got = scores_of(reward, pictures(len(prompts)), prompts, answer=answers)
        torch.testing.assert_close(got, torch.tensor(expected), equal_nan=True)


def test_a_picture_that_is_not_finite_is_a_bad_sample_and_is_not_sent():
    images = pictures(3)
    images[1, 0, 0, 0] = math.nan
    with fake() as server:
        got = scores_of(RemoteReward(server.address), images, ["a", "b", "c"])
        assert got.isfinite().tolist() == [True, False, True]
        assert [body["prompts"] for body in server.bodies] == [["a", "c"]]


def test_health_says_name_and_readiness(server):
    assert httpx2.get(f"{server}/health").json() == {"name": "by_prompt", "ready": True}


# ---- wrong requests -----------------------------------------------------------------------------------------------------------


def png(size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    PILImage.new(mode, size).save(file, "PNG")
    return file.getvalue()


def broken() -> bytes:
    """A PNG that breaks off in its pixels."""
    return base64.b64decode(remote.png_base64(pictures(1)[0]))[:400]


def bomb() -> bytes:
    """A PNG of 900 million pixels in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def asked(*images: bytes | str, **changes) -> dict:
    encoded = [i if isinstance(i, str) else base64.b64encode(i).decode() for i in images]
    return {"images": encoded, "prompts": ["a circle"] * len(images)} | changes


@pytest.mark.parametrize(("body", "status", "sentence"), [
    (b'{"images": ', 400, "The body is no JSON: Expecting value"),
    (b"\xff\xfe", 400, "The body is no JSON"),
    (b"[" * 30000, 400, "The body is no JSON: maximum recursion depth exceeded"),
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
    (asked(png(), prompts=["short"]), 500, "Reward 'by_prompt' returned 0 scores for 1 pictures"),
    (asked(png(), prompts=["column"]), 500, "Reward 'by_prompt' raised KeyError: 'answer'"),
])  # fmt: skip
def test_a_wrong_request_gets_a_sentence_and_the_server_lives_on(server, body, status, sentence):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx2.post(f"{server}/score", content=content, timeout=60)
    assert (response.status_code, list(response.json())) == (status, ["error"])
    assert sentence in response.json()["error"]
    assert httpx2.post(f"{server}/score", json=asked(png())).json() == {"scores": [0.0]}


def test_other_addresses_and_methods_are_refused_in_json(server):
    assert httpx2.get(f"{server}/score").json() == {"error": "Method Not Allowed"}
    assert httpx2.get(f"{server}/").json() == {"error": "Not Found"}


def test_a_request_whose_sender_gave_up_is_not_computed():
    """The first holds the reward; the second times out while it waits, the third comes after."""
    begun, go, calls = threading.Event(), threading.Event(), []

    def held(images, prompts, **columns):
        calls.append(prompts[0])
        begun.set()
        go.wait(30)
        return [0.0] * len(images)

    with serving(FunctionReward(held)) as address:
        first = threading.Thread(target=httpx2.post, args=[f"{address}/score"], kwargs={"json": asked(png(), prompts=["1"]), "timeout": 60})
        first.start()
        assert begun.wait(30)
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{address}/score", json=asked(png(), prompts=["2"]), timeout=0.5)
        assert httpx2.get(f"{address}/health", timeout=30).status_code == 200  # answers while the reward computes
        go.set()
        httpx2.post(f"{address}/score", json=asked(png(), prompts=["3"]), timeout=60)
        first.join()
    assert calls == ["1", "3"]


# ---- the client against a server that misbehaves ----------------------------------------------------------------------------------


@contextmanager
def fake(*plan):
    """A server that follows a plan, a word per request, and afterwards answers: `address`, and what it got, `bodies`, `times`, `headers`.

    A number is a status, "slow" answers too late, "drop" closes the connection, anything else is the body of an answer of status 200.
    """
    got, over = SimpleNamespace(bodies=[], times=[], headers=[]), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.bodies.append(body)
            got.times.append(time.monotonic())
            got.headers.append(self.headers)
            step = plan[len(got.bodies) - 1] if len(got.bodies) <= len(plan) else None
            if step == "slow":
                over.wait(3)
            if step in ("slow", "drop"):
                self.close_connection = True
                return
            if step is None:
                step = json.dumps({"scores": [1.0] * len(body.get("images", []))})
            content = step.encode() if isinstance(step, str) else json.dumps({"error": "out of order"}).encode()
            self.send_response(200 if isinstance(step, str) else step)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    got.address = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield got
    finally:
        over.set()
        http.shutdown()
        http.server_close()
        thread.join()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("plan", "settings", "requests"), [
    ([500, 500], {"retries": 2}, 3),
    (["slow"], {"retries": 1, "timeout": 0.3}, 2),
    (["drop", 502, 503, 504, "drop"], {"retries": 0}, 6),  # away, which patience is for
    (["drop", 500, "drop"], {"retries": 1}, 4),
])  # fmt: skip
def test_what_fails_is_asked_again(plan, settings, requests):
    with fake(*plan) as server:
        assert scores_of(RemoteReward(server.address, **settings), pictures(2)).tolist() == [1.0, 1.0]
        assert len(server.bodies) == requests
        assert all(body == server.bodies[0] for body in server.bodies)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("plan", "settings", "requests", "error", "sentence"), [
    ([500] * 9, {"retries": 2}, 3, RuntimeError, r"'remote': http.*/score failed 3 times, more than `retries` \(2\) allows, at last with 500: out of order"),
    (["slow"] * 9, {"retries": 1, "timeout": 0.3}, 2, RuntimeError, "failed 2 times.* at last with a time-out after 0.3 s"),
    (["drop"] * 9, {"patience": 0}, 1, RuntimeError, r"was away for longer than `patience` \(0 s\), at last with RemoteProtocolError"),
    ([404], {}, 1, ValueError, "'remote': http.*/score refuses the request with 404: out of order"),
    ([307], {}, 1, ValueError, "refuses the request with 307"),
    (["a page"], {}, 1, ValueError, "did not answer with one score for each of 2 pictures but 'a page': does `url` name a reward server"),
    (['{"scores": [1]}'], {}, 1, ValueError, "did not answer with one score for each of 2 pictures"),
    (['{"scores": [1, "two"]}'], {}, 1, ValueError, "did not answer with one score for each of 2 pictures"),
])  # fmt: skip
def test_what_keeps_failing_is_said(plan, settings, requests, error, sentence):
    with fake(*plan) as server:
        with pytest.raises(error, match=sentence):
            scores_of(RemoteReward(server.address, **settings), pictures(2))
        assert len(server.bodies) == requests


@pytest.mark.usefixtures("quick")
def test_a_server_that_never_comes_is_waited_for_as_long_as_patience_says():
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"was away for longer than `patience` \(0.5 s\), at last with ConnectError"):
        scores_of(RemoteReward(f"http://127.0.0.1:{free_port()}", patience=0.5), pictures(1))
    assert 0.5 <= time.monotonic() - begun < 5


def test_the_waits_double():
    with fake(500, 503) as server:
        scores_of(RemoteReward(server.address), pictures(1))
        first, second = (b - a for a, b in zip(server.times, server.times[1:], strict=False))
    assert first >= 0.5
    assert second >= 1.0


def test_requests_have_batch_size_pictures_with_their_prompts_and_columns():
    images, answers = pictures(5), [[1], [2], [3], [4], [5]]
    with fake() as server:
        scores_of(
            RemoteReward(f"{server.address}/", columns=["answer"], batch_size=2), images, list("abcde"), answer=answers, secret=[0] * 5
        )
    assert [body["prompts"] for body in server.bodies] == [["a", "b"], ["c", "d"], ["e"]]
    assert [body["columns"] for body in server.bodies] == [{"answer": [[1], [2]]}, {"answer": [[3], [4]]}, {"answer": [[5]]}]
    assert torch.equal(torch.stack([decoded(p) for body in server.bodies for p in body["images"]]), images)


def test_remote_rewards_are_waited_for_together():
    """Neither server answers before the other has been asked too."""
    both = threading.Barrier(2)

    def wait(images, prompts, **columns):
        both.wait(20)
        return [1.0]

    with serving(FunctionReward(wait)) as one, serving(FunctionReward(wait)) as two:
        rewards = [RemoteReward(address, name=address, retries=0) for address in (one, two)]
        assert call_rewards(rewards, pictures(1), examples(["a"])).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"url": "127.0.0.1:8000"}, r"`url` \('127.0.0.1:8000'\) is no address of a server"),
    ({"batch_size": 0}, r"`batch_size` \(0\) must be at least 1"),
    ({"retries": -1}, r"`retries` \(-1\) must be at least 0"),
    ({"patience": -1}, r"`patience` \(-1\) must be at least 0"),
    ({"timeout": 0}, r"`timeout` \(0\) must be above 0"),
    ({"columns": "answer"}, r"`columns` \('answer'\) is a string: pass the list \['answer'\]"),
])  # fmt: skip
def test_wrong_settings_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        RemoteReward(**({"url": "http://127.0.0.1:1"} | settings))


def test_columns_that_are_absent_or_no_json_are_refused():
    reward = RemoteReward("http://127.0.0.1:1", columns=["answer"])
    with pytest.raises(ValueError, match="is to send the column 'answer', which the data set does not have"):
        scores_of(reward, pictures(1))
    for value in (b"bytes", math.nan):
        with pytest.raises(ValueError, match=r"cannot send the column 'answer' as JSON \(.*leave it out of `columns`"):
            scores_of(reward, pictures(1), answer=[value])
    with pytest.raises(ValueError, match=r"sends pictures \(B, 3, H, W\), but `images` has the shape \(4, 2\)"):
        scores_of(RemoteReward("http://127.0.0.1:1"), torch.zeros(4, 2))


# ---- a run whose server dies ---------------------------------------------------------------------------------------------------


def rewards_of(folder: Path, address: str) -> list[tuple[int, float]]:
    """Step and mean reward of each update of a small run."""
    t = make("ACFlowTrainer", folder, reward=RemoteReward(address), num_generations=2, max_steps=4)
    t.train()
    assert t.state.global_step == 4
    return [(row["step"], row["reward/remote"]) for row in t.state.log_history if "reward/remote" in row]


def test_a_server_killed_under_a_request_and_restarted_costs_no_step(tmp_path):
    """The probe is its first call, the first update its second; SIGKILL comes in the third. Compared with a run that nobody disturbed."""
    port, processes = free_port(), []
    processes.append(start(tmp_path, "served.dies_once", port))

    def restart() -> None:
        processes[0].wait()
        processes.append(start(tmp_path, "served.dies_once", port))

    supervisor = threading.Thread(target=restart, daemon=True)
    try:
        wait_for(processes[0], f"http://127.0.0.1:{port}")
        supervisor.start()
        disturbed = rewards_of(tmp_path / "disturbed", f"http://127.0.0.1:{port}")
        assert processes[0].returncode == -signal.SIGKILL
        assert processes[1].poll() is None
        undisturbed = rewards_of(tmp_path / "undisturbed", f"http://127.0.0.1:{port}")
    finally:
        for process in processes:
            stop(process)
        supervisor.join()
        for process in processes[1:]:  # one that was started after the first was stopped
            stop(process)
    assert [step for step, _ in undisturbed] == [1, 2, 3, 4]
    assert disturbed == undisturbed


# ---- the command ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["beauty"], "`NAME` names 'beauty', which is no known reward"),
    (["no_such_module.reward"], "The reward 'no_such_module.reward' cannot be imported"),
    (["checker", "--port", "70000"], r"`port` \(70000\) must be between 0 and 65535"),
    (["checker", "--max_batch", "0"], r"`max_batch` \(0\) must be at least 1"),
])  # fmt: skip
def test_wrong_arguments_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        command.serve_reward(arguments)


@pytest.mark.parametrize(
    ("host", "warned"), [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("gpu-7", True)]
)
def test_an_address_that_others_reach_is_warned_of(monkeypatch, capsys, host, warned):
    told = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **settings: told.update(settings))
    command.serve_reward(["checker", "--host", host, "--port", "0"])
    assert told["host"] == host
    assert ("there is no authentication" in capsys.readouterr().err) == warned


def test_the_example_of_the_docs_is_one():
    (code,) = re.findall(r"```python\n(from .*?)```", (ROOT / "docs" / "remote_rewards.md").read_text(), flags=re.S)
    scope: dict = {}
    exec(code, scope)
    assert scope["reader"].columns == ("text",)


# ---- the example ---------------------------------------------------------------------------------------------------------------


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
    images = pictures(3)
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


@pytest.mark.usefixtures("quick")
def test_the_judge_asks_again_when_its_server_is_away(judge, monkeypatch):
    with fake(503, 500, said("5")) as server:
        monkeypatch.setenv("VLM_URL", f"{server.address}/v1")
        assert scores_of(as_rewards(judge.vlm_judge)[0], pictures(1)).tolist() == [0.5]


@pytest.mark.parametrize(("answer", "score"), [
    ("7", 0.7), ("7.5", 0.75), ("Score: 9.", 0.9), ("8 / 10", 0.8), ("0", 0.0),
    ("no idea", None), ("11", None), ("-3", None), ("between 3 and 4", None), (None, None),
])  # fmt: skip
def test_what_is_a_number_and_what_is_none(judge, answer, score):
    assert judge.number(answer) == score
