"""No run mixes its files with those of another: a folder in use is refused, or what lies there is moved aside."""

import json
import re

import pytest
import yaml

from flowrl_trainers.cli import main
from flowrl_trainers.run_folder.earlier_run import ADAPTER, files_of_a_run
from flowrl_trainers.trainers import checkpointed_trainer

from .helpers import adjoint_matching
from .tiny import tiny_sd3


def trainer(folder, updates=1, **settings):
    return adjoint_matching(folder, tiny_sd3(), max_steps=updates, learning_rate=0.1, **settings)


SAVED = dict(save_strategy="steps", save_steps=1)


@pytest.mark.parametrize("left", ["checkpoint-1", ADAPTER, "transformer"])
def test_a_new_run_in_the_folder_of_another_is_refused(tmp_path, left):
    """Before a picture is drawn, and again when the same cell of a notebook is run once more."""
    out = tmp_path / "out"
    (out / left).mkdir(parents=True)
    (out / "config.yaml").touch()
    t, pictures = trainer(out), []
    t.probe = lambda: pictures.append(1)
    sentence = (
        rf"`output_dir` \({out}\) holds {left} of an earlier run, and nobody .*: choose another `output_dir`, or set "
        rf"`overwrite_output_dir=True`, which moves the earlier files to {out}\.before-1\.$"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=sentence):
            t.train()
    assert not pictures


def test_the_transformer_of_a_base_model_is_no_earlier_run(tmp_path):
    (tmp_path / "transformer").mkdir()
    assert trainer(tmp_path).train().global_step == 1


def test_an_earlier_run_is_moved_aside_and_the_files_of_the_user_stay(tmp_path):
    out, notes = tmp_path / "out", tmp_path / "out" / "notes.txt"
    first = trainer(out, **SAVED)
    first.train()
    first.save_model()
    notes.write_text("mine")
    before = {path.name: path.stat().st_ino for path in files_of_a_run(out)}
    with pytest.raises(
        ValueError, match=r"holds .* and checkpoint-1 of .*pass `resume_from_checkpoint=True` to go on"
    ):
        trainer(out).train()
    for number in (1, 2):
        again = trainer(out, overwrite_output_dir=True, **SAVED)
        again.train()
        again.save_model()
        moved = {path.name: path.stat().st_ino for path in (tmp_path / f"out.before-{number}").iterdir()}
        assert moved == before
        before = {path.name: path.stat().st_ino for path in files_of_a_run(out)}
    assert notes.read_text() == "mine"
    assert "overwrite_output_dir" not in yaml.safe_load((out / "config.yaml").read_text())  # which can be run again


def test_one_trainer_may_train_twice_and_save_and_evaluate_in_between(tmp_path):
    """Its second training is no continuation of the first: what the first saved is moved aside, and its log stays."""
    out = tmp_path / "out"
    t = trainer(out, 2, **SAVED)
    t.train()
    t.save_model()
    t.args.max_steps = 1
    t.train()
    t.save_model()
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    moved = [path.name for path in (tmp_path / "out.before-1").iterdir()]
    assert sorted(moved) == ["checkpoint-1", "checkpoint-2"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 1]
    t.args.max_steps = 2
    t.evaluate(["a cat"])
    t.train(resume_from_checkpoint=True)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 1, 2]
    assert sum("eval_reward/redness" in row for row in rows) == 1


def test_processes_that_find_different_checkpoints_say_so(tmp_path, monkeypatch):
    """As where each machine has a disk of its own; the other process is pretended."""
    t = trainer(tmp_path, **SAVED)
    t.train()
    monkeypatch.setattr(type(t.args), "world_size", 2)
    found = {"checkpoint-1": ["checkpoint-1"]}
    monkeypatch.setattr(checkpointed_trainer, "gather_object", lambda mine: [*mine, *found[mine[0]]])
    monkeypatch.setattr(
        checkpointed_trainer, "checkpoint_to_resume", lambda folder, wanted: (tmp_path / "checkpoint-1", {})
    )
    assert t._find_checkpoint(True) == tmp_path / "checkpoint-1"
    found["checkpoint-1"] = [None]
    with pytest.raises(ValueError, match=r"find different checkpoints to resume from \(None, checkpoint-1\): let"):
        t._find_checkpoint(True)


