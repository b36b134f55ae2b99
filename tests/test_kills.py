"""Twenty SIGKILLs at random moments, half of them while a checkpoint is written, change nothing of what a run gives."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

from flowrl_trainers import FlowRLTrainer
from flowrl_trainers.run_folder import checkpoints
from flowrl_trainers.run_folder.checkpoints import WEIGHTS, fault
from flowrl_trainers.run_folder.earlier_run import ADAPTER
from flowrl_trainers.trainers import checkpointed_trainer

from .helpers import FORMS, make_trainer
from .runs import assert_same

KILLS = int(os.environ.get("FLOWRL_TEST_KILLS", "20"))
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_generations": 2,
    "steps_per_generation": 4, "num_iterations": 2, "max_steps": 60, "save_strategy": "steps", "save_steps": 1,
    "save_total_limit": 3, "learning_rate": 0.01, "ema_decay": 0.9,
}  # fmt: skip
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.forked", "tests.preloaded", "tests.test_kills"])


def train(trainer: str, folder: Path, started: Any, file: int | None) -> None:
    """The run of a child process, which goes on where the one before was killed.

    Args:
        trainer: Its name.
        folder: The `output_dir`.
        started: Set after the first update.
        file: The child kills itself after as many files of a checkpoint were written, or reached the disk; or None.
    """
    torch.set_num_threads(1)
    t = make_trainer(trainer, folder, **SETTINGS)
    step_end = t._counter.on_step_end

    def say(*arguments: Any, **more: Any) -> None:
        started.set()
        step_end(*arguments, **more)

    t._counter.on_step_end = say
    if file is not None:
        kill_while_saving(t, file)
    t.train(resume_from_checkpoint="auto")
    t.save_model()


def kill_while_saving(t: FlowRLTrainer, file: int) -> None:
    """Kill this process while its second checkpoint is written: at the Nth file from there on."""
    left = [file]

    def counted(module: Any, name: str) -> None:
        write = getattr(module, name)

        def killing(*arguments: Any, **more: Any) -> Any:
            result = write(*arguments, **more)
            if t._counter.updates >= 2:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(module, name, killing)

    for module, name in ((torch, "save"), (checkpointed_trainer, "save_file"), (checkpoints, "_sync")):
        counted(module, name)


def what_a_run_gives(folder: Path) -> dict[str, Any]:
    """Bytes of the adapter, tensors and settings of the last checkpoints, and every logged number but seconds."""
    last = folder / f"checkpoint-{SETTINGS['max_steps']}"
    assert fault(last) is None
    history = TrainerState.load_from_json(str(last / "trainer_state.json")).log_history
    return {
        "adapter": (folder / ADAPTER).read_bytes(),
        "adapter of the checkpoint": (last / ADAPTER).read_bytes(),
        "weights": {path.name: load_file(path / WEIGHTS) for path in folder.glob("checkpoint-*")},
        "bytes": {
            name: (last / name).read_bytes() for name in (WEIGHTS, "config.yaml", "scheduler.pt", "rng_state.pth")
        },
        "optimizer": torch.load(last / "optimizer.pt", weights_only=True)["state"],
        "history": [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in history],
    }


def child(trainer: str, folder: Path, file: int | None = None) -> tuple[Any, Any]:
    started = FORKS.Event()
    process = FORKS.Process(target=train, args=(trainer, folder, started, file))
    process.start()
    return process, started


@pytest.mark.slow
@pytest.mark.parametrize("trainer", FORMS)
def test_kills_change_nothing(tmp_path, trainer):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    chance, deaths = random.Random(trainer), 0
    start = time.monotonic()
    undisturbed, _ = child(trainer, whole)
    undisturbed.join()
    assert undisturbed.exitcode == 0
    a_run = time.monotonic() - start
    for number in range(KILLS):
        while_saving = number % 2 == 0
        process, started = child(trainer, killed, chance.randrange(40) if while_saving else None)
        if not while_saving:
            started.wait(120)
            time.sleep(chance.uniform(0, a_run / SETTINGS["max_steps"]))
            process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        deaths += process.exitcode == -signal.SIGKILL
        kept = checkpoints.newest_whole(killed)[0]
        assert kept is not None, "the first run saves a checkpoint before it is killed while saving the second"
    assert deaths > 0.8 * KILLS, "the run ended before it could be killed: give it more updates"
    last, _ = child(trainer, killed)
    last.join()
    assert last.exitcode == 0
    assert_same(what_a_run_gives(killed), what_a_run_gives(whole))
