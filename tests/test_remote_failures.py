"""A reward server that fails, is slow or away is asked again as long as the settings say, and a run survives its
death.
"""

import gzip
import os
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from flowrl_trainers.rewards import FunctionReward, RemoteReward

from . import forked
from .helpers import make_trainer, redness
from .reward_servers import fake, noise, scores_of, serving
from .runs import free_port

TOKEN = "a-token.of+24/characters"


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize(("plan", "settings", "requests"), [
    ([500, 500], {"retries": 2}, 3),
    (["slow"], {"retries": 1, "timeout": 0.3}, 2),
    (["drop", 429, 502, 503, 504, "drop"], {"retries": 0}, 7),  # away, which patience is for
    (["drop", 500, "drop"], {"retries": 1}, 4),
])  # fmt: skip
def test_what_fails_is_asked_again(plan, settings, requests):
    with fake(*plan) as server:
        assert scores_of(RemoteReward(server.address, **settings), noise(2)).tolist() == [1.0, 1.0]
        assert len(server.bodies) == requests
        assert all(body == server.bodies[0] for body in server.bodies)


@pytest.mark.usefixtures("quick_retries")
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
            scores_of(RemoteReward(server.address, **settings), noise(2))
        assert len(server.bodies) == requests


@pytest.mark.usefixtures("quick_retries")
def test_a_server_that_never_comes_is_waited_for_as_long_as_patience_says():
    begun = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"was away for longer than `patience` \(0.5 s\), at last with ConnectError"
    ):
        scores_of(RemoteReward(f"http://127.0.0.1:{free_port()}", patience=0.5), noise(1))
    assert 0.5 <= time.monotonic() - begun < 5


def test_the_waits_double():
    with fake(500, 503) as server:
        scores_of(RemoteReward(server.address), noise(1))
        first, second = (b - a for a, b in zip(server.times, server.times[1:], strict=False))
    assert first >= 0.5
    assert second >= 1.0


def test_what_fails_on_one_server_is_asked_of_the_next_at_once_and_of_the_first_again_later(monkeypatch):
    """The first server fails in its first request and its second, between which it is left alone for a while."""
    with fake("drop", 500) as one, fake() as two:
        reward = RemoteReward([one.address, two.address], retries=0)
        begun = time.monotonic()
        for _ in range(2):
            assert scores_of(reward, noise(1)).tolist() == [1.0]
        assert [len(one.bodies), len(two.bodies)] == [1, 2]
        monkeypatch.setattr("flowrl_trainers.rewards.remote.LONGEST_DELAY", 0.0)
        for _ in range(2):
            assert scores_of(reward, noise(1)).tolist() == [1.0]
        assert [len(one.bodies), len(two.bodies)] == [3, 3]
        assert time.monotonic() - begun < 2


@pytest.mark.usefixtures("quick_retries")
def test_several_servers_that_all_fail_are_waited_for():
    with fake("drop", 500, 500) as one, fake(500, 500, "drop") as two:
        assert scores_of(RemoteReward([one.address, two.address], retries=2), noise(1)).tolist() == [1.0]
        assert [len(one.bodies), len(two.bodies)] == [4, 3]
    with fake(*[500] * 9) as one, fake(*[500] * 9) as two:
        reward = RemoteReward([one.address, two.address], retries=1)
        with pytest.raises(RuntimeError, match=r"failed 4 times, more than `retries` \(1\) allows"):
            scores_of(reward, noise(1))


def rewards_of(folder: Path, address: str | list[str], batch_size: int = 16) -> list[tuple[int, float]]:
    """Step and mean reward of each update of a small run."""
    reward = RemoteReward(address, batch_size=batch_size)
    t = make_trainer("ACFlowTrainer", folder, reward=reward, num_generations=2, max_steps=4)
    t.train()
    assert t.state.global_step == 4
    return [(row["step"], row["reward/remote"]) for row in t.state.log_history if "reward/remote" in row]


def serve_redness(port: int, fatal_call: int | None) -> None:
    """A server of redness that SIGKILL ends in one of its calls, or None of them."""
    calls = count(1)

    def judge(images, prompts, **columns):
        if next(calls) == fatal_call:
            os.kill(os.getpid(), signal.SIGKILL)
        return redness(images, prompts)

    with serving(FunctionReward(judge), port=port):
        time.sleep(600)


def start_serving(port: int, fatal_call: int | None) -> BaseProcess:
    process = forked.FORKS.Process(target=serve_redness, args=(port, fatal_call), daemon=True)
    process.start()
    return process


def wait_until_served(process: BaseProcess, port: int) -> str:
    """The address, once somebody listens there."""
    while process.is_alive():
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return f"http://127.0.0.1:{port}"
        time.sleep(0.05)
    raise AssertionError("the server ended by itself")


def test_a_server_killed_under_a_request_and_restarted_costs_no_step(tmp_path):
    """The probe is its first call, the first update its second; SIGKILL comes in the third. Compared with a run that
    nobody disturbed.
    """
    port = free_port()
    processes = [start_serving(port, 3)]

    def restart() -> None:
        processes[0].join()
        processes.append(start_serving(port, None))

    supervisor = threading.Thread(target=restart, daemon=True)
    try:
        address = wait_until_served(processes[0], port)
        supervisor.start()
        disturbed = rewards_of(tmp_path / "disturbed", address)
        assert processes[0].exitcode == -signal.SIGKILL
        assert processes[1].is_alive()
        undisturbed = rewards_of(tmp_path / "undisturbed", address)
    finally:
        processes[0].kill()
        supervisor.join()
        processes[-1].kill()
    assert [step for step, _ in undisturbed] == [1, 2, 3, 4]
    assert disturbed == undisturbed


