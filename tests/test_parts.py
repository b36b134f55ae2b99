"""The parts that trainers have, each alone: records and their buffer, a network's warm-up, the log of numbers, the
meters of an evaluation.
"""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from flowrl_trainers.networks.warmup import PATIENCE, RISE, Warmup
from flowrl_trainers.rewards import CheckerReward, FunctionReward
from flowrl_trainers.sampling.buffer import MicroBatch, Record, RolloutBuffer
from flowrl_trainers.sampling.draws import ImageKey
from flowrl_trainers.sampling.meters import DiversityMeter, RewardMeter, StatisticsMeter
from flowrl_trainers.sampling.metric_log import MetricLog
from flowrl_trainers.sampling.prompt_groups import Example

from .gaussian import height
from .runs import assert_same

# ---- records --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner(Record):
    weights: Tensor
    deepest: "Inner | None" = None


@dataclass(frozen=True)
class Outer(Record):
    states: Tensor
    inner: Inner | None
    anchors: Tensor | None


def record(first: float = 0.0, count: int = 2) -> Outer:
    values = torch.arange(count) + first
    return Outer(values[:, None].expand(-1, 3).clone(), Inner(values + 10, Inner(values + 20)), None)


RECORDS = {
    "nested twice, with None": record(),
    "no inner one": Outer(torch.ones(2, 3), None, torch.zeros(2, 3)),
    "an inner one without another": Outer(torch.ones(2, 3), Inner(torch.ones(2)), torch.zeros(2)),
}


@pytest.mark.parametrize("example", RECORDS.values(), ids=RECORDS)
def test_a_record_comes_back_from_its_dictionary(tmp_path, example):
    """Through a file too, which is read without running code."""
    again = Outer.from_dict(example.to_dict())
    torch.save(example.to_dict(), tmp_path / "record.pt")
    read = Outer.from_dict(torch.load(tmp_path / "record.pt", weights_only=True))
    for found in (again, read):
        assert type(found.inner) is type(example.inner)
        assert_same(found.to_dict(), example.to_dict())
        assert len(found.tensors()) == len(example.tensors())


def test_a_change_reaches_every_tensor_of_a_record_and_leaves_none_as_it_is():
    before = record()
    after = before.map(lambda value: value + 1)
    assert [float(value.flatten()[0]) for value in before.tensors()] == [0, 10, 20]
    assert [float(value.flatten()[0]) for value in after.tensors()] == [1, 11, 21]
    assert after.anchors is None
    assert after.inner.deepest.deepest is None


def examples(count: int, rollout: int = 0) -> list[Example]:
    return [Example(ImageKey(i, 0, rollout), f"prompt {i}", {"number": i}) for i in range(count)]


def batch(first: float = 0.0, count: int = 2) -> MicroBatch[Outer]:
    return MicroBatch(examples(count), record(first, count), torch.ones(count, dtype=torch.bool))


def test_an_image_with_anything_not_finite_is_left_out_and_zeroed_in_every_tensor():
    spoiled = batch()
    spoiled.record.inner.deepest.weights[1] = math.inf
    kept = spoiled.zero_not_finite()
    assert kept.good.tolist() == [True, False]
    assert all(bool((value[1] == 0).all()) for value in kept.record.tensors())
    assert [float(value[0].flatten()[0]) for value in kept.record.tensors()] == [0, 10, 20]
    assert spoiled.record.inner.deepest.weights[1] == math.inf  # the batch itself is left as it was


def test_an_image_that_was_left_out_stays_out():
    first = batch().with_record(record(), torch.tensor([True, False]))
    assert first.with_record(record(), torch.tensor([True, True])).good.tolist() == [True, False]


# ---- the buffer -----------------------------------------------------------------------------------------------------


def buffer(steps_used: int) -> RolloutBuffer[Outer]:
    """Of two micro-steps, each rollout used twice; filled anew whenever it is used up."""
    made: RolloutBuffer[Outer] = RolloutBuffer(Outer, micro_steps=2, passes=2)
    for step in range(steps_used):
        if made.needs_rollout:
            made.batches = [batch(100.0 * step), batch(100.0 * step + 1)]
        made.take()
    return made


