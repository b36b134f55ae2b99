"""`benchmarks/published.py` on tiny weights, and its table of published numbers."""

import json
from pathlib import Path

import pytest

from .helpers import CAPTIONS
from .tiny import tiny_sd3

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = [
    "max_steps=1", "per_device_train_batch_size=2", "gradient_accumulation_steps=1", "num_generations=2", "height=32",
    "width=32", "max_sequence_length=8", "use_cpu=true", "bf16=false", "eval_strategy='no'", "log_images=0",
    "num_inference_steps=2", "eval_num_inference_steps=2", "timestep_bins=2", "disable_tqdm=true",
]  # fmt: skip


@pytest.fixture
def published(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import published

    return published


def test_a_task_is_run_on_tiny_weights_and_stands_in_the_table(tmp_path, published, monkeypatch):
    tiny_sd3().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    asked = {
        "model": tmp_path / "model", "task": "ocr", "prompts": tmp_path / "prompts.txt",
        "held_out": tmp_path / "prompts.txt", "reward": "tests.helpers.redness", "judges": "jpeg_incompressibility",
        "folder": tmp_path / "run", "results": tmp_path / "published.json", "out": tmp_path / "published.md",
    }  # fmt: skip
    flags = [part for name, value in asked.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["published.py", *flags, "--set", *SMALL])
    published.main()
    (record,) = json.loads((tmp_path / "published.json").read_text())["runs"]
    assert (record["updates"], record["pictures"], record["guidance"]) == (1, len(CAPTIONS), "no guidance")
    base, tuned = (record[row]["reward/redness"] for row in ("base", "tuned"))
    row = f"| `diffusion_nft`, {tmp_path / 'model'}, seed 0 | no guidance | {base:.3f} | {tuned:.3f} | 1 |"
    text = (tmp_path / "published.md").read_text()
    assert row in text
    assert text.count("| not run yet |") == 3 * 5 - 1


def test_the_table_in_the_docs_is_that_of_the_results_file(published):
    results = BENCHMARKS / "results" / "published.json"
    runs = json.loads(results.read_text())["runs"] if results.exists() else []
    text = (BENCHMARKS.parent / "docs" / "tables" / "published.md").read_text()
    assert published.table(runs) == text
    assert "| published, DGPO | see its paper | | 0.97 | | |" in text
    assert "the published base is 0.24 without guidance and 0.63 with guidance" in text


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (None, "guidance of the pipeline's own scale"),
        (1.0, "no guidance"),
        (0.0, "no guidance"),
        (4.5, "guidance scale 4.5"),
    ],
)
def test_the_guidance_regime_is_stated(published, scale, words):
    assert published.guidance_of(scale) == words


def test_what_cannot_be_run_is_refused(published, monkeypatch):
    monkeypatch.setattr("sys.argv", ["published.py", "--task", "ocr"])
    with pytest.raises(ValueError, match=r"^`--prompts` is missing, which a run needs: name it, or pass `--table`\.$"):
        published.main()
    monkeypatch.setattr("sys.argv", [
        "published.py", "--task", "ocr", "--prompts", "a", "--held_out", "b", "--config_of", "x/y"
    ])  # fmt: skip
    with pytest.raises(ValueError, match=r"^`--config_of` \(x/y\) has no diffusion_nft_y\.yaml in examples/configs"):
        published.main()
