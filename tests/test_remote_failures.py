"""A reward server that fails, is slow or away is asked again as long as the settings say, and a run survives its
death.
"""

import signal
import threading
import time
from pathlib import Path

import pytest

from flowrl_trainers.rewards import RemoteReward

from .helpers import make_trainer
from .reward_servers import fake, noise, scores_of, start, stop, wait_for
from .runs import free_port


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize(("plan", "settings", "requests"), [
    ([500, 500], {"retries": 2}, 3),
    (["slow"], {"retries": 1, "timeout": 0.3}, 2),
    (["drop", 502, 503, 504, "drop"], {"retries": 0}, 6),  # away, which patience is for
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


def rewards_of(folder: Path, address: str) -> list[tuple[int, float]]:
    """Step and mean reward of each update of a small run."""
    t = make_trainer("ACFlowTrainer", folder, reward=RemoteReward(address), num_generations=2, max_steps=4)
    t.train()
    assert t.state.global_step == 4
    return [(row["step"], row["reward/remote"]) for row in t.state.log_history if "reward/remote" in row]


def test_a_server_killed_under_a_request_and_restarted_costs_no_step(tmp_path):
    """The probe is its first call, the first update its second; SIGKILL comes in the third. Compared with a run that
    nobody disturbed.
    """
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
