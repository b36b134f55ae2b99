"""`flowrl evaluate` measures what a run's own evaluation measures, and a hacked reward is told from better
pictures.
"""

import json
import logging
import math
import re
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

from flowrl_trainers import FlowPipeline, VGGFlowConfig, VGGFlowTrainer
from flowrl_trainers.cli.evaluate import _table
from flowrl_trainers.cli.evaluate_arguments import EvaluateArguments
from flowrl_trainers.metrics import Change, paired_change, signs_of_over_optimisation
from flowrl_trainers.rewards import differentiable
from flowrl_trainers.shapes import prompts

from .forked import demo, flowrl
from .tiny import tiny_sd3

SHORT = ["--num_inference_steps", "3", "--seed", "7"]


def test_the_rows_are_those_of_the_demo(tmp_path):
    shown = demo(
        tmp_path, "--trainer", "diffusion_nft", "--max_steps", "1", "--per_device_train_batch_size", "8",
        "--num_generations", "8", "--timestep_bins", "3", "--output_dir", "tuned", *SHORT,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    (tmp_path / "held_out.txt").write_text("\n".join(prompts("held_out")["prompt"][:24]))
    shared = ["evaluate", "--model", "shapes", "--dataset", "held_out.txt", "--rewards", "shapes", "checker", "--trained", "shapes",
              "--batch_size", "55",
              "--guidance_scale", "1", "--max_sequence_length", "8", *SHORT]  # fmt: skip
    done = flowrl(tmp_path, *shared, "--adapter", "tuned", "--out", "measured")
    assert done.returncode == 0, done.stderr
    rows, report = (
        json.loads((tmp_path / name).read_text()) for name in ("measured/table.json", "tuned/metrics.json")
    )
    assert list(rows) == ["base", "tuned"]
    for label, row in rows.items():
        for name, value in row.items():
            assert value == pytest.approx(report[label][name], abs=1e-5), (label, name)
    table = (tmp_path / "measured" / "table.md").read_text()
    assert table in done.stdout
    assert "3 steps of the ODE, guidance scale 1" in table
    assert Image.open(tmp_path / "measured" / "pictures.png").width > 400

    (tmp_path / "judges.py").write_text(
        "def darkness(images, prompts, **columns):\n    return (-images.mean(dim=(1, 2, 3))).tolist()\n"
    )
    named = [
        *shared[: shared.index("--rewards")],
        "--rewards",
        "judges.darkness",
        "--trained",
        "judges.darkness",
        *shared[shared.index("--batch_size") :],
    ]
    shutil.copytree(tmp_path / "tuned", tmp_path / "another" / "tuned")
    done = flowrl(
        tmp_path,
        *named,
        "--adapter",
        "tuned",
        "another/tuned",
        "--out",
        "darkness",
        "--pictures_per_prompt",
        "1",
        "--decode_batch_size",
        "20",
    )
    assert done.returncode == 0, done.stderr
    assert "reward/darkness" in (tmp_path / "darkness" / "table.md").read_text()
    assert list(json.loads((tmp_path / "darkness" / "table.json").read_text())) == ["base", "tuned", "another/tuned"]

    wider = tiny_sd3()  # of another width
    wider.transformer.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"], init_lora_weights=False))
    FlowPipeline.from_pipeline(wider).save_lora(tmp_path / "wider")
    weights = load_file(tmp_path / "tuned" / "pytorch_lora_weights.safetensors")
    (tmp_path / "unknown").mkdir()
    save_file(
        {name.replace("transformer.", "unet."): value for name, value in weights.items()},
        tmp_path / "unknown" / "pytorch_lora_weights.safetensors",
    )
    for adapter, sentence in (
        ("wider", "The adapter 'wider' cannot be loaded"),
        ("unknown", "The adapter 'unknown' changes no part of this pipeline"),
    ):
        wrong = flowrl(tmp_path, *shared, "--adapter", "tuned", adapter)
        assert wrong.returncode == 2
        assert sentence in wrong.stderr
        assert "Traceback" not in wrong.stderr
        assert "Drawing" not in wrong.stderr

    two = ["--accelerate_config", "ddp", "--num_processes", "2", "--use_cpu", "true"]
    done = flowrl(tmp_path, *shared, "--adapter", "tuned", "--out", "measured_by_two", *two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| tuned |") == 1
    for label, row in json.loads((tmp_path / "measured_by_two" / "table.json").read_text()).items():
        assert row == pytest.approx(rows[label], abs=1e-5)

    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "train.jsonl").write_text('{"caption": "a red circle"}\n')
    for changes, sentence in (
        (["--adapter", "nowhere"], "The adapter 'nowhere' cannot be loaded"),
        (["--adapter", "tuned", "tuned"], "`adapter` has two of the same name, or one called 'base' (tuned, tuned)"),
        (["--adapter", "tuned", "--trained", "taste"], "`trained` names taste, which `rewards` does not"),
        (["--adapter", "tuned", "--pictures_per_prompt", "0"], "`pictures_per_prompt` (0) must be at least 1."),
        (["--adapter", "tuned", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--adapter", "tuned", "--colour", "red"], "colour"),
        (
            ["--adapter", "tuned", "--dataset", "captions", "--split", "train"],
            "`prompt_column` is 'prompt', but the columns are caption: name the one with prompts",
        ),
    ):
        wrong = flowrl(tmp_path, *shared, *changes)
        assert wrong.returncode == 2
        assert sentence in wrong.stderr


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("pictures_per_prompt", 0, "`pictures_per_prompt` (0) must be at least 1."),
        ("num_inference_steps", 0, "`num_inference_steps` (0) must be at least 1."),
        ("guidance_scale", -1.0, "`guidance_scale` (-1.0) must be at least 0, or None."),
        ("guidance_scale", math.nan, "`guidance_scale` (nan) must be a finite number or None."),
        ("height", 0, "`height` (0) must be at least 1, or None."),
        ("width", 32.5, "`width` (32.5) must be a whole number or None."),
        ("max_sequence_length", 0, "`max_sequence_length` (0) must be at least 1, or None."),
        ("dtype", "int8", "`dtype` is 'int8': choose 'float32', 'bfloat16' or 'float16'."),
        ("batch_size", -2, "`batch_size` (-2) must be at least 1."),
        ("decode_batch_size", 0, "`decode_batch_size` (0) must be at least 1, or None."),
        ("seed", -1, "`seed` (-1) must be between 0 and 4294967295."),
        ("adapter", 3, "`adapter` (3) must be a list of strings."),
    ],
)
def test_every_setting_is_checked_by_its_annotation(name, value, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        EvaluateArguments(**{"model": "shapes", "adapter": ["tuned"], "rewards": ["shapes"]} | {name: value})


def test_a_single_name_is_a_list_of_one():
    args = EvaluateArguments(model="shapes", adapter="tuned", rewards="shapes", trained="shapes")
    assert (args.adapter, args.rewards, args.trained) == (["tuned"], ["shapes"], ["shapes"])


# ---- hacked rewards -------------------------------------------------------------------------------------------------


def signs(base: dict[str, float], tuned: dict[str, float], trained: dict[str, float], **errors: float) -> list[str]:
    """With a judge that training never saw; errors: those of the changes of a and the judge, 0.05 by default."""
    errors = {"a": 0.05, "judge": 0.05} | errors
    changes = {n: Change(base[f"reward/{n}"], tuned[f"reward/{n}"], error) for n, error in errors.items()}
    return signs_of_over_optimisation(base, tuned, trained, ["judge"], changes)


def test_signs_of_over_optimisation():
    base = {"reward/a": 0.2, "reward/judge": 0.5, "diversity": 0.4, "edge_density": 0.1, "colour_entropy": 2.0}
    better = {"reward/a": 0.9, "reward/judge": 0.6, "diversity": 0.35, "edge_density": 0.12, "colour_entropy": 1.8}
    raised = {"a": 1.0}
    assert signs(base, better, raised) == []
    hacked = {"reward/a": 0.9, "reward/judge": 0.3, "diversity": 0.2, "edge_density": 0.02, "colour_entropy": 0.5}
    judge, diversity, edges, colours = signs(base, hacked, raised)
    assert judge == "judge, which training never saw, fell from 0.5 to 0.3"
    assert diversity == "diversity fell from 0.4 to 0.2"
    assert edges == "edge density went from 0.1 to 0.02"
    assert colours == "colour entropy went from 2 to 0.5"
    assert signs(base, hacked | {"reward/a": 0.1}, raised) == []  # nothing was gained by it
    assert signs(base, hacked, raised, a=0.4) == []  # or nobody knows whether there was
    assert len(signs(base, hacked, raised, judge=0.11)) == 3  # whether it fell
    lowered = hacked | {"reward/a": -0.5}
    assert len(signs(base, lowered, {"a": -1.0})) == 4
    assert signs(base, lowered, raised) == []
    assert signs(base, hacked, {}) == []  # nothing was trained
    lost = {k: v for k, v in better.items() if k != "diversity"}
    assert signs(base, lost, raised) == ["diversity fell from 0.4 to 0"]


def test_a_change_is_that_of_the_pictures_with_both_scores():
    before = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 10
    after = before + 0.1 * torch.randn(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert paired_change(before, after).error == pytest.approx(0.1 / math.sqrt(4000), rel=0.05)
    # The mean of all scores falls from 9 / 3 to 9 / 3 - 1: a judge that cannot tell of other pictures proves nothing.
    found = paired_change(torch.tensor([1.0, 2.0, math.nan, 6.0]), torch.tensor([2.0, 4.0, 0.0, math.nan]))
    assert found == pytest.approx((1.5, 3.0, 0.5))
    assert paired_change(torch.tensor([1.0]), torch.tensor([2.0])) == (1.0, 2.0, math.inf)


@differentiable
def whiteness(images, prompts, **columns):
    return images.mean(dim=(1, 2, 3))


def test_a_planted_hack_shows_in_the_table_and_the_log(tmp_path, shapes_pipeline, caplog):
    """A reward that pays for white pixels: it rises, and everything that was not trained on falls."""
    config = VGGFlowConfig(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=8, num_inference_steps=6,
        value_network="none", control_to_velocity_ratio=2.0, learning_rate=1e-2, guidance_scale=1.0,
        max_sequence_length=8, per_device_eval_batch_size=32, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    held_out = Dataset.from_dict({"prompt": prompts("held_out")["prompt"][:16] * 2})
    t = VGGFlowTrainer(
        shapes_pipeline, whiteness, config, prompts("train"), eval_dataset=held_out,
        eval_reward_funcs=["shapes", "checker"], peft_config=LoraConfig(r=16, lora_alpha=32),
    )  # fmt: skip
    torch.manual_seed(0)
    t.train()
    with caplog.at_level(logging.WARNING):
        t.evaluate()
    base, tuned = t.rows["base"], t.rows["tuned"]
    assert tuned["reward/whiteness"] > base["reward/whiteness"] + 0.02
    assert tuned["reward/shapes"] < base["reward/shapes"] - 0.1
    assert tuned["checker_accuracy"] <= base["checker_accuracy"]
    assert "The trained reward moved as it should, but shapes, which training never saw, fell from" in caplog.text
    assert "it may have been hacked" in caplog.text
    t.save_model()
    assert "whiteness" in (tmp_path / "README.md").read_text()


def test_the_table_has_a_dash_for_what_is_not_known():
    args = EvaluateArguments(model="shapes", adapter="tuned", rewards="checker")
    rows = {"base": {"reward/x": float("nan"), "edge_density": 0.5}, "tuned": {"reward/x": 0.25}}
    lines = _table(rows, args).splitlines()
    assert lines[2:4] == ["| base | - | 0.500 |", "| tuned | 0.250 |  |"]