def test_a_checkpoint_that_is_a_link_is_gone_on_from(tmp_path):
    out = tmp_path / "out"
    trainer(out, **SAVED).train()
    (out / "checkpoint-1").rename(tmp_path / "checkpoint-1")
    (out / "checkpoint-1").symlink_to(tmp_path / "checkpoint-1")
    assert trainer(out, 2, **SAVED).train(resume_from_checkpoint=True).global_step == 2
    (tmp_path / "latest").symlink_to(out / "checkpoint-2")
    t = trainer(out, 3, overwrite_output_dir=True, **SAVED)
    assert t.train(resume_from_checkpoint=str(tmp_path / "latest")).global_step == 3
    assert not list(tmp_path.glob("*.before-*"))


def test_a_run_that_is_resumed_stays_where_it_is(tmp_path):
    trainer(tmp_path, **SAVED).train()
    for updates, resume in ((2, True), (3, "auto"), (4, str(tmp_path / "checkpoint-3"))):
        t = trainer(tmp_path, updates, overwrite_output_dir=True, **SAVED)
        assert t.train(resume_from_checkpoint=resume).global_step == updates
    assert not list(tmp_path.parent.glob("*.before-*"))


def test_a_checkpoint_from_elsewhere_does_not_make_a_folder_in_use_free(tmp_path):
    trainer(tmp_path / "first", **SAVED).train()
    trainer(tmp_path / "second", **SAVED).train()
    with pytest.raises(ValueError, match="holds checkpoint-1 of an earlier run"):
        trainer(tmp_path / "second", 2).train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))


def test_a_killed_second_run_never_goes_on_from_the_first(tmp_path):
    """`auto` refuses the first run's checkpoint by its settings, and its adapter where there is no checkpoint."""
    first = trainer(tmp_path / "out", **SAVED)
    first.train()
    with pytest.raises(ValueError, match=r"was saved with seed 42, but this run has 7"):
        trainer(tmp_path / "out", seed=7).train(resume_from_checkpoint="auto")
    second = trainer(tmp_path / "out", 2, seed=7, overwrite_output_dir=True, **SAVED)

    def killed(*_, **__):
        raise SystemExit  # nothing is kept, as after SIGKILL

    second.micro_batch_losses = killed
    with pytest.raises(SystemExit):
        second.train()
    resumed = trainer(tmp_path / "out", seed=7, **SAVED)
    assert resumed.train(resume_from_checkpoint="auto").global_step == resumed._counter.updates == 1
    resumed.save_model()
    first.save_model(str(tmp_path / "of the first"))
    assert (tmp_path / "out" / ADAPTER).read_bytes() != (tmp_path / "of the first" / ADAPTER).read_bytes()

    (tmp_path / "trained").mkdir()
    (tmp_path / "out" / ADAPTER).rename(tmp_path / "trained" / ADAPTER)
    with pytest.raises(ValueError, match=f"holds {ADAPTER} of an earlier run"):
        trainer(tmp_path / "trained").train(resume_from_checkpoint="auto")


def test_a_folder_that_cannot_be_moved_is_named(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-1").mkdir()

    def full(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("flowrl_trainers.run_folder.earlier_run.shutil.move", full)
    with pytest.raises(
        ValueError, match=r"cannot be moved from .* \(Permission denied\): choose another `output_dir`"
    ):
        trainer(tmp_path, overwrite_output_dir=True).train()


def test_the_command_line_refuses_it_before_the_model_is_loaded(tmp_path, capsys):
    (tmp_path / "checkpoint-1").mkdir()
    arguments = ["adjoint_matching", "--model", "no/such-model", "--dataset", "shapes", "--reward_funcs", "shapes"]
    assert main([*arguments, "--output_dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"flowrl: `output_dir` \(.*\) holds checkpoint-1 of an earlier run, .*\n", said)