def test_one_of_two_servers_is_killed_and_costs_no_step(tmp_path):
    """Each has two of four pictures at a time; nobody starts the first again."""
    port = free_port()
    killed = start_serving(port, 3)
    try:
        with serving(FunctionReward(redness)) as other:
            address = wait_until_served(killed, port)
            disturbed = rewards_of(tmp_path / "disturbed", [address, other], batch_size=2)
            killed.join(10)
            assert killed.exitcode == -signal.SIGKILL
            undisturbed = rewards_of(tmp_path / "undisturbed", other)
    finally:
        killed.kill()
    assert [step for step, _ in undisturbed] == [1, 2, 3, 4]
    assert disturbed == undisturbed


# ---- a hostile server -----------------------------------------------------------------------------------------------


def drip(file, headers) -> None:
    """A byte of an endless answer now and then."""
    file.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
    for _ in range(200):
        file.write(b" ")
        time.sleep(0.05)


def drip_headers(file, headers) -> None:
    """A byte of an endless header now and then."""
    file.write(b"HTTP/1.1 200 OK\r\nX: ")
    for _ in range(200):
        file.write(b"x")
        time.sleep(0.05)


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("answer", [drip, drip_headers])
def test_an_answer_of_a_byte_now_and_then_times_out(answer):
    begun = time.monotonic()
    with fake(*[answer] * 2) as server:
        with pytest.raises(RuntimeError, match=r"http.*/score failed 2 times.* at last with a time-out after 0.4 s"):
            scores_of(RemoteReward(server.address, timeout=0.4, retries=1), noise(1))
        assert time.monotonic() - begun < 5
        assert len(server.bodies) == 2


@pytest.mark.parametrize(("head", "sentence"), [
    (b"200 OK\r\nContent-Length: 300000000", "answered with more than 1048576 bytes, which no scores take"),
    (b"200 OK\r\nConnection: close", "answered with more than 1048576 bytes, which no scores take"),
    (b"404 Not Found\r\nConnection: close", "refuses the request with 404: 1111"),
])  # fmt: skip
def test_an_answer_without_end_is_not_read_to_its_end(head, sentence):
    sent = []

    def endless(file, headers) -> None:
        file.write(b"HTTP/1.1 " + head + b"\r\n\r\n")
        for _ in range(300):
            file.write(b"1" * 1_000_000)
            sent.append(1_000_000)

    with fake(endless) as server:
        sentence = f"Reward 'remote': {server.address}/score {sentence}"
        with pytest.raises(ValueError, match=re.escape(sentence)) as error:
            scores_of(RemoteReward(server.address), noise(1))
    assert sum(sent) < 50_000_000  # what fits into the buffers of both sides
    assert len(str(error.value)) < 700


def test_a_compressed_answer_is_not_unpacked():
    """100 MB of blanks, which take 100 kB on their way."""
    packed = gzip.compress(b'{"scores": [1.0' + b" " * 100_000_000 + b"]}")
    asked_for = []

    def bomb(file, headers) -> None:
        asked_for.append(headers["Accept-Encoding"])
        file.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed)

    with fake(bomb) as server, pytest.raises(ValueError, match="did not answer with one score for each of 1 pictures"):
        scores_of(RemoteReward(server.address), noise(1))
    assert asked_for == ["identity"]


@pytest.mark.parametrize("answer", [
    f'{{"scores": [{"9" * 400}]}}',
    f'{{"scores": [-{"9" * 10_000}]}}',
    f'{{"scores": {"[" * 100_000}1{"]" * 100_000}}}',
    '{"scores": [true]}',
    '{"scores": [[1.0]]}',
    '{"scores": {"0": 1.0}}',
    "\xff\xfe\x00",
    "",
])  # fmt: skip
def test_an_answer_without_usable_scores_is_quoted_in_a_sentence(answer):
    sentence = r"http.*/score did not answer with one score for each of 1 pictures"
    with fake(answer) as server, pytest.raises(ValueError, match=sentence) as error:
        scores_of(RemoteReward(server.address), noise(1))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("status", [b"401 Unauthorized", b"500 Oops", b"200 OK"])
@pytest.mark.usefixtures("quick_retries")
def test_a_token_that_the_server_sends_back_is_in_no_error_and_no_log(caplog, status):
    def echo(file, headers) -> None:
        text = f"you sent {headers['Authorization']}".encode()
        file.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: %d\r\n\r\n" % len(text) + text)

    caplog.set_level("DEBUG")
    with (
        fake(echo, echo) as server,
        pytest.raises((ValueError, RuntimeError), match="you sent Bearer <token>") as error,
    ):
        scores_of(RemoteReward(server.address, token=TOKEN, retries=1), noise(1))
    assert TOKEN not in str(error.value)
    assert TOKEN not in caplog.text


def test_a_run_sends_the_token_and_writes_it_nowhere(tmp_path):
    with fake() as server:
        reward = RemoteReward(server.address, token=TOKEN)
        trainer = make_trainer("ACFlowTrainer", tmp_path, reward=reward, num_generations=2, max_steps=1)
        trainer.train()
        trainer.save_model()
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {TOKEN}"}
    assert TOKEN not in repr(reward)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert "config.yaml" in {path.name for path in files}
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_a_server_that_does_not_take_the_connection_is_away_and_not_slow():
    """Its queue of connections is full, so that the system answers no further one."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for connection in waiting:
            connection.setblocking(False)
            connection.connect_ex(listener.getsockname())
        reward = RemoteReward(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=1, retries=0, patience=0)
        try:
            with pytest.raises(
                RuntimeError, match=r"was away for longer than `patience` \(0 s\), at last with ConnectTimeout"
            ):
                scores_of(reward, noise(1))
        finally:
            for connection in waiting:
                connection.close()
