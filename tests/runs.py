"""Training runs as processes of their own (`training_script.py`): alone, killed and resumed, or on two processes."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from . import forked
from .helpers import FORMS, trainer_of

SCRIPT = Path(__file__).parent / "training_script.py"
NO_DROPOUT = {"TAFSGRPOTrainer": {"lora_dropout": 0.0}}  # which it refuses
# Two updates per rollout, each rollout used twice: a window of four updates, two rollouts of four prompts an epoch.
WINDOW = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_generations": 2,
    "steps_per_generation": 4, "num_iterations": 2, "max_steps": 12, "save_steps": 1, "learning_rate": 0.01,
    "ema_decay": 0.9,
}  # fmt: skip


def write_settings(
    folder: Path, trainer: str, config: dict[str, Any], kill_at: int | None = None, resume: bool | str = False,
    how: str = "SIGKILL",
) -> Path:  # fmt: skip
    settings = {
        "trainer": trainer_of(trainer),
        "config": FORMS[trainer] | NO_DROPOUT.get(trainer, {}) | config | {"output_dir": str(folder)},
        "kill_at": kill_at,
        "how": how,
        "resume": resume,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder / "settings.json"


def run(
    folder: Path,
    trainer: str,
    config: dict[str, Any],
    kill_at: int | None = None,
    resume: bool | str = False,
    how: str = "SIGKILL",
) -> subprocess.CompletedProcess:
    """A run in one process; `kill_at`: the update after which it ends itself; `how`: a signal, or "error"."""
    settings = write_settings(folder, trainer, config, kill_at, resume, how)
    environment = {k: v for k, v in os.environ.items() if k != "CI"}
    return forked.script(SCRIPT, settings, environment=environment)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(
    folder: Path, trainer: str, config: dict[str, Any], processes: int, kill_at: int | None = None,
    resume: bool | str = False, how: str = "SIGKILL",
) -> subprocess.CompletedProcess:  # fmt: skip
    """The same run in several processes of `accelerate launch`; the last of them is the one that ends itself.

    accelerate starts one process for `--cpu --num_processes 2`; with `--multi_gpu` and `use_cpu` it starts two on
    gloo.
    """
    return subprocess.run(
        [Path(sys.executable).parent / "accelerate", "launch", "--multi_gpu", "--num_processes", str(processes),
         "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_ip", "127.0.0.1",
         "--main_process_port", str(free_port()), SCRIPT, write_settings(folder, trainer, config, kill_at, resume, how)],
        capture_output=True, text=True,
    )  # fmt: skip


def fork_two(
    folder: Path, trainer: str, config: dict[str, Any], kill_at: int | None = None, how: str = "SIGKILL"
) -> list[subprocess.CompletedProcess]:
    """The same run in two processes with the environment that `accelerate launch` gives them, without its imports."""
    settings = write_settings(folder, trainer, config, kill_at, how=how)
    shared = {k: v for k, v in os.environ.items() if k != "CI"} | {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(
            lambda rank: forked.script(SCRIPT, settings, environment=shared | {"RANK": rank, "LOCAL_RANK": rank}),
            ("0", "1"),
        ))  # fmt: skip


def assert_same(a: Any, b: Any) -> None:
    """Equal to the last bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b
