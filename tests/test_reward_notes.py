"""What rewards note by `log_metric` and `log_extra`: nothing of the run's is overwritten, nothing odd is kept."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from flowrl_trainers.rewards import as_rewards
from flowrl_trainers.sampling.prompt_groups import Example, ImageKey
from flowrl_trainers.sampling.reward_notes import OWN_NAMES
from flowrl_trainers.sampling.scoring import call_rewards

from .helpers import TRAINERS, make_trainer

HELD_OUT = Dataset.from_dict({"prompt": ["a red circle"] * 2})


def call(judge, log_metric=None, log_extra=None):
    examples = [Example(ImageKey(row, 0, 0), "a red circle", {}) for row in range(2)]
    context = {"trainer_state": None, "log_metric": log_metric, "log_extra": log_extra}
    return call_rewards(as_rewards([judge]), torch.zeros(2, 3, 4, 4), examples, **context)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_name_that_a_run_logs_is_its_own(tmp_path, trainer):
    t = make_trainer(trainer, tmp_path, max_steps=2, eval_dataset=HELD_OUT)
    t.train()
    t.evaluate()
    logged = {name for row in t.state.log_history for name in row}
    assert len(logged) > 10
    assert [name for name in logged if not OWN_NAMES.fullmatch(name)] == []
    assert [name for name in t.rows["tuned"] if not OWN_NAMES.fullmatch(name)] == []


@pytest.mark.parametrize("name", ["loss", "reward", "learning_rate", "reward/judge", "eval_reward/judge", "diversity"])
def test_a_metric_of_the_runs_own_name_is_refused(name):
    def judge(images, prompts, log_metric, **columns):
        log_metric(name, 3.0)
        return [0.0, 1.0]

    with pytest.raises(ValueError, match=f"'judge' logs a metric called '{name}', which the run logs itself"):
        call(judge)


@pytest.mark.parametrize(("name", "value", "sentence"), [
    ("words", "x", "Reward 'judge' logs 'x' as metric 'words': log a number."),
    ("words", None, "Reward 'judge' logs None as metric 'words': log a number."),
    ("words", [1.0], r"Reward 'judge' logs \[1.0\] as metric 'words': log a number."),
    ("words", 1j, "Reward 'judge' logs 1j as metric 'words': log a number."),
    ("words", torch.zeros(2), "as metric 'words': log a number."),
    (3, 1.0, "Reward 'judge' calls `log_metric` with the name 3: pass a text."),
    (" ", 1.0, "Reward 'judge' calls `log_metric` with the name ' ': pass a text."),
])  # fmt: skip
def test_a_metric_is_a_number_with_a_name(name, value, sentence):
    def judge(images, prompts, log_metric, **columns):
        log_metric(name, value)
        return [0.0, 1.0]

    with pytest.raises(ValueError, match=sentence):
        call(judge)


@pytest.mark.parametrize("value", [1, 2.5, True, float("nan"), np.float32(1), torch.tensor(3), np.array(4)])
def test_numbers_of_all_kinds_are_kept(value):
    kept = []

    def judge(images, prompts, log_metric, log_extra, **columns):
        log_metric("words", value)
        log_extra("lengths", (1, 2))
        return [0.0, 1.0]

    call(judge, lambda *note: kept.append(note), lambda *note: kept.append(note))
    np.testing.assert_equal(kept, [("words", float(value)), ("lengths", [1, 2])])


@pytest.mark.parametrize("values", [[1], [1, 2, 3], "ab", 7, None])
def test_extras_are_one_per_picture(values):
    def judge(images, prompts, log_extra, **columns):
        log_extra("lengths", values)
        return [0.0, 1.0]

    with pytest.raises(ValueError, match="as 'lengths' for 2 images: pass a list with one value per image"):
        call(judge)


@pytest.mark.parametrize("scores", [torch.zeros(2, dtype=torch.complex64), [1j, 0.0], np.array([1j, 2])])
def test_complex_scores_are_refused(scores):
    def judge(images, prompts, **columns):
        return scores

    with pytest.raises(ValueError, match=r"Reward 'judge' returned .*return one score per image"):
        call(judge)


def test_two_rewards_may_note_one_name_for_pictures_of_their_own(tmp_path, tiny_pipeline):
    """Each for the prompts that name it, in batches of two; what stands beside a picture is said of that picture."""

    def of(name):
        def judge(images, prompts, log_extra, **columns):
            log_extra("said", [f"{name} of {prompt}" for prompt in prompts])
            return [0.5] * len(images)

        return judge

    prompts, named = ["a cat", "a dog", "a fox", "an owl"], [["one"], ["two"], ["two"], ["one"]]
    rows = Dataset.from_dict({"prompt": prompts, "task": named})
    t = make_trainer(
        "ACFlowTrainer", tmp_path, tiny_pipeline, reward={name: of(name) for name in ("one", "two")}, dataset=rows,
        rewards_column="task", per_device_eval_batch_size=2,
    )  # fmt: skip
    _, tuned = t.pictures(rows, 4)
    assert tuned.extra == {"said": [f"{name} of {p}" for p, (name,) in zip(tuned.prompts, named, strict=True)]}