def test_a_rollout_is_used_as_often_as_asked_before_the_next_is_due():
    made = buffer(0)
    due, fresh, taken = [], [], []
    for step in range(8):
        due.append(made.needs_rollout)
        if made.needs_rollout:
            made.batches = [batch(100.0 * step), batch(100.0 * step + 1)]
        taken.append(float(made.take().record.states[0, 0]))
        fresh.append(made.is_at_first)
    assert due == fresh == [True, False, False, False] * 2
    assert taken == [0, 1, 0, 1, 400, 401, 400, 401]


def test_nothing_is_taken_from_an_empty_rollout_but_its_steps_pass():
    made = RolloutBuffer(Outer, micro_steps=2, passes=1)
    assert [made.take() for _ in range(2)] == [None, None]
    assert made.step == 2
    assert made.needs_rollout


@pytest.mark.parametrize("used", [1, 2, 3, 5])
def test_a_buffer_goes_on_from_its_state(tmp_path, used):
    """In the middle of a window: with the same images, in the same order, and those left out still left out."""
    made = buffer(used)
    made.batches[0].good[1] = False
    torch.save(made.state_dict(), tmp_path / "buffer.pt")
    again: RolloutBuffer[Outer] = RolloutBuffer(Outer, micro_steps=2, passes=2)
    again.load_state_dict(
        torch.load(tmp_path / "buffer.pt", weights_only=True),
        lambda key: Example(key, f"prompt {key.row}", {"number": key.row}),
    )
    while not made.needs_rollout:
        mine, theirs = made.take(), again.take()
        assert mine.examples == theirs.examples
        assert_same(mine.record.to_dict(), theirs.record.to_dict())
        assert torch.equal(mine.good, theirs.good)
    assert again.needs_rollout


def test_a_rollout_that_is_used_up_is_not_kept():
    state = buffer(4).state_dict()
    assert state == {"step": 4, "batches": []}


# ---- the warm-up of a network ---------------------------------------------------------------------------------------


def rollouts_until_its_end(most: int, explained: list[float | None]) -> int | None:
    warmup = Warmup(most)
    for number, value in enumerate(explained):
        if not warmup.running:
            return number
        warmup.observe(value)
    return None if warmup.running else len(explained)


@pytest.mark.parametrize(("explained", "rollouts"), [
    ([0.2, 0.3, 0.4, 0.5] + [0.5] * PATIENCE, 4 + PATIENCE),  # no longer rises
    ([0.2] + [0.2 + RISE / 2] * PATIENCE, 1 + PATIENCE),  # too little to count
    ([0.2, 0.2, 0.2, 0.3, 0.3, 0.3], None),  # rose again in time
    ([0.0] * 20, None),  # has not begun
    ([-1.0] * 20, None),
    ([0.2, None, None, None, None], None),  # rollouts that tell nothing do not count
])  # fmt: skip
def test_a_warm_up_ends_where_the_explained_variance_no_longer_rises(explained, rollouts):
    assert rollouts_until_its_end(100, explained) == rollouts


def test_a_warm_up_lasts_no_longer_than_asked():
    assert rollouts_until_its_end(3, [0.0] * 9) == 4  # three rollouts train the network alone, the fourth no more
    assert rollouts_until_its_end(3, [None] * 9) == 4
    assert not Warmup(0).running


def test_a_warm_up_goes_on_from_its_state():
    values = [0.1, 0.3, 0.3, None, 0.3, 0.3, 0.3]
    for saved in range(len(values)):
        whole, again = Warmup(9), Warmup(9)
        for value in values[:saved]:
            whole.observe(value)
        again.load_state_dict(whole.state_dict())
        for value in values[saved:]:
            whole.observe(value)
            again.observe(value)
        assert vars(again) == vars(whole)
    assert not whole.running


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_what_was_noted_is_logged_as_a_mean_and_then_forgotten():
    log = MetricLog()
    for value in (1.0, torch.tensor(2.0), 6):
        log.note("loss", value)
    log.note("once", True)
    with log.timed("rollout"):
        pass
    means = log.means()
    assert 0 <= means.pop("seconds/rollout") < 1
    assert means == {"loss": 3.0, "once": 1.0}
    assert log.means().keys() == {"loss", "once", "seconds/rollout"}  # until it is cleared
    log.clear()
    assert log.means() == {}


