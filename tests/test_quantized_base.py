"""A LoRA on a quantised base model: what is learned, what stays, and what is refused."""

import itertools
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

import flowrl_trainers
from flowrl_trainers import ACFlowTrainer, FlowRLTrainer
from flowrl_trainers.cli import run
from flowrl_trainers.cli.demo import demo
from flowrl_trainers.flow.adjoint import vector_jacobian_product
from flowrl_trainers.pipelines.quantization import (
    PACKAGES,
    check_quantization,
    computing_dtype,
    is_quantized,
    stored_tensors,
)
from flowrl_trainers.run_folder.identity import weights_identity
from flowrl_trainers.sampling.buffer import MicroBatch
from flowrl_trainers.shapes import load_pipeline

from .helpers import CAPTIONS, FIXED_TARGET, FORMS, first_rollout, make_trainer, redness, seeds, trainer_of
from .quantized import KINDS, dequantized, quantize
from .tiny import tiny_sd3
from .tiny_families import FAMILIES, tiny

SETTINGS = {"sd 3": {"max_sequence_length": 8, "guidance_scale": 1.0}} | {
    family: FAMILIES[family][1] for family in ("flux", "flux 2 klein", "qwen image")
}
QUICK = {  # each kind, family and form at least once
    ("nf4", "AdjointMatchingTrainer", "sd 3"), ("int8", "ACFlowTrainer", "flux"),
    ("float8", "VGGFlowTrainer", "sd 3"), ("nf4", "DiffusionNFTTrainer", "qwen image"),
    ("int8", "TAFSGRPOTrainer", "flux 2 klein"),
    ("int8", FIXED_TARGET, "sd 3"),
}  # fmt: skip
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in itertools.product(KINDS, FORMS, SETTINGS)
]


def pipeline_of(family: str) -> Any:
    return tiny_sd3() if family == "sd 3" else tiny(family)


TOLERANCE = 1e-4


def make(folder: Path, name: str, pipeline: Any, family: str) -> FlowRLTrainer:
    """A trainer for one update of four images, by a LoRA that is not zero at the start."""
    cls = getattr(flowrl_trainers, trainer_of(name))
    short = {"critic_warmup_max_steps": 0} if cls is ACFlowTrainer else {}
    config = cls.config_class(
        **{
            "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 4, "num_inference_steps": 3,
            "learning_rate": 0.01, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
            "height": 32, "width": 32,
        } | FORMS[name] | SETTINGS[family] | short
    )  # fmt: skip
    lora = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)
    return cls(pipeline, redness, config, Dataset.from_dict({"prompt": CAPTIONS}), peft_config=lora)


def frozen_tensors(network: nn.Module) -> dict[str, Tensor]:
    """What the base model consists of, by the names that its parameters had before the adapter came."""
    return {
        f"{name.replace('.base_layer', '')}/{number}": stored.detach().clone()
        for name, parameter in network.named_parameters()
        if "lora_" not in name
        for number, stored in enumerate(stored_tensors(parameter))
    }


def base_velocity(t: FlowRLTrainer) -> Tensor:
    """That of the base model at two noises."""
    x, sigma = t.flow.initial_latents(2, seeds(2)), torch.tensor([0.3, 0.9])
    conditioning = t.conditioning(CAPTIONS[:2], torch.device("cpu"))
    with torch.no_grad(), t.model.reference():
        return t.model(x, sigma, conditioning, guidance=True)


def gradient(t: FlowRLTrainer, batches: list[MicroBatch]) -> Tensor:
    """Of the loss of a rollout, with respect to the LoRA."""
    t.buffer.reset()
    t.buffer.batches = batches
    batch = t.buffer.take()
    t.model.train()
    losses = [
        t.micro_batch_losses(t.model, batch, t.condition(batch.examples), state)
        for state in range(t.num_trained_states)
    ]
    lora = [p for name, p in t.model.named_parameters() if "lora_" in name]
    return torch.cat([g.flatten() for g in torch.autograd.grad(torch.stack(losses).mean(), lora)])


