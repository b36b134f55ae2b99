"""How the images of an update are dealt to micro-steps changes nothing. For every trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch

from .helpers import TRAINERS, make_trainer, update_rows


def trained(
    folder: Path, name: str, size: int, accumulation: int
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """What is trained, heads too, after an update of eight images, or two where the first is a critic's warm-up."""
    t = make_trainer(
        name, folder, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, num_generations=2,
        optim="sgd", learning_rate=1.0, max_steps=2 if name == "ACFlowTrainer" else 1, height=16, width=16,
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in t.model.named_parameters() if p.requires_grad}
    t.train()
    after = {n: p.detach().clone() for n, p in t.model.named_parameters() if p.requires_grad}
    assert any(not torch.equal(before[n], after[n]) for n in after if "lora_" in n)
    return after, update_rows(t)


@pytest.mark.parametrize("name", TRAINERS)
def test_eight_images_at_once_and_one_by_one_make_the_same_update(tmp_path, name):
    """Equal but for the order of sums in float32: `SGD` hands the gradient on as it is.

    AC-Flow's critic takes steps of Adam, which amplify rounding: what is learned from it differs by 1e-6, as measured.
    """
    (whole, rows), (parts, others) = trained(tmp_path, name, 8, 1), trained(tmp_path, name, 1, 8)
    assert whole.keys() == parts.keys()
    for parameter, value in whole.items():
        torch.testing.assert_close(value, parts[parameter], atol=1e-5, rtol=1e-4)
    for row, other in zip(rows, others, strict=True):
        for key in ("loss", "grad_norm", "reward", "reward/redness"):
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key
