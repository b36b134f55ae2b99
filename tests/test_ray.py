"""`examples/ray_train.py`: a run of two Ray workers, one of which is killed, ends as one that nobody disturbed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

EXAMPLE = Path(__file__).parent.parent / "examples" / "ray_train.py"
JUDGE = '''
import itertools, os, signal
from pathlib import Path

calls = itertools.count(1)

def red(images, prompts, **columns):
    """Redness; the fifth call of the second worker never returns where KILLED does not exist yet."""
    killed = Path(os.environ["KILLED"])
    if os.environ["RANK"] == "1" and next(calls) == 5 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    red, green, blue = images.unbind(dim=1)
    return (red - (green + blue) / 2).mean(dim=(1, 2))
'''
SETTINGS = [
    "--model",
    "shapes",
    "--dataset",
    "shapes",
    "--reward_funcs",
    "judge.red",
    "--max_steps",
    "3",
    "--save_steps",
    "1",
    "--num_generations",
    "2",
    "--per_device_train_batch_size",
    "1",
    "--gradient_accumulation_steps",
    "2",
    "--num_inference_steps",
    "2",
    "--timestep_bins",
    "2",
    "--lora_r",
    "2",
    "--lora_alpha",
    "4",
    "--report_to",
    "none",
]


def run(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The adapter of a run; the worker is killed where the file `killed` is not there."""
    command = [sys.executable, EXAMPLE, "2", "diffusion_nft", "--cpu", *SETTINGS, "--output_dir", folder / name]
    environment = os.environ | {"KILLED": str(folder / "killed"), "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return load_file(folder / name / "pytorch_lora_weights.safetensors")


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_nothing(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    disturbed = run(tmp_path, "disturbed")
    assert (tmp_path / "killed").exists()
    undisturbed = run(tmp_path, "undisturbed")
    assert disturbed.keys() == undisturbed.keys()
    assert all(torch.equal(value, undisturbed[name]) for name, value in disturbed.items())
    assert list((tmp_path / "ray" / "disturbed").glob("checkpoint_*"))
