"""What ends a process: SIGTERM leaves a checkpoint, and a process that fails is named by the others."""

import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from flowrl_trainers.rewards import differentiable
from flowrl_trainers.run_folder.checkpoints import fault
from flowrl_trainers.trainers import other_processes
from flowrl_trainers.trainers.sigterm import EXIT_STATUS, SigtermCallback

from .fsdp2 import ENVIRONMENT, on_two_processes, pretend_gpus
from .helpers import TRAINERS, adjoint_matching, make_trainer
from .runs import WINDOW, assert_same, fork_two, launch, run
from .tiny import tiny_sd3

SIX = WINDOW | {"max_steps": 6, "save_strategy": "no"}
TWO = {
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "num_generations": 2, "max_steps": 6,
    "save_strategy": "no", "learning_rate": 0.01, "ddp_backend": "gloo",
}  # fmt: skip
KILLED = "another process ended without a word, as one that is killed or runs out of memory does"


@pytest.mark.parametrize(
    "trainer", ["AdjointMatchingTrainer", *(pytest.param(t, marks=pytest.mark.slow) for t in list(TRAINERS)[1:])]
)
def test_a_run_that_sigterm_ends_goes_on_bit_for_bit(tmp_path, trainer):
    """SIGTERM in the third update: a checkpoint of it, though `save_strategy` is "no", the adapter, and status 143."""
    whole, preempted = tmp_path / "whole", tmp_path / "preempted"
    assert run(whole, trainer, SIX).returncode == 0
    ended = run(preempted, trainer, SIX, kill_at=2, how="SIGTERM")
    assert ended.returncode == 143, ended.stderr
    said = " ".join(ended.stderr.split())  # long messages go on in the next line
    assert f"SIGTERM ended training after 3 updates: what it has learned is in {preempted}." in said
    assert f"{preempted / 'checkpoint-3'} is whole: `resume_from_checkpoint=True` goes on from it" in said
    assert "Traceback" not in ended.stderr
    assert (preempted / "pytorch_lora_weights.safetensors").exists()
    assert [path.name for path in preempted.glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = run(preempted, trainer, SIX, resume="auto")
    assert resumed.returncode == 0, resumed.stderr
    result, expected = (torch.load(folder / "result.pt") for folder in (preempted, whole))
    for what in ("weights", "optimizer", "state"):
        assert_same(result[what], expected[what])
    timeless = [[row for row in r["history"] if "loss" in row] for r in (result, expected)]
    assert_same(*timeless)


@pytest.mark.slow
def test_two_processes_agree_on_the_update_at_which_sigterm_ends_them(tmp_path):
    ended = launch(tmp_path, "ACFlowTrainer", TWO, 2, kill_at=2, how="SIGTERM")
    assert ended.returncode != 0
    assert "SIGTERM ended training after 3 updates" in ended.stderr
    assert fault(tmp_path / "checkpoint-3") is None
    resumed = launch(tmp_path, "ACFlowTrainer", TWO | {"max_steps": 4}, 2, resume=True)
    assert resumed.returncode == 0, resumed.stderr


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("error", r"process 1 failed (OSError: the judge is gone)"),
        ("SIGKILL", KILLED),
    ],
)
def test_a_process_says_why_it_cannot_go_on_without_another(tmp_path, how, cause):
    assert_says_why(fork_two(tmp_path, "AdjointMatchingTrainer", TWO, kill_at=2, how=how)[0], cause)


@pytest.mark.slow
def test_accelerates_own_watch_of_its_processes_does_not_hide_why(tmp_path):
    assert_says_why(launch(tmp_path, "AdjointMatchingTrainer", TWO, 2, kill_at=2, how="SIGKILL"), KILLED)


def assert_says_why(ended: subprocess.CompletedProcess, cause: str) -> None:
    assert ended.returncode != 0
    sentence = f"Process 0 cannot go on, as {cause}: look at what that process printed."
    assert sentence in " ".join(ended.stderr.split()), ended.stderr
    assert "gloo" not in ended.stderr


