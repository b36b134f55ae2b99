"""Which settings a resumed run may change: those that are named free, and each of them without any effect on what is
learned; a change of any other is refused by its name.
"""

import copy
import shutil
from dataclasses import fields
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset
from safetensors.torch import load_file
from transformers.utils import logging

from flowrl_trainers import ACFlowConfig, AdjointMatchingConfig, DiffusionNFTConfig, TAFSGRPOConfig, VGGFlowConfig
from flowrl_trainers.run_folder.checkpoints import write_manifest
from flowrl_trainers.run_folder.identity import FREE, FREE_FIELDS, identity, refuse_another_run
from flowrl_trainers.trainers.checkpointed_trainer import WEIGHTS
from flowrl_trainers.trainers.config_checks import UNSUPPORTED, alternatives, choices_of

from .helpers import FORMS, make_trainer, trainer_of
from .runs import assert_same

CONFIGS = [AdjointMatchingConfig, VGGFlowConfig, ACFlowConfig, DiffusionNFTConfig, TAFSGRPOConfig]

# ---- every field ----------------------------------------------------------------------------------------------------


class Parallel(ParallelismConfig):
    """accelerate's own has a `to_json` that returns None; no configuration of ours takes one."""

    def to_json(self):
        return {"tp_size": self.tp_size}