def product(t: FlowRLTrainer) -> Tensor:
    """The vector-Jacobian product of the base model, as adjoints take it."""
    x, sigma = t.flow.initial_latents(2, seeds(2)), torch.tensor([0.3, 0.9])
    conditioning = t.conditioning(CAPTIONS[:2], torch.device("cpu"))
    with t.model.reference():
        found, _ = vector_jacobian_product(
            lambda x, sigma: t.model(x, sigma, conditioning, guidance=True), x, sigma, torch.ones_like(x)
        )
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to the length of b."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("kind", "name", "family"), CASES)
def test_an_update_on_a_quantised_base(tmp_path, kind, name, family):
    """The gradients of loss and base model are those on the dequantised base but for the rounding of float32: a chain
    of some 30 products of up to 64 terms, each good to 64 units of 6e-8 at worst. What the quantisation itself changed
    is 20 times as much. One update changes the adapter alone, whose file the stock loader puts onto the unquantised
    model.
    """
    pipeline, twin = pipeline_of(family), pipeline_of(family)
    plain = base_velocity(make(tmp_path / "plain", name, pipeline_of(family), family))
    quantize(pipeline.transformer, kind)
    twin.transformer = dequantized(pipeline.transformer)
    assert is_quantized(pipeline.transformer)
    assert not is_quantized(twin.transformer)
    before = frozen_tensors(pipeline.transformer)
    t, on_twin = (make(tmp_path / str(n), name, p, family) for n, p in enumerate((pipeline, twin)))
    velocity = base_velocity(t)
    assert distance(velocity, plain) > 20 * TOLERANCE
    assert distance(velocity, base_velocity(on_twin)) < TOLERANCE
    assert distance(product(t), product(on_twin)) < TOLERANCE
    _, batches = first_rollout(t)
    assert distance(gradient(t, batches), gradient(on_twin, batches)) < TOLERANCE

    t.train()
    after = frozen_tensors(t.flow.transformer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], value) for key, value in after.items())
    assert torch.equal(base_velocity(t), velocity)
    learned, start = t.model.trained_tensors(), on_twin.model.trained_tensors()
    moved = [name for name in learned if not torch.equal(learned[name], start[name])]
    assert any("lora_" in name for name in moved)
    assert {value.dtype for value in learned.values()} == {torch.float32}
    t.save_model()
    stock = pipeline_of(family)
    stock.load_lora_weights(str(tmp_path / "0"))
    loaded = get_peft_model_state_dict(stock.transformer, adapter_name=stock.get_active_adapters()[0])
    saved = get_peft_model_state_dict(t.flow.transformer, adapter_name="default")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)


# ---- how it is asked for --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny pipeline on disk."""
    path = tmp_path_factory.mktemp("pipeline")
    tiny_sd3().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_a_model_that_is_named_is_loaded_in_eight_bits(tmp_path, folder, kind):
    """As torchao quantises the float32 weights itself; an update, the file and the card follow. The identity of the
    run tells the weights of one kind from those of another.
    """
    bits = {"quantization": kind, "text_encoder_quantization": "int8"}
    t = make_trainer("AdjointMatchingTrainer", tmp_path, folder, max_steps=1, **bits)
    ours = tiny_sd3().transformer
    quantize(ours, kind)
    expected, found = frozen_tensors(ours), frozen_tensors(t.flow.transformer)
    assert all(torch.equal(expected[key], found[key]) for key in expected | found)
    assert all(is_quantized(encoder) for encoder in t.flow.text_encoders())
    t.train()
    t.save_model()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"`base model in training` | quantised ({kind})" in card
    assert "`text encoders` | quantised (int8)" in card
    identity = t._identity()
    assert identity["quantization"] == kind
    assert identity["base model"] == weights_identity(ours)
    ours.transformer_blocks[0].attn.to_q.weight.scale.mul_(2)
    assert identity["base model"] != weights_identity(ours)
    stock = tiny_sd3()
    stock.load_lora_weights(str(tmp_path))
    assert stock.get_active_adapters()


def test_a_base_in_four_bits_is_known_by_its_numbers_and_scales():
    first, second = tiny_sd3().transformer, tiny_sd3().transformer
    assert weights_identity(first.requires_grad_(False)) != weights_identity(second)
    quantize(first, "nf4")
    quantize(second.requires_grad_(False), "nf4")
    assert weights_identity(first) == weights_identity(second)
    second.transformer_blocks[0].attn.to_q.weight.quant_state.absmax.mul_(2)
    assert weights_identity(first) != weights_identity(second)


