"""In a real notebook: the reward of every update, and rows and pictures of every evaluation."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

CODE = """
from peft import LoraConfig
from flowrl_trainers import AdjointMatchingConfig, AdjointMatchingTrainer
from flowrl_trainers.shapes import load_pipeline, prompts

config = AdjointMatchingConfig(
    output_dir="tuned-shapes", max_steps=4, per_device_train_batch_size=2, num_inference_steps=3, adjoint_steps=2,
    guidance_scale=1.0, max_sequence_length=8, log_images=2, eval_strategy="steps", eval_steps=2, use_cpu=True,
)
trainer = AdjointMatchingTrainer(
    load_pipeline(), "shapes", config, prompts("train"), prompts("held_out").select(range(4)), "checker",
    peft_config=LoraConfig(r=2)
)
trainer.train()
"""


def test_a_notebook_shows_rewards_rows_and_pictures(tmp_path: Path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    NotebookClient(
        notebook, timeout=300, iopub_timeout=60, kernel_name="python3",  # outputs later than that are dropped
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()  # fmt: skip
    shown = [output["data"] for output in notebook.cells[0].outputs if output.output_type == "display_data"]
    progress, rows = (
        next(data["text/html"] for data in shown if word in data.get("text/html", ""))
        for word in ("<progress", "tuned")
    )
    assert all(f"<th>{name}</th>" in progress for name in ("Step", "Loss", "Reward"))
    assert progress.count("<tr") == 1 + 4  # the head and four updates
    assert "No log" not in progress
    assert "unknown" not in progress
    assert "After 2 updates" in rows
    assert all(name in rows for name in ("base", "reward/shapes", "checker_accuracy"))
    assert sum("image/png" in data for data in shown) == 2
