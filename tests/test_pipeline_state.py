"""The pipeline that a user passed is as it was after training, after an error and after Ctrl-C."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from flowrl_trainers.trainers.pipeline_state import PartState

from .helpers import adjoint_matching, make_trainer, redness
from .tiny import tiny_sd3
from .tiny_families import FAMILIES, tiny

ADAPTER = "pytorch_lora_weights.safetensors"


def state_of(pipeline) -> dict[str, Any]:
    """What a user could tell of the parts, the adapters apart."""
    state: dict[str, Any] = {"scheduler": (id(pipeline.scheduler), dict(pipeline.scheduler.config))}
    state["sigmas"] = pipeline.scheduler.sigmas.tolist()
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            tensors = [*part.named_parameters(), *part.named_buffers()]
            state |= {
                f"{name}.{path.replace('.base_layer', '')}": (tensor.dtype, tensor.device, tensor.requires_grad)
                for path, tensor in tensors
                if "lora_" not in path
            }
            state[name] = part.training
    for name in ("transformer", "vae"):
        state[f"{name} checkpoints"] = getattr(pipeline, name).is_gradient_checkpointing
    return state


def odd_pipeline() -> Any:
    """With a mode, a precision and frozen weights that no trainer would choose."""
    pipeline = tiny_sd3()
    pipeline.vae.to(torch.bfloat16).train()
    pipeline.text_encoder_2.train()
    pipeline.transformer.proj_out.requires_grad_(False)
    pipeline.transformer.to(torch.bfloat16)
    pipeline.vae.enable_gradient_checkpointing()
    return pipeline


def breaking(error: type[BaseException]) -> Any:
    """A reward that the probe passes and the first rollout does not."""
    calls = []

    def reward(images, prompts, **columns):
        calls.append(1)
        if len(calls) > 1:
            raise error("in the middle")
        return images.mean(dim=(1, 2, 3))

    return reward


@pytest.mark.parametrize("error", [None, ArithmeticError, KeyboardInterrupt])
def test_after_training_the_pipeline_is_as_it_was_but_for_the_adapter(tmp_path, error):
    pipeline = odd_pipeline()
    before = state_of(pipeline)
    reward = redness if error is None else breaking(error)
    t = make_trainer("TAFSGRPOTrainer", tmp_path, pipeline, reward=reward, max_steps=1, activation_checkpointing=True)
    assert state_of(pipeline) != before
    if error is None:
        t.train()
    else:
        with pytest.raises((RuntimeError, error)):
            t.train()
    assert state_of(pipeline) == before
    assert pipeline.get_active_adapters() == ["default"]
    assert {p.dtype for p in t.trained_parameters()} == {torch.float32}
    if error is None:
        t.evaluate(t.train_dataset.dataset.select([0]))
        assert t.rows["base"] != t.rows["tuned"]
        assert state_of(pipeline) == before


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_an_error_while_the_trainer_is_made_leaves_not_even_the_adapter(tmp_path, monkeypatch, error):
    pipeline = odd_pipeline()
    before, names = state_of(pipeline), list(pipeline.transformer.state_dict())

    def breaks(self):
        raise error

    monkeypatch.setattr("flowrl_trainers.TAFSGRPOTrainer.set_up", breaks)
    with pytest.raises(error):
        make_trainer("TAFSGRPOTrainer", tmp_path, pipeline)
    assert (state_of(pipeline), list(pipeline.transformer.state_dict())) == (before, names)
    with pytest.raises(error):
        make_trainer("TAFSGRPOTrainer", tmp_path, pipeline, lora=False)  # which casts all weights
    assert (state_of(pipeline), list(pipeline.transformer.state_dict())) == (before, names)
    monkeypatch.undo()
    make_trainer("TAFSGRPOTrainer", tmp_path, pipeline)


def test_an_adapter_that_fits_nothing_leaves_nothing(tmp_path, tiny_pipeline):
    before = state_of(tiny_pipeline)
    with pytest.raises(ValueError, match="`peft_config` does not fit the transformer"):
        adjoint_matching(tmp_path, tiny_pipeline, lora=LoraConfig(r=2, target_modules=["nothing"]))
    assert state_of(tiny_pipeline) == before
    tiny_pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"]))


def test_parts_go_back_to_the_device_they_came_from():
    """`meta` stands for an accelerator that this machine may lack; an adapter that came since goes there too."""
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to("meta", torch.bfloat16)
    given = PartState(network)
    network.to_empty(device="cpu").float().append(nn.Linear(2, 2))
    given.restore(())
    assert {t.device.type for t in [*network.parameters(), *network.buffers()]} == {"meta"}
    assert {network[0].weight.dtype, network[1].running_mean.dtype} == {torch.bfloat16}
    assert (network[1].num_batches_tracked.dtype, network[2].weight.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize(("first", "second"), [
    ("ACFlowTrainer", "ACFlowTrainer"), ("AdjointMatchingTrainer", "TAFSGRPOTrainer"),
])  # fmt: skip
def test_a_second_trainer_goes_on_as_on_a_fresh_pipeline_with_the_adapter(tmp_path, first, second):
    used = tiny_sd3()
    t = make_trainer(first, tmp_path / "first", used, learning_rate=0.05)
    t.train()
    t.save_model()
    with pytest.raises(ValueError, match=r"already carries a LoRA: .* or pass no `peft_config` to train that one"):
        make_trainer(second, tmp_path / "refused", used)
    fresh = tiny_sd3()
    fresh.load_lora_weights(str(tmp_path / "first"))
    for name, pipeline in (("used", used), ("fresh", fresh)):
        t = make_trainer(second, tmp_path / name, pipeline, lora=False, learning_rate=0.05)
        t.train()
        t.save_model()
    before, a, b = (load_file(tmp_path / name / ADAPTER) for name in ("first", "used", "fresh"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], before[name]) for name in a)


def test_a_decoder_that_was_rounded_gets_its_numbers_back(tmp_path):
    pipeline = tiny_sd3()
    before = {name: tensor.clone() for name, tensor in pipeline.vae.state_dict().items()}
    t = make_trainer("TAFSGRPOTrainer", tmp_path, pipeline, decoder_dtype="bfloat16")
    assert pipeline.vae.dtype == torch.bfloat16
    for _ in range(2):
        t.evaluate(["a red circle"])
        assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.vae.state_dict().items())
    with t.at_work():
        assert pipeline.vae.dtype == torch.bfloat16


def test_a_decoder_that_overflows_in_float16_is_refused(tmp_path):
    pipeline = tiny("aura flow")
    assert pipeline.vae.config.force_upcast
    with pytest.raises(
        ValueError, match=r"^`decoder_dtype` \('float16'\) is too narrow for the decoder of this model"
    ):
        make_trainer("ACFlowTrainer", tmp_path, pipeline, decoder_dtype="float16", **FAMILIES["aura flow"][1])