@pytest.mark.parametrize("kind", KINDS)
def test_full_fine_tuning_of_a_quantised_base_is_refused(tmp_path, kind):
    pipeline = tiny_sd3()
    quantize(pipeline.transformer, kind)
    with pytest.raises(
        ValueError, match=r"All weights would be trained, .* are quantised, .*: pass a `peft.LoraConfig"
    ):
        make_trainer("AdjointMatchingTrainer", tmp_path, pipeline, lora=False)


@pytest.mark.parametrize(("run", "layers", "weights", "refused"), [
    ("no", torch.float32, torch.float32, None), ("bf16", torch.bfloat16, torch.bfloat16, None),
    ("bf16", torch.float32, torch.float32, "float32 where the run computes in torch.bfloat16, which compiled blocks"),
    ("bf16", torch.float32, torch.bfloat16, "float32 where the run computes in torch.bfloat16"),
    ("bf16", torch.bfloat16, torch.float32, "float32 where the run computes in torch.bfloat16"),
    ("fp16", torch.bfloat16, torch.float16, "bfloat16 where the run computes in torch.float16"),
])  # fmt: skip
def test_four_bits_are_compiled_in_one_precision(tmp_path, run, layers, weights, refused):
    """In which the layers compute and have their bias; else bitsandbytes converts the bias in place: torch raises."""
    pipeline = tiny_sd3()
    pipeline.transformer.to(weights)
    quantize(pipeline.transformer, "nf4")
    for layer in pipeline.transformer.modules():
        if isinstance(layer, Linear4bit):
            layer.compute_dtype = layers
    settings = {"compile_blocks": True} | ({} if run == "no" else {run: True})
    with nullcontext() if refused is None else pytest.raises(ValueError, match=refused):
        make_trainer("AdjointMatchingTrainer", tmp_path, pipeline, **settings)


@pytest.mark.parametrize(("kind", "package"), [("nf4", "bitsandbytes"), ("int8", "torchao"), ("float8", "torchao")])
def test_a_package_that_is_missing_is_named(monkeypatch, kind, package):
    gpu = torch.device("cuda")
    check_quantization({"quantization": kind}, gpu)
    monkeypatch.setitem(PACKAGES, kind, (package, lambda: False))
    with pytest.raises(
        ValueError, match=f"`quantization` is '{kind}', which needs {package}: `pip install {package}`"
    ):
        check_quantization({"quantization": kind}, gpu)


def test_checkpointing_changes_nothing_on_a_quantised_base(tmp_path):
    """In bfloat16, with the adjoint that is taken with the adapter off and on."""
    learned = []
    for on in (False, True):
        pipeline = tiny_sd3()
        quantize(pipeline.transformer, "int8")
        settings = {"bf16": True, "learning_rate": 0.1, "adjoint": "full", "activation_checkpointing": on}
        t = make_trainer("AdjointMatchingTrainer", tmp_path / str(on), pipeline, **settings)
        t.train()
        learned.append(torch.cat([p.detach().flatten() for p in t.trained_parameters()]))
    assert torch.equal(*learned)


@pytest.mark.slow
def test_the_demo_gains_on_an_int8_base_what_it_gains_in_float32(tmp_path, monkeypatch):
    """Points of the checker on held-out prompts, of the tuned row above the base's: within 3."""
    gains = []
    for kind in (None, "int8"):

        def pipeline(kind: str | None = kind) -> Any:
            made = load_pipeline()
            if kind is not None:
                quantize(made.transformer, kind)
            return made

        monkeypatch.setattr(run, "load_pipeline", pipeline)
        demo(["--output_dir", str(tmp_path / str(kind))])
        rows = json.loads((tmp_path / str(kind) / "metrics.json").read_text())
        gains.append(rows["tuned"]["checker_accuracy"] - rows["base"]["checker_accuracy"])
    print(gains)
    assert gains[0] > 0.1
    assert gains[1] == pytest.approx(gains[0], abs=0.03)


def test_the_precision_of_a_network_in_four_bits_is_not_that_of_its_adapter():
    """All of FLUX.2 before its first adapted layer is in 4 bits, so that the first number of floating point is the
    adapter's, in float32.
    """
    pipeline = tiny("flux 2")
    network = pipeline.transformer.to(torch.bfloat16)
    quantize(network, "nf4")
    network.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"]))
    cast_training_params(network, dtype=torch.float32)
    assert (network.dtype, computing_dtype(network)) == (torch.float32, torch.bfloat16)
