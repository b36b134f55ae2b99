"""A walk through the space of inputs: whatever is configured or damaged works, or is refused in one sentence."""

import itertools
import math
import shutil
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flowrl_trainers
from flowrl_trainers import FlowRLTrainer
from flowrl_trainers.run_folder.checkpoints import MANIFEST, checkpoint_to_resume
from flowrl_trainers.trainers.config_checks import rules

from .gaussian import GaussianFlow, Shifted, closeness
from .helpers import TRAINERS, update_rows

PACKAGE = Path(flowrl_trainers.__file__).parent
WALK = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
SLOW = pytest.mark.slow
PROMPTS = Dataset.from_dict({"prompt": [str(n) for n in range(8)]})
QUIET = dict(report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", log_images=0)


def assert_one_sentence_of_ours(error: Exception) -> None:
    """Raised by a `raise` of the package, not by what it stumbled over."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    said = str(error)
    assert isinstance(error, (ValueError, TypeError)), repr(error)
    assert Path(where.filename).is_relative_to(PACKAGE), f"{where.filename}:{where.lineno}: {error!r}"
    assert (where.line or "").startswith("raise "), f"{where.filename}:{where.lineno}: {error!r}"
    assert said.endswith("."), said
    assert "\n" not in said, said


# ---- configurations -------------------------------------------------------------------------------------------------

SMALL = st.integers(1, 4)
SHARED: dict[str, st.SearchStrategy[Any]] = {
    "num_inference_steps": st.integers(1, 6),
    "eval_num_inference_steps": st.none() | SMALL,
    "per_device_train_batch_size": SMALL,
    "gradient_accumulation_steps": st.integers(1, 3),
    "num_generations": SMALL,
    "steps_per_generation": st.none() | st.integers(1, 6),
    "num_iterations": st.integers(1, 3),
    "rollout_batch_size": st.none() | SMALL,
    "decode_batch_size": st.none() | SMALL,
    "ema_decay": st.none() | st.floats(0, 1),
    "max_bad_sample_share": st.floats(0, 1),
    "max_grad_norm": st.sampled_from([0.0, 1.0]),
    "seed": st.integers(0, 2**32 - 1),
}
CLIP = st.none() | st.floats(0, 1)
GRADIENT = {
    "reward_scale": st.none() | st.floats(0.01, 10), "control_to_velocity_ratio": st.none() | st.floats(0, 1),
    "product_batch_size": st.none() | SMALL,
}  # fmt: skip
OF: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "AdjointMatchingTrainer": GRADIENT | {
        "adjoint_steps": st.integers(1, 6), "adjoint": st.sampled_from(["lean", "full", "current"]),
        "dynamics": st.sampled_from(["ode", "memoryless"]), "control_cost_order": st.sampled_from(["2", "4", "2+4"]),
        "loss_type": st.sampled_from(["regression", "hamiltonian"]), "reward_gradient_clip_quantile": CLIP,
    },
    "VGGFlowTrainer": GRADIENT | {
        "timestep_bins": st.integers(1, 7), "value_network": st.sampled_from(["default", "none", "unet"]),
        "eta_schedule": st.sampled_from(["quadratic", "linear", "constant"]), "reward_gradient_clip_quantile": CLIP,
    },
    "ACFlowTrainer": {
        "critic": st.sampled_from(["reward_of_estimate", "backbone", "convolutional", "none"]), "critic_steps": SMALL,
        "critic_warmup_max_steps": st.integers(0, 1), "normalize_weights": st.booleans(),
        "weighting": st.sampled_from(["exponential", "softplus", "positive", "indicator", "linear"]),
        "advantage_clip": st.none() | st.floats(0, 2), "temperature": st.floats(0.01, 10),
        "wasserstein_coefficient": st.floats(0, 1), "target": st.sampled_from(["weighted", "fixed"]),
        "rollout_policy": st.sampled_from(["current", "old"]), "old_policy_decay": st.floats(0, 1),
        "old_policy_coefficient": st.floats(0, 1),
    },
    "DiffusionNFTTrainer": {
        "branch_beta": st.floats(0.01, 10), "advantage_clip": st.floats(0, 6), "adaptive_weighting": st.booleans(),
        "reference_coefficient": st.floats(0, 1), "norm_guard": st.floats(0, 1), "timestep_bins": st.integers(1, 4),
        "timestep_sampling": st.sampled_from(["uniform", "pipeline", "noisy", "steps", "noisy_steps"]),
        "old_policy_decay": st.floats(0, 1), "reward_std": st.sampled_from(["centred", "raw"]),
    },
    "TAFSGRPOTrainer": {
        "kernel": st.sampled_from(["renoise", "precise", "flow_grpo"]), "eta": st.floats(0, 1),
        "credit_rule": st.sampled_from(["mixed", "final", "level", "gain", "return"]), "credit_mix": st.floats(0, 1),
        "log_prob_form": st.sampled_from(["coefficients_preserving", "gaussian"]), "beta": st.floats(0, 1),
        "share_initial_noise": st.booleans(),
    },
}  # fmt: skip


def configurations(trainer: str) -> st.SearchStrategy[dict[str, Any]]:
    """Any of the settings, the others at their defaults."""
    known = rules(getattr(flowrl_trainers, trainer).config_class)
    return st.fixed_dictionaries({}, optional={k: v for k, v in (SHARED | OF[trainer]).items() if k in known})


def vectors(trainer: str, folder: Path, **changes: Any) -> FlowRLTrainer:
    cls = getattr(flowrl_trainers, trainer)
    pairs = {"num_generations": 2} if trainer == "DiffusionNFTTrainer" else {}  # else small batches are refused
    config = cls.config_class(output_dir=str(folder), **({"max_steps": 1} | pairs | QUIET | changes))
    return cls(GaussianFlow(Shifted(), 2), closeness(1.0), config, PROMPTS)


@pytest.mark.parametrize("examples", [18, pytest.param(180, marks=SLOW)])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_configuration_trains_or_is_refused(tmp_path, trainer, examples):
    """Two updates, of which AC-Flow's first may be the critic's alone; what is refused is refused at construction."""
    trained, numbers = [], itertools.count()

    @settings(WALK, max_examples=examples)
    @given(configurations(trainer))
    def check(changes):
        try:
            t = vectors(trainer, tmp_path / str(next(numbers)), max_steps=2, **changes)
        except Exception as error:
            assert_one_sentence_of_ours(error)
            return
        t.train()
        rows = update_rows(t)
        assert rows
        assert all(math.isfinite(row["loss"]) for row in rows)
        assert all(bool(p.isfinite().all()) for p in t.trained_parameters())
        trained.append(changes)

    check()
    assert len(trained) > examples / 10  # most of the walk would be refused for its batch sizes


# ---- values ---------------------------------------------------------------------------------------------------------

ODD: list[Any] = [
    math.nan, math.inf, -math.inf, -1, -1e-9, 2**70, -(2**70), 1e300, "", "yes", "nan", "1.0", [], [1], ["a"], {},
    {"a": 1}, (), b"1", object(), 1j, True, None, 0, 0.5, "\n", "é" * 100, [math.nan], torch.tensor(1.0), print,
]  # fmt: skip
ELSEWHERE = {
    "local_rank",
    "hub_token",
    "log_level",
    "log_level_replica",
    "output_dir",
}  # of the process, or of its disk


@pytest.mark.parametrize("examples", [150, pytest.param(1500, marks=SLOW)])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_value_is_refused_or_can_mean_something(tmp_path, trainer, examples):
    """What is accepted is finite, and of a type that the field's default or annotation has."""
    config_class = getattr(flowrl_trainers, trainer).config_class
    names = sorted(set(rules(config_class)) - ELSEWHERE)

    @settings(WALK, max_examples=examples)
    @given(st.sampled_from(names), st.sampled_from(ODD))
    def check(name, value):
        try:
            config_class(**({"output_dir": str(tmp_path)} | QUIET | {name: value}))
        except Exception as error:
            assert_one_sentence_of_ours(error)
            return
        assert not (isinstance(value, float) and not math.isfinite(value)), f"{name} takes {value!r}"
        said = str(rules(config_class)[name])
        if isinstance(value, str) and said.startswith("list[float]") and math.isfinite(float(value)):
            return  # YAML reads 1e-2 as a string
        for kind, words in {str: ("str", "Literal", "enum", "Strategy"), list: ("list",), dict: ("dict",)}.items():
            if isinstance(value, kind):
                assert any(word in said for word in (*words, "Any")), f"{name} ({said}) takes {value!r}"

    check()


# ---- damages --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of two checkpoints of each trainer, not to be changed."""
    made = {}
    for trainer in TRAINERS:
        made[trainer] = tmp_path_factory.mktemp(trainer)
        vectors(trainer, made[trainer], max_steps=2, **{"save_strategy": "steps", "save_steps": 1} | GROUPS).train()
    return made


GROUPS = {"num_generations": 2, "per_device_train_batch_size": 4, "save_strategy": "steps"}
JUNK = [b"", b"{}", b"null", b"[]", b'{"files": {}}', b'{"files": {"a": 1}}', b"\xff" * 64, b"[" * 9999, b"PK\x03\x04"]


def damage(path: Path, how: str, place: float, junk: bytes) -> None:
    content = path.read_bytes()
    at = min(int(place * len(content)), len(content) - 1)
    match how:
        case "flip":
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        case "cut":
            path.write_bytes(content[:at])
        case "delete":
            path.unlink()
        case "replace":
            path.write_bytes(junk)
        case "extend":
            path.write_bytes(content + junk + b"\0")


@pytest.mark.parametrize("examples", [25, pytest.param(250, marks=SLOW)])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_damaged_checkpoint_is_passed_over_or_refused(tmp_path, runs, trainer, examples):
    whole, numbers = runs[trainer], itertools.count()
    files = sorted(p.relative_to(whole).as_posix() for p in (whole / "checkpoint-2").rglob("*") if p.is_file())

    @settings(WALK, max_examples=examples)
    @given(
        st.sampled_from(files), st.sampled_from(["flip", "cut", "delete", "replace", "extend"]),
        st.floats(0, 1), st.sampled_from(JUNK),
    )  # fmt: skip
    def check(name, how, place, junk):
        run = shutil.copytree(whole, tmp_path / str(next(numbers)))
        damage(run / name, how, place, junk)
        assert (run / name).exists() is (how != "delete")
        newest, older = run / "checkpoint-2", run / "checkpoint-1"
        for wanted in (True, "auto"):
            found, faults = checkpoint_to_resume(run, wanted)
            assert found == older
            assert [*faults] == [newest]
        with pytest.raises(ValueError, match=r"checkpoint-2 is (damaged|incomplete): .*; resume from") as refused:
            checkpoint_to_resume(run, newest)
        assert_one_sentence_of_ours(refused.value)
        shutil.rmtree(run)

    check()
    assert f"checkpoint-2/{MANIFEST}" in files