def fail_and_live_on(folder: Path, where: str, sharded: bool) -> None:
    """On one of two processes: a reward that raises on the second, in the second rollout or in an evaluation; the
    second process does not end then.
    """
    torch.set_num_threads(1)
    other_processes.GRACE = 3.0
    if sharded:
        pretend_gpus()
    calls = [0]

    @differentiable
    def judge(images, prompts, **columns):
        calls[0] += 1
        if os.environ["RANK"] == "1" and calls[0] == (4 if where == "train" else 1):
            raise OSError("the judge is gone")
        return images.mean(dim=(1, 2, 3))

    t = make_trainer(
        "AdjointMatchingTrainer", folder, reward=judge, per_device_train_batch_size=1, use_cpu=not sharded,
    )  # fmt: skip
    try:
        t.train() if where == "train" else t.evaluate(Dataset.from_dict({"prompt": ["a", "b"]}))
    except OSError:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (folder / "first_ended").exists():
            time.sleep(0.1)


@pytest.mark.parametrize(("where", "sharded"), [("train", True), ("evaluate", False)])
def test_a_reward_that_raises_on_one_process_ends_the_others_that_wait_for_it(tmp_path, where, sharded):
    ended = on_two_processes(
        fail_and_live_on, tmp_path, where, sharded, first_ended=tmp_path / "first_ended",
        **(ENVIRONMENT if sharded else {}),
    )  # fmt: skip
    assert [process.returncode for process in ended] == [1, 0]
    sentence = "Process 0 ends, as process 1 failed (OSError: the judge is gone), and it waits for that one in vain"
    assert sentence in " ".join(ended[0].stderr.split()), ended[0].stderr


# ---- the handler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "when", ["an evaluation", "the last evaluation", "the end of training", "the first evaluation"]
)
def test_sigterm_beside_updates_begins_no_other_and_is_not_forgotten(tmp_path, tiny_pipeline, when, caplog):
    def end_us() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def judge(images, prompts, trainer_state, **columns):
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # it is tried before training
            return [1.0] * len(images)
        if trainer_state.global_step == (0 if when == "the first evaluation" else 1) and when != "the end of training":
            end_us()
        return [1.0] * len(images)

    class Late(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            if when == "the end of training":
                end_us()

    t = adjoint_matching(
        tmp_path, tiny_pipeline, eval_dataset=["a cat"], eval_reward_funcs=judge, callbacks=[Late()], log_images=0,
        eval_strategy="steps", eval_steps=1, save_strategy="no", eval_on_start=when == "the first evaluation",
        max_steps=3 if when == "an evaluation" else 1,
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        t.train()
    assert ended.value.code == EXIT_STATUS
    if when == "the first evaluation":
        assert t.state.global_step == 0
        assert "SIGTERM ended training before its first update." in caplog.text
        return
    assert t.state.global_step == 1
    assert f"SIGTERM ended training after 1 updates: what it has learned is in {tmp_path}." in caplog.text
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()
    saved = list(tmp_path.glob("checkpoint-*"))
    assert [fault(path) for path in saved] == ([] if when == "the end of training" else [None])


def test_the_handler_stays_no_longer_than_training_and_only_where_nobody_else_has_one():
    sigterm = SigtermCallback(lambda here: here)
    with suppress(OSError), sigterm.listening():
        assert signal.getsignal(signal.SIGTERM) == sigterm._note
        raise OSError("the judge is gone")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    mine = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with sigterm.listening():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, mine)


def test_training_in_a_thread_leaves_signals_alone():
    errors = []

    def listen():
        try:
            with SigtermCallback(lambda here: here).listening():
                pass
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert not errors


def test_sigterm_saves_what_is_not_the_best(tmp_path):
    """With `save_strategy="best"`, an evaluation after the same update does not undo what SIGTERM asked for."""
    t = adjoint_matching(
        tmp_path, tiny_sd3(), max_steps=3, save_strategy="best", eval_strategy="steps", eval_steps=1, log_images=0,
        metric_for_best_model="reward/redness", eval_dataset=adjoint_matching(tmp_path, tiny_sd3()).train_dataset.dataset,
        save_total_limit=1, load_best_model_at_end=True, learning_rate=0.0,
    )  # fmt: skip
    step = t.training_step

    def terminated(*arguments):
        if t.state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    t.training_step = terminated
    with pytest.raises(SystemExit) as end:
        t.train()
    assert end.value.code == EXIT_STATUS == 143
    assert fault(tmp_path / "checkpoint-2") is None