def another(value: Any, annotation: Any) -> Any:
    """A value that differs from `value`; where that is None, of the first kind that the annotation names beside it."""
    parts = [get_args(p)[0] if get_origin(p) is Annotated else p for p in alternatives(annotation)]
    choices = [choice for part in parts for choice in choices_of(part)]
    plain = value.value if isinstance(value, Enum) else value
    if choices:
        return next(choice for choice in choices if choice != plain)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str | list):
        return value + type(value)(["another"]) if isinstance(value, list) else value + "another"
    if value is not None:  # `accelerator_config`, whose own fields count
        (first, *_) = fields(value)
        changed = copy.copy(value)
        setattr(changed, first.name, another(getattr(value, first.name), first.type))
        return changed
    kind = next(part for part in parts if part is not NoneType)
    examples: dict[Any, Any] = {
        bool: True,
        int: 7,
        float: 0.25,
        str: "another",
        list: ["another"],
        dict: {"another": 1},
    }
    examples[ParallelismConfig] = Parallel(tp_size=2)
    return examples[get_origin(kind) or kind]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_is_free_or_its_change_is_refused_by_name(tmp_path, config):
    """Whatever fields a configuration has, now or in a later version of transformers: none is skipped."""
    args = config(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    hints, saved = get_type_hints(config, include_extras=True), identity(args)
    assert len(fields(config)) > 100
    for field in fields(config):
        changed = copy.copy(args)
        setattr(changed, field.name, another(getattr(args, field.name), hints[field.name]))
        assert getattr(changed, field.name) != getattr(args, field.name), field.name
        present = identity(changed)
        if field.name in FREE_FIELDS:
            assert present == saved, field.name
            refuse_another_run(saved, present, tmp_path)
            continue
        with pytest.raises(ValueError, match="a resumed run repeats") as refused:
            refuse_another_run(saved, present, tmp_path)
        assert str(refused.value) == (
            f"{tmp_path} was saved with {field.name} {saved[field.name]}, but this run has {present[field.name]}: a "
            "resumed run repeats the uninterrupted one only with the same."
        )


def test_every_free_setting_exists_and_is_named_once():
    known = {field.name for config in CONFIGS for field in fields(config)}
    assert known >= FREE_FIELDS
    assert sum(len(names) for names in FREE.values()) == len(FREE_FIELDS)


def test_a_setting_that_only_one_of_two_versions_has_is_refused_too(tmp_path):
    """Also where the other says None of it, which is what a new setting's default mostly is."""
    with pytest.raises(ValueError, match="was saved with new 1, but this run has None"):
        refuse_another_run({"new": 1}, {}, tmp_path)
    with pytest.raises(ValueError, match="was saved with new None, but this run has 1"):
        refuse_another_run({}, {"new": 1}, tmp_path)
    refuse_another_run({}, {"new": None}, tmp_path)


# ---- the free ones, in a run ----------------------------------------------------------------------------------------

# Two updates take one rollout, so that the checkpoint of the first update lies in the middle of a window.
RUN = {
    "per_device_train_batch_size": 2, "steps_per_generation": 2, "num_generations": 2, "learning_rate": 0.05,
    "max_steps": 1, "save_strategy": "steps", "save_steps": 1, "height": 16, "width": 16,
}  # fmt: skip
CHANGES: dict[str, Any] = {
    # where and how much is written; `output_dir` beside these
    "overwrite_output_dir": True, "run_name": "again", "project": "another", "report_to": "tensorboard", "trackio_space_id": "somebody/board",
    "trackio_bucket_id": "somebody/bucket", "trackio_static_space_id": "somebody/static", "log_level": "error",
    "log_level_replica": "error", "log_on_each_node": False, "logging_strategy": "epoch", "logging_first_step": True,
    "logging_steps": 2, "logging_nan_inf_filter": False, "disable_tqdm": False, "log_images": 1,
    "debug": "underflow_overflow", "skip_memory_metrics": False,
    # when it is saved and pushed
    "save_strategy": "epoch", "save_steps": 3, "save_total_limit": 5, "save_only_model": True,
    "hub_model_id": "somebody/model", "hub_strategy": "end", "hub_token": "a token",
    "hub_private_repo": True, "hub_always_push": True, "hub_revision": "main", "resume_from_checkpoint": "auto",
    "restore_callback_states_from_checkpoint": True,
    # when and how it is evaluated
    "do_train": True, "do_eval": True, "eval_strategy": "epoch", "eval_steps": 1, "eval_delay": 0.1,
    "eval_on_start": True, "per_device_eval_batch_size": 3, "eval_num_inference_steps": 2,
    "load_best_model_at_end": True, "metric_for_best_model": "eval_reward/redness", "greater_is_better": False,
    "ode_num_inference_steps": 2,
    # when it ends
    "max_steps": 3, "num_train_epochs": 5, "target_reward": 1e9, "max_bad_sample_share": 0.5,
    # where it computes
    "local_rank": 0, "ddp_timeout": 900, "offload_between_phases": True, "embedding_memory_gib": 0.0,
}  # fmt: skip
NOT_HERE = {
    "push_to_hub": "it needs a Hub; tests/test_hub.py has one",
    "use_cpu": "the bits of a GPU are others; without one it has no effect",
    "ddp_backend": "one process has none",
    "cache_base_pictures": "it writes into the user's cache; tests/test_kept_latents.py has one",
    "cache_encoded_prompts": "it writes into the user's cache; tests/test_kept_prompts.py has one",
    "dataloader_pin_memory": "Trainer sets it to False on the CPU",
} | {name: reason for name, (_, reason) in UNSUPPORTED.items() if name in FREE_FIELDS}
NOT_OF = {
    "TAFSGRPOTrainer": {"eval_num_inference_steps": "it evaluates with the steps of its trained sampler"},
    "VGGFlowTrainer": {
        "debug": "transformers' hooks cannot look at the mask of booleans that the value network reads"
    },
    "ACFlowTrainer": {"save_only_model": "with `load_best_model_at_end` it is refused; see the test that follows"},
}
# Every run encodes the same prompts, in training and in evaluation: those that are encoded together share a rounding.
PROMPTS = Dataset.from_dict({"prompt": ["a red circle", "a blue square"]})


def settings_of(trainer: str) -> dict[str, Any]:
    return RUN | ({"critic_warmup_max_steps": 0, "critic_steps": 1} if trainer_of(trainer) == "ACFlowTrainer" else {})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of each trainer, made once: the folder of a run of one update, its settings, and the weights after three."""
    made: dict[str, tuple[Path, Any, dict[str, torch.Tensor]]] = {}

    def of(trainer: str):
        if trainer not in made:
            folder = tmp_path_factory.mktemp(trainer)
            first = make_trainer(trainer, folder / "first", dataset=PROMPTS, **settings_of(trainer))
            first.train()
            whole = make_trainer(trainer, folder / "whole", dataset=PROMPTS, **settings_of(trainer) | {"max_steps": 3})
            whole.train()
            second, third = (load_file(folder / "whole" / f"checkpoint-{n}" / WEIGHTS) for n in (2, 3))
            assert any(not torch.equal(second[name], third[name]) for name in third if "lora_" in name)
            made[trainer] = folder / "first", first.args, third
        return made[trainer]

    return of


@pytest.fixture
def quiet_again():
    """`log_level` is of the whole process."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.mark.parametrize(
    "trainer",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name not in ("ACFlowTrainer", "TAFSGRPOTrainer") else [])
        for name in FORMS
    ],
)
def test_a_run_goes_on_bit_for_bit_with_every_free_setting_changed(tmp_path, runs, trainer, monkeypatch, quiet_again):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    folder, args, expected = runs(trainer)
    left_out = NOT_HERE | NOT_OF.get(trainer_of(trainer), {})
    of_config = {field.name for field in fields(args)}
    changes = {name: value for name, value in CHANGES.items() if name in of_config - set(left_out)}
    resumed = make_trainer(
        trainer, tmp_path / "again", dataset=PROMPTS, eval_dataset=PROMPTS, **settings_of(trainer) | changes
    )
    for name in FREE_FIELDS & of_config - set(left_out):
        assert getattr(resumed.args, name) != getattr(args, name), f"{name} was not changed"
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert resumed.state.global_step == 3
    assert resumed.best_step in (2, 3)  # both were evaluated and saved, and one of them was loaded at the end
    assert_same(load_file(tmp_path / "again" / "checkpoint-3" / WEIGHTS), expected)


