"""No network, one thread or as many as `FLOWRL_TEST_THREADS` says, and the pipelines that many tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = os.environ.get("FLOWRL_TEST_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import json
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from huggingface_hub.utils import _cache_assets
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from flowrl_trainers.rewards import AestheticReward, CLIPScore, HPSv2, ImageReward, PickScore, remote
from flowrl_trainers.rewards.convert_image_reward import convert_checkpoint
from flowrl_trainers.shapes import load_pipeline
from flowrl_trainers.shapes.models import new_tokenizer

from .reward_servers import start, stop, wait_for
from .runs import free_port
from .tiny import tiny_sd3
from .tiny_image_reward import official_checkpoint, tiny_blip, write_tokenizer
from .tiny_rewards import JOINT, OpenCLIP, clip_config, vision_settings, write_clip, write_processor

# Files of a minute or more, before the others, so that the two processes of `make test` end at about the same time.
LONG = ("test_evaluate", "test_resume", "test_two_processes", "test_cli", "test_families", "test_control")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True)
def _threads():
    # Two threads of two jobs on two cores wait for each other: ten times slower.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def default_value_network():
    """Asked for by tests of the value network's own size."""


@pytest.fixture(autouse=True)
def _small_value_network(request, monkeypatch):
    """VGG-Flow's default one is 20 MB large, five times the tiny pipelines: its tests would take thrice as long."""
    if "default_value_network" not in request.fixturenames:
        monkeypatch.setattr(import_module("flowrl_trainers.networks.value_network"), "WIDTHS", (32, 32))


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """The folder, below that of the test, in which runs keep what the next one need not compute."""
    monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets"


@pytest.fixture(scope="session")
def shared_shapes():
    """The shipped pipeline; not to be changed."""
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def shapes_pipeline():
    """A shipped pipeline of the test's own."""
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def tiny_pipeline():
    """A random Stable Diffusion 3 pipeline with two different CLIPs and a T5."""
    return tiny_sd3()


# ---- rewards --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"), seed=0)


@pytest.fixture(scope="session")
def hps(tmp_path_factory):
    """A checkpoint as `HPS_v2.1_compressed.pt` is laid out, and the network that it was written from."""
    folder = tmp_path_factory.mktemp("hps")
    torch.manual_seed(1)
    network = OpenCLIP(len(new_tokenizer())).eval().requires_grad_(False)
    for parameter in network.parameters():  # biases and norms at 0 and 1 would hide that they were mixed up
        parameter += 0.1 * torch.randn_like(parameter)
    torch.save({"epoch": 1, "state_dict": network.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    write_processor(folder)
    return folder, network


@pytest.fixture(scope="session")
def aesthetic(tmp_path_factory):
    """A checkpoint as on the Hub: the tower, LAION's layers as `layers.N`, a configuration of a type that transformers
    does not know.
    """
    folder = tmp_path_factory.mktemp("aesthetic")
    torch.manual_seed(2)
    tower = (
        CLIPVisionModelWithProjection(CLIPVisionConfig(**vision_settings("quick_gelu"))).eval().requires_grad_(False)
    )
    widths = [JOINT, 1024, 128, 64, 16, 1]
    layers = [(torch.randn(b, a) / a**0.5, torch.randn(b)) for a, b in pairwise(widths)]
    tensors = tower.state_dict()
    for number, (weight, bias) in zip((0, 2, 4, 6, 7), layers, strict=True):
        tensors |= {f"layers.{number}.weight": weight, f"layers.{number}.bias": bias}
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    config = tower.config.to_dict() | {
        "model_type": "aesthetics_predictor",
        "architectures": ["AestheticsPredictorV2Linear"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_processor(folder)
    return folder, tower, layers


@pytest.fixture(scope="session")
def image_reward(tmp_path_factory):
    """The tensors of a checkpoint as `ImageReward.pt` is laid out, and the folder that it was converted to."""
    tensors, folder = official_checkpoint(), tmp_path_factory.mktemp("image_reward")
    torch.save(tensors, folder / "ImageReward.pt")
    convert_checkpoint(folder / "ImageReward.pt", folder, tiny_blip())
    write_tokenizer(folder)
    return folder, tensors


@pytest.fixture
def make_reward(clip, hps, image_reward, aesthetic):
    """Each differentiable reward by name, in a dtype."""
    return {
        "clip_score": lambda dtype: CLIPScore(clip, dtype=dtype),
        "pickscore": lambda dtype: PickScore(clip, clip, dtype=dtype),
        "hpsv2": lambda dtype: HPSv2(hps[0], hps[0], dtype=dtype, architecture=clip_config("gelu")),
        "image_reward": lambda dtype: ImageReward(image_reward[0], image_reward[0], dtype=dtype),
        "aesthetic": lambda dtype: AestheticReward(aesthetic[0], dtype=dtype),
    }


@pytest.fixture(scope="session")
def reward_server(tmp_path_factory):
    """The address of `served.by_prompt` in a process of its own."""
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    process = start(
        folder,
        "served.by_prompt",
        port,
        "--max_batch",
        "4",
        "--max_pixels",
        "4096",
        "--max_bytes",
        "40000",
        "--device",
        "cpu",
    )
    try:
        wait_for(process, f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
        assert process.is_alive(), "the server did not live through the tests"
    finally:
        stop(process)


@pytest.fixture
def quick_retries(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
