"""One thread, no network, and the pipelines that many tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from flowrl_trainers.shapes import load_pipeline

from .tiny import tiny_sd3


@pytest.fixture(autouse=True)
def _one_thread():
    # Two threads of two jobs on two cores wait for each other: ten times slower.
    torch.set_num_threads(1)


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
