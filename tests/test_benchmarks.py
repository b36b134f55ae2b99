"""The documented commands of `benchmarks/` run, on fewer pictures."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from .helpers import TRAINERS, make_trainer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def run(monkeypatch):
    """Run a script in this process, as `python benchmarks/NAME.py ARGUMENTS` does."""

    def in_this_process(name: str, *arguments: str) -> None:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / f"{name}.py"), *arguments])
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")

    return in_this_process


def test_the_truncation_table_is_measured(run, tmp_path):
    """Calls: 20 of the rollout, K of the loss, K - 1 products and one base velocity of the adjoint."""
    run("adjoint_steps", "--updates", "1", "--images", "1", "--threads", "1", "--out", str(tmp_path / "table.md"))
    table = (tmp_path / "table.md").read_text()
    assert "| 3 of 20 |" in table
    assert [row.split("|")[-2].strip() for row in table.splitlines()[2:4]] == ["26", "60"]


@pytest.mark.parametrize("name", TRAINERS)
def test_the_calls_that_are_measured_are_those_that_updates_make(monkeypatch, tmp_path, name):
    """In the second update; the first also looks for the scale of the reward."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from overhead import stated_calls
    from stepped import SteppedRun, counting

    t = make_trainer(name, tmp_path, **({"critic_warmup_max_steps": 0} if name == "ACFlowTrainer" else {}))
    run = SteppedRun(t)
    run.update()
    with counting(t) as made:
        run.update()
    run.close()
    assert made == stated_calls(t, needed=False)
    assert made - stated_calls(t, needed=True) == ({("score", 4): 1} if name == "VGGFlowTrainer" else {})


@pytest.mark.slow
def test_critics_are_compared(run, tmp_path):
    few = "--prompts", "4", "--held_out", "4", "--explainable", "2", "--seconds", "1"
    run("critics", *few, "--out", str(tmp_path / "table.md"))
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("| critic | seconds | updates | sigma 0.9 |")
    assert [row.split("|")[1].strip() for row in table.splitlines()[2:]] == [
        "*what could be explained*", "mean reward of 6 continuations", "reward of the estimate", "convolutional",
        "convolutional", "backbone", "backbone",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_overhead_is_measured(run, tmp_path):
    """The script fails where a trainer makes other calls than it needs; its times depend on the machine."""
    files = "--out", str(tmp_path / "table.md"), "--json", str(tmp_path / "overhead.json")
    run("overhead", "--repeats", "1", "--images", "2", "--steps", "6", "12", *files)
    report = json.loads((tmp_path / "overhead.json").read_text())
    for name in ("adjoint_matching", "vgg_flow", "ac_flow", "ac_flow, fixed target", "diffusion_nft", "tafs_grpo"):
        assert 0 < report[name]["overhead_ratio"] <= report[name]["upper_quartile"]
    assert report["adjoint_matching"]["peak_mib_12"] <= 1.05 * report["adjoint_matching"]["peak_mib_6"]
    assert "| vgg_flow |" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_the_savings_are_measured(run, tmp_path):
    """Two trainers, one update of each variant; its times depend on the machine."""
    trainers = "--trainers", "AdjointMatching", "ACFlow"
    run("savings", "--repeats", "1", "--micro_batch", "4", *trainers, "--out", str(tmp_path / "table.md"))
    table = (tmp_path / "table.md").read_text()
    assert table.count("| 1.00 |") >= 2  # what nothing was changed in
    assert "`merge_adapter`" in table
    assert "`prefix_pool_size`" in table
    assert "| `cache_encoded_prompts` | making the trainer |" in table


@pytest.mark.slow
def test_a_cached_prefix_is_compared(run, tmp_path):
    """One update with a pool of its own images, and one without."""
    few = "--seeds", "0", "--updates", "1", "--every", "1", "--pools", "0", "16", "--steps", "5"
    run("cached_prefix", *few, "--out", str(tmp_path / "table.md"))
    table = (tmp_path / "table.md").read_text()
    assert "| no pool | 0 of 1 |" in table
    assert "| pool of 16 | 0 of 1 |" in table