def test_intervals_are_those_of_the_resumed_run(tmp_path):
    """The last update is evaluated in any case."""
    settings = settings_of("AdjointMatchingTrainer")
    make_trainer("AdjointMatchingTrainer", tmp_path, dataset=PROMPTS, **settings).train()
    changed = {"save_steps": 0.5, "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 2, "max_steps": 4}
    t = make_trainer("AdjointMatchingTrainer", tmp_path, dataset=PROMPTS, eval_dataset=["a cat"], **settings | changed)
    t.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 4)]
    assert [row["step"] for row in t.state.log_history if "eval_reward/redness" in row] == [3, 4]
    assert [row["step"] for row in t.state.log_history if "loss" in row] == [1, 2, 4]


@pytest.mark.parametrize(
    "schedule", [{"lr_scheduler_type": "linear"}, {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5}]
)
def test_a_schedule_that_knows_its_end_keeps_it(tmp_path, schedule):
    """The learning rate would follow neither the schedule of the first run nor that of a longer one."""
    settings = settings_of("AdjointMatchingTrainer") | schedule
    make_trainer("AdjointMatchingTrainer", tmp_path, dataset=PROMPTS, **settings).train()
    t = make_trainer("AdjointMatchingTrainer", tmp_path, dataset=PROMPTS, **settings | {"max_steps": 2})
    with pytest.raises(
        ValueError, match=r"checkpoint-1 was saved with max_steps 1, but this run has 2: a resumed run"
    ):
        t.train(resume_from_checkpoint=True)
    t = make_trainer("AdjointMatchingTrainer", tmp_path, dataset=PROMPTS, **settings | {"num_train_epochs": 7})
    assert t.train(resume_from_checkpoint=True).global_step == 1  # `max_steps` decides


def test_a_run_of_ac_flow_goes_on_bit_for_bit_where_only_the_model_is_saved(tmp_path, runs):
    folder, _, expected = runs("ACFlowTrainer")
    settings = settings_of("ACFlowTrainer") | {"max_steps": 3, "save_only_model": True}
    resumed = make_trainer("ACFlowTrainer", tmp_path, dataset=PROMPTS, **settings)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert_same(load_file(tmp_path / "checkpoint-3" / WEIGHTS), expected)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_an_anchor_cannot_be_added_in_the_middle_of_a_window(tmp_path):
    """The rollout in use was prepared without it."""
    settings = settings_of("ACFlowTrainer")
    make_trainer("ACFlowTrainer", tmp_path, wasserstein_coefficient=0.0, **settings).train()
    resumed = make_trainer("ACFlowTrainer", tmp_path, wasserstein_coefficient=0.5, **settings | {"max_steps": 2})
    with pytest.raises(
        ValueError, match=r"was saved with wasserstein_coefficient 0\.0, but this run has 0\.5: a resu"
    ):
        resumed.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("former", ["another file", "another number"])
def test_a_checkpoint_of_another_version_is_refused(tmp_path, runs, former):
    folder, *_ = runs("AdjointMatchingTrainer")
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(folder / "checkpoint-1", checkpoint)
    state = checkpoint / "training_state_0.pt"
    if former == "another file":
        state.rename(checkpoint / "loop_state_0.pt")
    else:
        torch.save(torch.load(state, weights_only=True) | {"format": 1}, state)
    write_manifest(checkpoint)
    resumed = make_trainer("AdjointMatchingTrainer", tmp_path, **RUN | {"max_steps": 2})
    with pytest.raises(ValueError, match=r"checkpoint-1 was saved by another version of flowrl-trainers, .*: finish"):
        resumed.train(resume_from_checkpoint=True)
