"""`flowrl demo --check`: the band of recorded demos, and a demo that is judged by it."""

import json
import runpy
from pathlib import Path

import pytest

from flowrl_trainers.cli import demo as command
from flowrl_trainers.cli import main
from flowrl_trainers.cli.convergence import RECORDED, Rise, band, judge, recorded_rises, refuse_other_settings
from flowrl_trainers.cli.demo import METHODS, PICTURES_PER_PROMPT, checked_settings
from flowrl_trainers.shapes import prompts

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
HALF = Rise(base=0.5, tuned=0.5, pictures=50)  # a variance of 1/4 for each row: an error of 100 sqrt(0.5 / 50) = 10


def test_the_band_is_two_standard_errors_wider_than_the_rises():
    """Rises of 0, 10 and 20 points; the largest error is 10, of the row where both accuracies are 1/2."""
    rises = [HALF, Rise(0.5, 0.6, 50), Rise(0.5, 0.7, 50)]
    assert HALF.standard_error == pytest.approx(10)
    assert band(rises) == pytest.approx((-20, 40))
    assert band(rises[:2]) is None


def test_a_demo_outside_the_band_fails_in_a_sentence():
    rises = [HALF] * 3
    assert judge("ac_flow", Rise(0.5, 0.69, 50), rises).endswith(
        "+19.0 points, inside the band from -20.0 to +20.0 of 3 recorded demos."
    )
    for tuned in (0.29, 0.71):
        with pytest.raises(RuntimeError, match=r"^ac_flow: .*, outside the band from -20\.0 to \+20\.0 of 3 recorded"):
            judge("ac_flow", Rise(0.5, tuned, 50), rises)


def test_a_method_without_a_band_says_so():
    found = judge("vgg_flow", HALF, [HALF])
    assert (
        "there is no band yet, which takes 3 recorded demos, and 1 is: record them by `python benchmarks/convergence.py"
        in found
    )


@pytest.mark.parametrize("flags", [["--max_steps", "3"], ["--seed", "1", "--learning_rate=0.1"], ["--config", "a"]])
def test_other_settings_cannot_be_checked(flags):
    refuse_other_settings(["--seed", "1", "--output_dir", "a"])
    with pytest.raises(ValueError, match=r"^`--check` compares with recorded demos.*: leave `\w+` out"):
        refuse_other_settings(flags)


def test_the_recorded_demos_are_those_of_today():
    """A demo whose settings change loses its band until it is recorded again."""
    for method, runs in json.loads(RECORDED.read_text())["runs"].items():
        assert len({run["seed"] for run in runs}) == len(runs)
        for run in runs:
            assert run["settings"] == checked_settings(method)
            assert run["pictures"] == PICTURES_PER_PROMPT * len(prompts("held_out"))


def test_a_demo_is_judged_by_what_was_recorded(tmp_path, monkeypatch, capsys):
    """One update of four pictures in three steps raises nothing by 80 points."""
    short = {"max_steps": 1, "num_inference_steps": 3, "num_generations": 2, "per_device_train_batch_size": 4}
    monkeypatch.setitem(METHODS, "diffusion_nft", short | {"timestep_bins": 2})
    monkeypatch.setattr(command, "prompts", lambda split: prompts(split).select(range(8)))
    monkeypatch.setattr(command, "recorded_rises", lambda method, settings: [Rise(0.1, 0.9, 512)] * 3)
    asked = ["demo", "--trainer", "diffusion_nft", "--check", "--output_dir", str(tmp_path / "run")]
    assert main([*asked, "--disable_tqdm", "true"]) == 1
    said = capsys.readouterr().err
    assert "flowrl: diffusion_nft: the checker's accuracy rose by" in said
    assert "outside the band from +76.2 to +83.8 of 3 recorded demos" in said

    # The same report, recorded: one run of each seed with today's settings.
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    record = runpy.run_path(str(BENCHMARKS / "convergence.py"))["record"]
    file, report = tmp_path / "recorded.json", json.loads((tmp_path / "run" / "metrics.json").read_text())
    file.write_text(json.dumps({"runs": {"diffusion_nft": [{"seed": 5, "settings": {"max_steps": 2}}]}}))
    for seed in (1, 0, 1):
        record("diffusion_nft", seed, report, file)
    runs = json.loads(file.read_text())["runs"]["diffusion_nft"]
    assert [run["seed"] for run in runs] == [0, 1]
    assert {run["tuned"] for run in runs} == {report["tuned"]["checker_accuracy"]}


def test_readme_and_home_page_say_what_the_recorded_seeds_of_the_demo_gained():
    """The demo that they show is one run, and the best of four."""
    rises = recorded_rises("adjoint_matching", checked_settings("adjoint_matching"))
    first, second, third = (f"{rise.points:.1f}" for rise in rises)
    for page in ("README.md", "docs/index.md"):
        words = " ".join((BENCHMARKS.parent / page).read_text().split())
        assert f"with 0, 1 and 2 the checker's accuracy rose by {first}, {second} and {third} points" in words
