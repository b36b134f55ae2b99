"""What only a GPU can show; skipped where there is none."""

import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

import flowrl_trainers
from flowrl_trainers import FlowPipeline, TAFSGRPOTrainer
from flowrl_trainers.rewards.preprocessing import resize_and_crop
from flowrl_trainers.shapes import load_pipeline, prompts
from flowrl_trainers.sit import SiTPipeline

from .helpers import TRAINERS, redness, seeds
from .runs import assert_same, run
from .tiny import tiny_sd3
from .tiny_families import FAMILIES, GUIDANCE, PROMPTS, stock, tiny
from .tiny_sit import CLASS_PROMPTS, original_checkpoint, tiny_sit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def _float32_is_float32():
    """TF32 has 10 bits, with which no two computations agree to 1e-4."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def sit(folder: Path):
    """A tiny SiT, converted from a random checkpoint of the original layout."""
    torch.save(original_checkpoint(), folder / "tiny.pt")
    return tiny_sit(folder / "tiny.pt")


OTHERS = {
    "stable diffusion 3": (lambda folder: tiny_sd3(), PROMPTS, {"height": 32, "width": 48, "max_sequence_length": 8}),
    "sit": (sit, CLASS_PROMPTS, {"height": 8, "width": 16}),
}


def train(folder: Path, trainer: str, pipeline, device: str = "cuda", **settings):
    """Three updates of four images on the prompts of the shapes, or on four classes."""
    cls = getattr(flowrl_trainers, trainer)
    config = cls.config_class(
        **{
            "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "num_inference_steps": 3,
            "learning_rate": 0.01, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "use_cpu": device == "cpu", "log_images": 2,
        } | TRAINERS[trainer] | settings
    )  # fmt: skip
    if isinstance(pipeline, SiTPipeline):
        asked, judge = Dataset.from_dict({"prompt": [*CLASS_PROMPTS, "tench", "volcano"]}), redness
        held_out = asked
    else:
        asked, judge = prompts("train"), "shapes"
        held_out = Dataset.from_dict({"prompt": list(prompts("held_out")["prompt"])[:2] * 2})
    t = cls(
        pipeline, redness, config, asked, held_out, eval_reward_funcs=judge, peft_config=LoraConfig(r=2, lora_alpha=6)
    )
    assert t.args.device.type == device
    t.train()
    return t


def adapter(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().float().cpu() for name, p in trainer.model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(("family", "guidance"), [(f, g) for f, cases in GUIDANCE.items() for g in cases])
def test_parity_with_the_stock_pipeline_on_the_gpu(family, guidance):
    pipeline = tiny(family).to("cuda")
    flow = FlowPipeline.from_pipeline(pipeline, **FAMILIES[family][1], **guidance, height=32, width=64)
    ours, theirs = flow.sample(PROMPTS, 4, generator=seeds(2)), stock(family, pipeline, flow)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("family", OTHERS)
def test_parity_of_stable_diffusion_3_and_sit_on_the_gpu(tmp_path, family, guidance_scale):
    make, asked, settings = OTHERS[family]
    pipeline, settings = make(tmp_path).to("cuda"), settings | {"guidance_scale": guidance_scale}
    ours = FlowPipeline.from_pipeline(pipeline, **settings).sample(asked, 4, generator=seeds(2))
    theirs = pipeline(list(asked), num_inference_steps=4, generator=seeds(2), output_type="pt", **settings).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_every_family_trains_in_bfloat16(tmp_path, family, trainer):
    """The transformer in bfloat16, the text encoders in float32; the base stays as it was bit for bit."""
    if family in FAMILIES:
        pipeline, settings = tiny(family), {"height": 32, "width": 32} | FAMILIES[family][1]
    else:
        make, _, settings = OTHERS[family]
        pipeline = make(tmp_path)
    pipeline.transformer.to(torch.bfloat16)
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    t = train(tmp_path / "run", trainer, pipeline, bf16=True, **settings)
    assert all(p.isfinite().all() for p in adapter(t).values())
    assert any(p.abs().max() > 0 for name, p in adapter(t).items() if "lora_B" in name)
    after = {
        n.replace(".base_layer", ""): v.cpu() for n, v in t.flow.transformer.state_dict().items() if "lora_" not in n
    }
    assert all(torch.equal(before[name], value) for name, value in after.items())
    t.evaluate()
    assert t.rows["tuned"]["velocity_distance"] > 0
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    ("trainer", "precision"),
    [(t, p) for t in TRAINERS for p in ("float32", "bf16", "fp16")],
)
def test_the_gpu_learns_what_the_cpu_learns(tmp_path, trainer, precision):
    """The same noise and prompts, two updates (AC-Flow's first is its warm-up). Adam moves each parameter by about the
    learning rate in the direction of its gradient's sign: where the signs agree, so do the adapters.
    """
    settings = {"guidance_scale": 1.0, "max_sequence_length": 8, "num_inference_steps": 4, "max_steps": 2}
    half = {} if precision == "float32" else {precision: True}
    cpu = adapter(train(tmp_path / "cpu", trainer, load_pipeline(), device="cpu", **settings))
    gpu = adapter(train(tmp_path / "gpu", trainer, load_pipeline(), **settings, **half))
    a, b = (torch.cat([p.flatten() for name, p in adapted.items() if "lora_B" in name]) for adapted in (cpu, gpu))
    cosine = float(torch.cosine_similarity(a, b, dim=0))
    assert cosine > (0.99 if precision == "float32" else 0.7)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_on_the_gpu_goes_on_bit_for_bit(tmp_path, trainer):
    """With `full_determinism`, without which some kernels add in the order in which threads finish."""
    config = {
        "use_cpu": False, "full_determinism": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "steps_per_generation": 4, "num_generations": 2, "max_steps": 6, "save_steps": 1, "learning_rate": 0.01,
    }  # fmt: skip
    done = run(tmp_path / "whole", trainer, config)
    assert done.returncode == 0, done.stderr
    killed = run(tmp_path / "cut", trainer, config, kill_at=3)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(tmp_path / "cut", trainer, config, resume=True)
    assert resumed.returncode == 0, resumed.stderr
    result, expected = (torch.load(tmp_path / name / "result.pt", map_location="cpu") for name in ("cut", "whole"))
    for part in ("weights", "optimizer", "state"):
        assert_same(result[part], expected[part])


def test_pictures_are_resized_alike_every_time_on_the_gpu(monkeypatch):
    """Of rewards that resize, as all with a vision tower do, torch's own gradient is refused by `full_determinism`."""
    images, weight = (
        torch.rand(4, 3, 512, 384, device="cuda", requires_grad=True),
        torch.rand(4, 3, 224, 224, device="cuda"),
    )
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            torch.autograd.grad((resize_and_crop(images, 224) * weight).sum(), images)[0] for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_replayed_ratios_are_one_on_the_gpu(tmp_path, precision, checkpointing):
    """Rollout and replay see the same batches, so that they agree to rounding even in half precision."""
    half = {} if precision == "float32" else {precision: True}
    t = train(
        tmp_path, TAFSGRPOTrainer.__name__, load_pipeline(), guidance_scale=1.0, max_sequence_length=8,
        num_inference_steps=4, activation_checkpointing=checkpointing, **half,
    )  # fmt: skip
    errors = [row["replay_ratio_error"] for row in t.state.log_history if "replay_ratio_error" in row]
    assert len(errors) == 3
    assert max(errors) <= 1e-6


@pytest.mark.parametrize("ema", [None, 0.9])
def test_full_fine_tuning_and_a_moving_average_on_the_gpu(tmp_path, ema):
    """The frozen copy and the average are where the network is."""
    cls = flowrl_trainers.AdjointMatchingTrainer
    config = cls.config_class(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_inference_steps=3, adjoint_steps=2,
        bf16=True, ema_decay=ema, control_to_velocity_ratio=0.3, guidance_scale=1.0, max_sequence_length=8,
        report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    held_out = Dataset.from_dict({"prompt": list(prompts("held_out")["prompt"])[:2] * 2})
    t = cls(load_pipeline(), "shapes", config, prompts("train"), held_out)
    t.train()
    t.evaluate()
    assert t.rows["tuned"]["velocity_distance"] > 0
    t.save_model()
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").exists()


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_the_pipeline_goes_back_to_the_device_it_came_from(tmp_path, place):
    """Also the adapter; an evaluation afterwards takes the parts, and gives them back."""
    pipeline = tiny_sd3().to(place)
    t = train(tmp_path, "TAFSGRPOTrainer", pipeline, guidance_scale=1.0, max_sequence_length=8)
    for work in (lambda: None, t.evaluate, t.train):
        work()
        parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        assert {p.device.type for part in parts for p in part.parameters()} == {place}
    assert t.rows["tuned"]["velocity_distance"] > 0
