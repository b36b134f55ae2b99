"""What a checkpoint holds, how many are kept, and where a run goes on from them."""

import torch
from datasets import Dataset
from safetensors.torch import load_file

from flowrl_trainers import AdjointMatchingConfig, AdjointMatchingTrainer
from flowrl_trainers.rewards import differentiable
from flowrl_trainers.run_folder.checkpoints import MANIFEST

from .gaussian import GaussianFlow
from .helpers import adjoint_matching
from .tiny import tiny_sd3


@differentiable
def square(images, prompts, **columns):
    """Of vectors (B, d)."""
    return -images.square().mean(dim=1)


def test_a_finished_run_of_a_fraction_of_an_epoch_is_resumed_without_another_update(tmp_path):
    settings = {"max_steps": -1, "num_train_epochs": 0.5, "save_strategy": "steps", "save_steps": 1}
    t = adjoint_matching(tmp_path, tiny_sd3(), **settings)
    t.train()
    assert t.state.global_step == t.updates_per_epoch / 2
    assert (
        adjoint_matching(tmp_path, tiny_sd3(), **settings).train(resume_from_checkpoint=True).global_step
        == t.state.global_step
    )


def test_the_same_call_starts_a_run_and_resumes_it(tmp_path, caplog):
    for steps in (1, 2):
        t = adjoint_matching(tmp_path, tiny_sd3(), save_strategy="steps", save_steps=1, max_steps=steps)
        assert t.train(resume_from_checkpoint="auto").global_step == steps
        assert t._counter.updates == 1
    for manifest in tmp_path.glob(f"checkpoint-*/{MANIFEST}"):
        manifest.unlink()
    again = adjoint_matching(tmp_path, tiny_sd3(), save_strategy="steps", save_steps=1, max_steps=1)
    assert again.train(resume_from_checkpoint="auto").global_step == 1
    assert "is complete: the run starts anew" in caplog.text


def test_a_finished_run_is_resumed_without_another_update(tmp_path):
    t = adjoint_matching(tmp_path, tiny_sd3(), save_strategy="steps", save_steps=1, max_steps=3, learning_rate=0.1)
    t.train()
    again = adjoint_matching(tmp_path, tiny_sd3(), save_strategy="steps", save_steps=1, max_steps=3, learning_rate=0.1)
    assert again.train(resume_from_checkpoint=True).global_step == 3
    assert again.state.global_step == 3
    assert all(torch.equal(a, b) for a, b in zip(t.trained_parameters(), again.trained_parameters(), strict=True))
    assert not (tmp_path / "checkpoint-4").exists()


def test_running_statistics_are_part_of_a_checkpoint(tmp_path):
    class Normalised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.scale = torch.nn.BatchNorm1d(1), torch.nn.Parameter(torch.ones(1))
            self.register_buffer("scratch", torch.zeros(1), persistent=False)

        def forward(self, x, sigma):
            return self.scale * self.norm(x)

    prompts = Dataset.from_dict({"prompt": [str(n) for n in range(8)]})
    config = AdjointMatchingConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        save_strategy="steps",
        save_steps=2,
        num_inference_steps=4,
        report_to="none",
        use_cpu=True,
    )
    t, again = (AdjointMatchingTrainer(GaussianFlow(Normalised(), 1), square, config, prompts) for _ in range(2))
    t.train()
    assert t.model.transformer.norm.running_mean.abs() > 0
    again.train(resume_from_checkpoint=True)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(again.model.transformer.norm, name), getattr(t.model.transformer.norm, name))
    assert "transformer.scratch" not in load_file(tmp_path / "checkpoint-2" / "trained_parameters.safetensors")


def test_only_as_many_checkpoints_are_kept_as_asked(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline, save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=3)
    t.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert t.args.save_total_limit == 1