def test_a_log_goes_on_from_its_state():
    log, again = MetricLog(), MetricLog()
    log.note("loss", 1.0)
    again.note("another", 5.0)
    again.load_state_dict(copy.deepcopy(log.state_dict()))  # as through a file
    again.note("loss", 3.0)
    assert again.means() == {"loss": 2.0}
    assert log.means() == {"loss": 1.0}


# ---- meters ---------------------------------------------------------------------------------------------------------

CHECKER, HEIGHT = CheckerReward(), FunctionReward(height)


def rows(*prompts: str) -> list[Example]:
    return [Example(ImageKey(i, 0, 0), prompt, {}) for i, prompt in enumerate(prompts)]


def test_rewards_are_means_over_the_rows_that_have_a_score():
    meter = RewardMeter([HEIGHT, CHECKER])
    meter.add(rows("a", "b"), torch.zeros(2, 3, 2, 2), torch.tensor([[1.0, 1.0], [math.nan, 0.0]]))
    meter.add(rows("c"), torch.zeros(1, 3, 2, 2), torch.tensor([[math.inf, 1.0]]))
    meter.add(rows("d"), torch.zeros(1, 3, 2, 2), torch.tensor([[3.0, 1.0]]))
    name = CheckerReward.name
    assert meter.row() == {"reward/height": 2.0, f"reward/{name}": 0.75, "checker_accuracy": 0.75}
    expected = torch.tensor([1.0, math.nan, math.nan, 3.0], dtype=torch.float64)
    torch.testing.assert_close(meter.by_reward["height"], expected, equal_nan=True)


def test_statistics_are_of_pictures_alone():
    meter = StatisticsMeter()
    meter.add(rows("a"), torch.zeros(1, 3), torch.zeros(1, 1))
    assert meter.row() == {}
    board = ((torch.arange(8)[:, None] + torch.arange(8)) % 2).float().expand(1, 3, 8, 8)
    meter.add(rows("a", "b"), torch.cat([board, torch.zeros(1, 3, 8, 8)]), torch.zeros(2, 1))
    assert meter.row() == {"edge_density": 0.5, "colour_entropy": 0.5}  # the means of 1 and 0


def pictures(*levels: float) -> Tensor:
    """Grey: the distance of two is the difference of their levels."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 2, 2)


def test_diversity_is_a_mean_over_prompts_of_the_distance_of_their_pictures():
    """Whatever the batches; a prompt with one picture has none."""
    asked = rows("a", "a", "a", "b", "b", "c")
    levels = (0.0, 0.3, 0.6, 0.1, 0.2, 0.9)
    for size in (1, 2, 6):
        meter = DiversityMeter([HEIGHT], asked)
        for start in range(0, 6, size):
            part = slice(start, start + size)
            meter.add(asked[part], pictures(*levels[part]), torch.zeros(len(asked[part]), 1))
        assert meter.row()["diversity"] == pytest.approx((0.4 + 0.1) / 2)
        assert meter.kept == {}


def test_a_picture_that_the_checker_rejects_is_no_variety():
    asked = rows("a", "a", "a", "b", "b")
    meter = DiversityMeter([HEIGHT, CHECKER], asked)
    accepted = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    meter.add(asked, pictures(0.0, 0.9, 0.2, 0.5, 0.6), accepted)
    assert meter.row()["diversity"] == pytest.approx(0.2)
    nobody = DiversityMeter([HEIGHT, CHECKER], asked)
    nobody.add(asked, pictures(0.0, 0.9, 0.2, 0.5, 0.6), torch.zeros(5, 2))
    assert nobody.row() == {}


def test_what_a_checkpoint_keeps_of_the_log_is_that_of_its_moment():
    log = MetricLog()
    log.note("loss", 1.0)
    kept = log.state_dict()
    log.note("loss", 2.0)
    assert kept == {"loss": [1.0]}
