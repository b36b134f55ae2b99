"""`merge_adapter`: rollouts with the adapter added to the weights, which come back to the last bit."""

import pytest
import torch

from flowrl_trainers.sampling.draws import ImageKey

from .helpers import make_trainer
from .tiny import tiny_sd3
from .tolerances import UNIT_ROUNDOFF

STEPS = {"num_inference_steps": 3, "max_steps": 2}


def moved(t):
    """Give the adapter weights with an effect: B starts at zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in t.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def adapted_weights(t):
    return {n: p.detach().clone() for n, p in t.model.transformer.named_parameters() if "base_layer" in n}


def test_velocities_are_equal_and_the_weights_come_back(tmp_path):
    t = make_trainer("ACFlowTrainer", tmp_path, tiny_sd3(), merge_adapter=True, critic="none", **STEPS)
    moved(t)
    t.model.eval()
    adapter, before = t.model.merged_adapter, adapted_weights(t)
    latents, sigma = t.flow.initial_latents(2, torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.4])
    t.conditioning.encode(["a red circle", "a square"], t.args.device, show_progress=False)
    conditioning = t.conditioning(["a red circle", "a square"], t.args.device)

    def velocity():
        with torch.no_grad():
            return t.model(latents, sigma, conditioning, guidance=False)

    beside = velocity()
    with t.model.reference():
        base = velocity()
    with adapter.in_place():
        merged = velocity()
        assert not torch.equal(adapted_weights(t)[next(iter(before))], before[next(iter(before))])
        with t.model.reference():
            assert torch.equal(velocity(), base)
        assert torch.equal(velocity(), merged)
    assert torch.equal(velocity(), beside)
    assert all(torch.equal(weight, before[name]) for name, weight in adapted_weights(t).items())
    # Each weight is rounded once more, so that a product of n terms is off by some sqrt(n) roundings in every layer.
    assert not torch.equal(base, beside)
    assert float((merged - beside).abs().max()) < 1000 * UNIT_ROUNDOFF * float(beside.abs().max())


def test_weights_come_back_after_an_error(tmp_path):
    t = make_trainer("ACFlowTrainer", tmp_path, tiny_sd3(), merge_adapter=True, critic="none", **STEPS)
    moved(t)
    before = adapted_weights(t)
    with pytest.raises(KeyError), t.model.merged_adapter.in_place():
        raise KeyError
    assert all(torch.equal(weight, before[name]) for name, weight in adapted_weights(t).items())


@pytest.mark.parametrize(
    ("trainer", "settings"),
    [
        ("DiffusionNFTTrainer", {}),
        ("ACFlowTrainer", {"rollout_policy": "old", "old_policy_decay": 0.9, "critic": "none"}),
    ],
    ids=["DiffusionNFT", "AC-Flow"],
)
def test_the_old_policy_draws_the_same_pictures_merged(tmp_path, monkeypatch, trainer, settings):
    """Which lags: it is the base model yet, while the present policy has moved."""
    drawn = []
    for merge in (False, True):
        t = make_trainer(trainer, tmp_path / str(merge), tiny_sd3(), merge_adapter=merge, **settings, **STEPS)
        monkeypatch.setattr(t, "before_rollout", lambda: None)  # at which the old policy would follow
        monkeypatch.setattr(t, "prepare", lambda rollout: [drawn.append(batch.record.final) for batch in rollout][:0])
        moved(t)
        examples = [t.train_dataset[ImageKey(row, 0, 0)] for row in range(2)]
        t.make_rollout(examples)
    old, merged = drawn
    with torch.no_grad():
        present = t.rollout(t.condition(examples), [e.key for e in examples]).final
    assert torch.equal(merged, old)  # an adapter whose B is zero adds nothing to any weight
    assert float((present - old).abs().max()) > 0.01


def test_an_update_learns_from_merged_rollouts(tmp_path, monkeypatch):
    """The memoryless sampler takes its last step from the base, inside of the rollout."""
    settings = {
        "dynamics": "memoryless",
        "num_inference_steps": 3,
        "adjoint_steps": 3,
        "reward_scale": 10.0,
        "max_steps": 3,
    }
    adapters = []
    for merge in (False, True):
        t = make_trainer("AdjointMatchingTrainer", tmp_path / str(merge), tiny_sd3(), merge_adapter=merge, **settings)
        before = adapted_weights(t)
        t.train()
        assert all(torch.equal(weight, before[name]) for name, weight in adapted_weights(t).items())
        adapters.append(torch.cat([p.detach().flatten() for p in t.trained_parameters()]))
    plain, merged = adapters
    assert not torch.equal(plain, merged)
    assert float((plain - merged).abs().max()) < 1e-2 * float(plain.abs().max())  # AdamW's steps magnify roundings


@pytest.mark.parametrize(
    ("trainer", "settings", "sentence"),
    [
        ("ACFlowTrainer", {"lora": False}, "`merge_adapter` is True, but no adapter is trained"),
        ("ACFlowTrainer", {"bf16": True}, "`merge_adapter` is True with `bf16`"),
        ("TAFSGRPOTrainer", {}, "`merge_adapter` is True, which does not suit TAFS-GRPO"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused(tmp_path, trainer, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_trainer(trainer, tmp_path, tiny_sd3(), merge_adapter=True, **settings)


def test_weights_in_half_precision_are_refused(tmp_path):
    pipeline = tiny_sd3()
    pipeline.transformer.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"`merge_adapter` is True, but the weights are torch.bfloat16"):
        make_trainer("ACFlowTrainer", tmp_path, pipeline, merge_adapter=True)
