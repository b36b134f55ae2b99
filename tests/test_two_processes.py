"""Two processes make the same groups, rollouts and update as one. For every trainer; among the slow tests also where
`accelerate launch` starts them itself, as `tests/test_cli.py` and `tests/test_signals.py` have it among the others.
"""

import pytest
import torch

from .helpers import FIXED_TARGET, FORMS
from .runs import assert_same, fork_two, launch, run

CONFIG = {
    "per_device_train_batch_size": 1,
    "num_generations": 2,
    "max_steps": 2,
    "save_strategy": "no",
    "optim": "sgd",
    "learning_rate": 1.0,
}
# Those that take no gradient compare the pictures of a prompt too, which two processes share: see `groupwise`.
COMPARED = ["ACFlowTrainer", FIXED_TARGET, "DiffusionNFTTrainer", "TAFSGRPOTrainer"]


@pytest.mark.parametrize(
    ("trainer", "launched"),
    [
        *((form, False) for form in FORMS),
        pytest.param("AdjointMatchingTrainer", True, marks=pytest.mark.slow),
    ],
    ids=[*FORMS, "launched"],
)
def test_two_processes_equal_one(tmp_path, trainer, launched):
    # Dropout draws from a generator of the process, so it is off here.
    compared = {"groupwise": True, "num_generations": 4} if trainer in COMPARED else {}
    same = CONFIG | compared | {"lora_dropout": 0.0}
    one = run(tmp_path / "one", trainer, same | {"gradient_accumulation_steps": 4})
    assert one.returncode == 0, one.stderr
    changed = same | {"gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    two = tmp_path / "two"
    for process in [launch(two, trainer, changed, 2)] if launched else fork_two(two, trainer, changed):
        assert process.returncode == 0, process.stderr
    results = [torch.load(tmp_path / name / "result.pt") for name in ("one", "two")]
    assert [r["world_size"] for r in results] == [1, 2]
    assert [r["wrapper"] for r in results] == ["FlowModel", "DistributedDataParallel"]
    # The first rollout and its scores, before anything was summed in another order, are equal to the last bit.
    whole, first, second = (
        [torch.load(tmp_path / folder / f"{what}_{rank}.pt")[0] for what in ("rollout", "scores")]
        for folder, rank in (("one", 0), ("two", 0), ("two", 1))
    )
    assert_same(whole[0], first[0] + second[0])
    assert_same(whole[1], torch.cat([first[1], second[1]]))
    assert len(whole[0]) == len(whole[1]) == 4
    if trainer in COMPARED:
        assert whole[1].shape == (4, 2)
        assert len(set(whole[1][:, 1].tolist())) == 4  # four pictures of one prompt, two on each process
    for name, weight in results[0]["weights"].items():
        torch.testing.assert_close(results[1]["weights"][name], weight, atol=2e-6, rtol=1e-5)
    for name in ("reward/redness", "brightness"):  # the latter is logged by the reward itself
        logged = [[row[name] for row in r["history"] if name in row] for r in results]
        assert len(logged[0]) > 0
        assert logged[0] == pytest.approx(logged[1], abs=1e-6)
    # What an evaluation finds, and what the rewards log in it, is the same everywhere: of all rows.
    alone, first, second = (
        torch.load(tmp_path / name) for name in ("one/evaluation_0.pt", "two/evaluation_0.pt", "two/evaluation_1.pt")
    )
    assert first == second
    assert "eval_brightness" in first
    assert first == pytest.approx(alone, abs=1e-5)
