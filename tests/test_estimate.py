"""What `flowrl estimate` says, against counts by hand, allocations on a CPU, and published measurements."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from diffusers import AutoencoderTiny
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from flowrl_trainers import ACFlowConfig, ACFlowTrainer
from flowrl_trainers.cli import main
from flowrl_trainers.cli.arguments import TRAINERS
from flowrl_trainers.cli.estimate import read_anywhere
from flowrl_trainers.cost import Call, Drawing, Kind, Phase
from flowrl_trainers.cost.architectures import META, find, known_names
from flowrl_trainers.cost.conditioning import blank_conditioning
from flowrl_trainers.cost.encoders import encoder_bytes
from flowrl_trainers.cost.estimate import Estimate, Estimator, PhaseCost, linear_layers, quantized_size
from flowrl_trainers.cost.meter import metered
from flowrl_trainers.cost.rewards import BlankReward, blank_of, blank_reward
from flowrl_trainers.cost.run import blank_reward_decoder, taken
from flowrl_trainers.cost.table import lower
from flowrl_trainers.networks import value_network
from flowrl_trainers.pipelines import FlowPipeline
from flowrl_trainers.pipelines.quantization import quantization_config, stored_tensors
from flowrl_trainers.pipelines.tiny_decoder import TinyDecoder
from flowrl_trainers.rewards import CLIPScore, RemoteReward, as_rewards
from flowrl_trainers.shapes import load_pipeline
from flowrl_trainers.trainers import base_trainer

from .helpers import architecture_of, redness
from .quantized import quantize
from .tiny import tiny_autoencoder, tiny_sd3
from .tiny_families import FAMILIES, tiny

PROMPT = "a red circle"
ROOT = Path(__file__).parent.parent
MODELS = {
    "sd3": (tiny_sd3, {"max_sequence_length": 8}),
    "flux": (lambda: tiny("flux"), {"max_sequence_length": 64}),
    "z image": (lambda: tiny("z image"), {"max_sequence_length": 64, "guidance_scale": 0.0}),
}


# ---- bytes -------------------------------------------------------------------------------------------------------


def allocated(work: Any) -> int:
    """The most bytes that torch's allocator had given out at the end of any operation of some work, as its profiler saw
    them. What an operation needs for itself and gives back differs from CPU to CPU: a convolution without AVX unfolds
    its input, which is a tenth of the memory here.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    found = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]"]
    ends = [(e.start_ns() + e.duration_ns(), None) for e in found if e.name().startswith("aten::")]
    alive = peak = 0
    for _, change in sorted(changes + ends, key=lambda event: event[0]):
        alive += change or 0
        peak = max(peak, alive) if change is None else peak
    return peak


def real_work(flow: FlowPipeline, kind: Kind, batch: int) -> Any:
    """The same call on the CPU, with numbers."""
    encoded = flow.encode_prompts([PROMPT] * batch)
    generator = torch.Generator().manual_seed(0)
    latents, sigma = flow.initial_latents(batch, generator), torch.full((batch,), 0.5)

    def velocity(x: torch.Tensor) -> torch.Tensor:
        conditioning = {name: value.clone() for name, value in encoded.items()}
        return flow.velocity(flow.transformer, x, sigma, conditioning, guidance=False)

    def product() -> None:
        x = latents.clone().requires_grad_()
        v = velocity(x)
        torch.autograd.grad(v, x, torch.empty_like(v))

    def reward_gradient() -> None:
        x = latents.clone().requires_grad_()
        torch.autograd.grad(redness(flow.decode(x).clone(), [""] * batch).sum(), x)

    def work() -> None:
        match kind:
            case Kind.FORWARD:
                with torch.no_grad():
                    velocity(latents.clone())
            case Kind.BASE_PRODUCT:
                flow.transformer.disable_adapters()
                product()
                flow.transformer.enable_adapters()
            case Kind.TRAIN:
                velocity(latents.clone()).square().mean().backward()
            case Kind.DECODE:
                with torch.no_grad():
                    flow.images(latents.clone())
            case Kind.REWARD_GRADIENT:
                reward_gradient()

    return work


@pytest.mark.parametrize(
    ("name", "checkpointing"), [*((name, False) for name in MODELS), ("sd3", True)], ids=lambda value: str(value)
)
def test_bytes_of_every_call_are_those_that_a_cpu_allocates(monkeypatch, name, checkpointing):
    """Within 5 %, for pictures of 64 pixels, where activations outweigh what kernels need for themselves.

    A backward pass adds to gradients that are there.
    """
    make, settings = MODELS[name]
    pipeline = make()
    settings = settings | {"height": 64, "width": 64}
    lora = LoraConfig(r=4, lora_alpha=4)
    estimator = Estimator(
        architecture_of(pipeline).flow(torch.float32, settings), [BlankReward("redness", None)], lora,
        checkpointing=checkpointing,
    )  # fmt: skip
    flow = FlowPipeline.from_pipeline(pipeline, **settings)
    flow.transformer.requires_grad_(False)
    flow.pipeline.vae.requires_grad_(False)
    flow.transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=list(flow.lora_target_modules)))
    cast_training_params(flow.transformer, dtype=torch.float32)
    if checkpointing:
        for network in (flow.transformer, *flow.decoders()):
            network.enable_gradient_checkpointing()
    # A tiny pipeline's tokenizers are shorter than published ones, so both get what they make of one prompt.
    encoded = flow.encode_prompts([PROMPT] * 4)
    monkeypatch.setattr(
        "flowrl_trainers.cost.estimate.blank_conditioning",
        lambda *_: {n: v.clone() if "mask" in n else torch.zeros_like(v, device=META) for n, v in encoded.items()},
    )
    for kind in (Kind.FORWARD, Kind.BASE_PRODUCT, Kind.TRAIN, Kind.DECODE, Kind.REWARD_GRADIENT):
        work = real_work(flow, kind, 4)
        work()  # what is made once, such as tables of positions and gradients
        measured, estimated = allocated(work), estimator.work(Call(kind, 4, 1, Phase.UPDATE)).peak
        assert estimated == pytest.approx(measured, rel=0.05), kind


def test_an_update_of_vgg_flow_holds_the_graph_of_the_value_network_too(monkeypatch):
    """As its loss asks both networks before either is differentiated; within 5 % of what a CPU allocates."""
    pipeline, settings = tiny_sd3(), {"max_sequence_length": 8, "height": 64, "width": 64}
    lora = LoraConfig(r=4, lora_alpha=4)
    blank = architecture_of(pipeline).flow(torch.float32, settings)
    estimator = Estimator(blank, [BlankReward("redness", None)], lora, head="value_network")
    flow = FlowPipeline.from_pipeline(pipeline, **settings)
    flow.transformer.requires_grad_(False)
    flow.transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=list(flow.lora_target_modules)))
    encoded = flow.encode_prompts([PROMPT] * 2)
    monkeypatch.setattr(
        "flowrl_trainers.cost.estimate.blank_conditioning",
        lambda _, count, *__: {
            n: torch.zeros_like(v[:1], device=META).expand(count, *v.shape[1:]).clone() for n, v in encoded.items()
        },
    )
    features, mask = flow.prompt_features(encoded)
    latents = flow.initial_latents(2, torch.Generator().manual_seed(0))
    network = value_network(latents.shape[1:], features.shape[-1])

    def work() -> None:
        conditioning = {name: value.clone() for name, value in encoded.items()}
        v = flow.velocity(flow.transformer, latents.clone(), torch.full((2,), 0.5), conditioning, guidance=False)
        z = latents.clone().repeat(3, 1, 1, 1)
        c = network(z, torch.full((6,), 0.5), features.float().repeat(3, 1, 1), mask.repeat(3, 1))
        (v.square().mean() + c.square().mean()).backward()

    work()
    calls = [Call(Kind.HEAD_TRAIN, 6, 1, Phase.UPDATE), Call(Kind.TRAIN, 2, 1, Phase.UPDATE)]
    update = estimator.estimate(calls, [], 1, 0, []).phases[str(Phase.UPDATE)]
    assert update.parts["largest call"] == pytest.approx(allocated(work), rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_of_every_family_is_called_without_its_weights(family):
    settings = {"height": 32, "width": 32, **FAMILIES[family][1]}
    flow = architecture_of(tiny(family)).flow(torch.float32, settings)
    estimator = Estimator(flow, [BlankReward("redness", None)], LoraConfig(r=4, lora_alpha=4))
    assert estimator.work(Call(Kind.TRAIN, 2, 1, Phase.UPDATE)).peak > 0


def test_attention_and_norms_are_counted_as_fused_kernels_keep_them():
    """Queries, keys, values, output and a number a row; a norm keeps its input and a number a row, and no product."""
    with metered() as meter:
        x = torch.empty(2, 3, 50, 8, device=META, requires_grad=True)
        normed = torch.nn.functional.rms_norm(x, (8,))
        out = torch.nn.functional.scaled_dot_product_attention(normed, normed, normed)
    rows = 2 * 3 * 50
    assert meter.peak == 4 * (rows * 8 + (rows * 8 + rows) + (rows * 8 + rows))
    assert meter.flop == 2 * (2 * rows * 50 * 8)  # two products, and five more in the backward pass
    out.sum().backward()
    assert meter.flop == 7 * (2 * rows * 50 * 8)


def test_autocast_is_counted_as_on_a_gpu():
    """A product keeps its inputs in half precision and returns it; a norm computes and returns float32."""
    weight, x = torch.empty(4, 8, device=META), torch.empty(2, 8, device=META)
    with metered(torch.bfloat16):
        half = torch.nn.functional.linear(x, weight)
        assert half.dtype == torch.bfloat16
        assert torch.nn.functional.layer_norm(half, (4,)).dtype == torch.float32
    with metered():
        assert torch.nn.functional.linear(x, weight).dtype == torch.float32


def test_autocast_keeps_what_it_casts_of_trained_weights():
    """As on a CPU: until the forward pass ends, so that all weights are held twice; not where it is told not to, as for
    a network that is shared by processes.
    """
    layers, x = [torch.nn.Linear(500, 500, bias=False) for _ in range(8)], torch.zeros(4, 500)
    blank = [torch.nn.Linear(500, 500, bias=False, device=META) for _ in layers]

    def forward(layers, x):
        with torch.no_grad():
            for layer in layers:
                x = layer(x)

    peaks = []
    for keeps in (True, False):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=keeps):
            forward(layers, x)  # what kernels make once
        torch.clear_autocast_cache()

        def work(keeps=keeps):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=keeps):
                forward(layers, x)

        with metered(torch.bfloat16, keeps) as meter:
            forward(blank, x.to(META))
        assert meter.peak == pytest.approx(allocated(work), rel=0.05)
        peaks.append(meter.peak)
    assert peaks[0] > 7 * peaks[1]


def test_blocks_that_are_computed_twice_are_so_in_the_precision_of_the_run():
    """torch compares: it raises where a block returns other shapes or precisions the second time."""
    flow = architecture_of(tiny_sd3()).flow(torch.bfloat16, {"max_sequence_length": 8})
    whole = Estimator(flow, [], None, torch.bfloat16, checkpointing=True)
    assert whole.work(Call(Kind.TRAIN, 1, 1, Phase.UPDATE)).flop > 0


# ---- operations --------------------------------------------------------------------------------------------------


def operations_of_sit(pictures: int) -> int:
    """28 blocks of width 1152: 12 d^2 weights a token, attention over 1024 tokens, 6 d^2 of modulation a picture."""
    d, n = 1152, 32 * 32
    block = n * 12 * d**2 + 2 * n**2 * d + 6 * d**2
    return 2 * pictures * (28 * block + n * d * (16 + 16) + 2 * d**2 + 256 * d + d**2)


def operations_of_stable_diffusion_3_5(pictures: int) -> int:
    """24 joint blocks of width 1536 on 1024 tokens of the picture and 333 of the prompt.

    13 of them attend to the picture once more; the last one does nothing with the prompt after its attention.
    """
    d, n, m = 1536, 32 * 32, 333
    joint = 24 * (12 * n * d**2 + 2 * (n + m) ** 2 * d) + 23 * 12 * m * d**2 + 3 * m * d**2
    dual = 13 * (4 * n * d**2 + 2 * n**2 * d)
    modulation = 24 * 12 * d**2 + 13 * 3 * d**2
    return 2 * pictures * (joint + dual + modulation + m * 4096 * d)


def operations_of_flux_2_klein(pictures: int) -> int:
    """25 blocks of width 3072 with 13 d^2 weights a token (SwiGLU of three times the width), 1024 + 512 tokens."""
    d, n = 3072, 32 * 32 + 512
    return 2 * pictures * (25 * (13 * n * d**2 + 2 * n**2 * d) + 512 * 7680 * d)


@pytest.mark.parametrize(
    ("model", "by_hand"),
    [
        ("SiT-XL/2", operations_of_sit),
        ("stabilityai/stable-diffusion-3.5-medium", operations_of_stable_diffusion_3_5),
        ("black-forest-labs/FLUX.2-klein-4B", operations_of_flux_2_klein),
    ],
)
def test_operations_of_a_forward_pass_are_those_counted_by_hand(model, by_hand):
    """Within 3 %, without the adapter."""
    settings = {"height": 512, "width": 512, "guidance_scale": 1.0}
    flow = find(model).flow(torch.bfloat16, settings)
    work = Estimator(flow, [], LoraConfig(r=32), torch.bfloat16).work(Call(Kind.BASE, 2, 1, Phase.TARGET))
    assert work.flop == pytest.approx(by_hand(2), rel=0.03)


# ---- a run -------------------------------------------------------------------------------------------------------


def write_run(folder: Path, **settings: Any) -> Path:
    """A run that only a machine with two GPUs could start."""
    lines = {"model": "SiT-XL/2", "dataset": "classes", "output_dir": str(folder / "out"), "bf16": True} | settings
    path = folder / "run.yaml"
    path.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in lines.items()))
    return path


def test_a_run_for_gpus_is_estimated_without_one(tmp_path, capsys):
    """Also its batch: 2 processes of 2 images fill the groups of 4, which one process would not."""
    settings = {"per_device_train_batch_size": 2, "num_generations": 4, "height": 256, "width": 256, "tf32": True}
    path = write_run(tmp_path, reward_funcs=["aesthetic", "jpeg_compressibility"], guidance_scale=1.0, **settings)
    command = ["estimate", "tafs_grpo", "--config", str(path), "--num_processes", "2"]
    assert main([*command, "--json"]) == 0
    with_two = capsys.readouterr().out
    assert main([*command[:-2], "--num_processes=2", "--json"]) == 0
    assert capsys.readouterr().out == with_two
    assert main([*command[:-1], "²"]) == 2
    assert "`--num_processes` ('²') must be a whole number from 1 on." in capsys.readouterr().err
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = {"peak_gib", "phases", "tflop_per_update", "calls", "calls_once", "peak_phase", "not_counted"}
    assert names == set(found)
    assert found["calls"] == {"forward": 4, "reward": 3, "decode": 3, "base_forward": 3, "forward_backward": 3}
    assert list(found["phases"]) == ["rollout", "decode and reward", "adjoint", "update"]
    for phase in found["phases"].values():
        assert phase["peak_gib"] == pytest.approx(sum(phase["gib"].values()))
    assert found["peak_gib"] == max(phase["peak_gib"] for phase in found["phases"].values())
    assert found["not_counted"] == []
    assert not (tmp_path / "out").exists()
    assert main(["estimate", "tafs_grpo", "--config", str(path)]) == 2
    assert "must be a multiple of `num_generations` (4)" in capsys.readouterr().err


def test_a_network_that_processes_share_is_estimated(tmp_path, capsys):
    """A share of weights, adapter, gradients and optimizer; what lies outside of the blocks and two of these, whole."""
    pipeline = tiny_sd3()
    pipeline.save_pretrained(tmp_path / "model")
    path = write_run(tmp_path, model=str(tmp_path / "model"), reward_funcs=["jpeg_compressibility"], bf16=False)
    command = ["estimate", "tafs_grpo", "--config", str(path), "--per_device_train_batch_size", "8", "--json"]
    command += ["--max_sequence_length", "8", "--height", "32", "--width", "32", "--num_processes", "2"]
    found = []
    for more in (["--lora_r", "0"], ["--lora_r", "0", "--accelerate_config", "fsdp2"]):
        assert main([*command, *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["phases"]["update"]["gib"])
    whole, shared = found
    network = pipeline.transformer
    size = {name: p.nbytes / 2**30 for name, p in network.named_parameters()}
    buffers = sum(b.nbytes for b in network.buffers()) / 2**30
    halved = {"trained weights": 1, "gradients": 1, "optimizer": 2}
    for part, times in halved.items():
        assert whole[part] == pytest.approx(times * sum(size.values()))
        assert shared[part] == pytest.approx(whole[part] / 2, rel=0.02)
    assert whole["weights"] - 2 * buffers == pytest.approx(sum(size.values()))  # of the frozen copy
    assert shared["weights"] - 2 * buffers == pytest.approx(sum(size.values()) / 2, rel=0.02)
    blocks = [sum(v for n, v in size.items() if n.startswith(f"transformer_blocks.{i}.")) for i in range(2)]
    assert len(network.transformer_blocks) == len(blocks)
    outside = sum(size.values()) - sum(blocks)
    assert whole["gathered"] == 0
    assert shared["gathered"] == pytest.approx(2 * (outside + 2 * max(blocks)))  # weights, and gradients of all
    assert shared["autoencoder"] == whole["autoencoder"] > 0
    assert main([*command[:-1], "1", "--accelerate_config", "fsdp2"]) == 2
    assert "`accelerate_config` is 'fsdp2', which shares the network among processes, but" in capsys.readouterr().err


def test_unknown_models_and_methods_are_refused(tmp_path, capsys):
    assert main(["estimate", "--config", "run.yaml"]) == 2
    assert "needs a method before its flags" in capsys.readouterr().err
    path = write_run(tmp_path, model="nobody/nothing", reward_funcs=["aesthetic"])
    assert main(["estimate", "tafs_grpo", "--config", str(path), "--per_device_train_batch_size", "16"]) == 2
    assert "'nobody/nothing') is no folder" in capsys.readouterr().err


def test_a_folder_is_read_without_its_weights(tmp_path):
    """The configuration files of a saved pipeline are enough."""
    pipeline = tiny_sd3()
    pipeline.save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    architecture = find(str(tmp_path))
    assert architecture.text_encoders() == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    for name in ("transformer", "vae", "text_encoder_3"):
        kept = {n: p.shape for n, p in pipeline.components[name].named_parameters()}
        assert {n: p.shape for n, p in architecture.part(name).named_parameters()} == kept


def test_every_architecture_that_ships_can_be_built():
    """And has the number of parameters that its card states, in billions, where it states one."""
    stated = {
        "stabilityai/stable-diffusion-3.5-large": 8.1,
        "black-forest-labs/FLUX.1-dev": 11.9,
        "black-forest-labs/FLUX.2-klein-4B": 3.9,
        "black-forest-labs/FLUX.2-klein-9B": 9.1,
        "black-forest-labs/FLUX.2-dev": 32.2,
        "Qwen/Qwen-Image": 20.4,
        "Tongyi-MAI/Z-Image": 6.2,
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers": 1.6,
    }
    for name in known_names():
        flow = find(name).flow(torch.bfloat16, {})
        size = sum(p.numel() for p in flow.transformer.parameters()) / 1e9
        assert size == pytest.approx(stated.get(name, size), abs=0.05), name


def test_the_embedded_pipeline_is_known_too():
    """Its transformer and its prompts have the shapes of the loaded one."""
    flow, loaded = find("shapes").flow(torch.float32, {}), FlowPipeline.from_pipeline(load_pipeline())
    assert {n: p.shape for n, p in flow.transformer.named_parameters()} == {
        n: p.shape for n, p in loaded.transformer.named_parameters()
    }
    blank, encoded = blank_conditioning(flow, 1, torch.float32), loaded.encode_prompts([PROMPT])
    assert {n: v.shape for n, v in blank.items() if "negative" not in n} == {
        n: v.shape for n, v in encoded.items() if "negative" not in n
    }


ROWS = {
    "stable_diffusion_3": "stabilityai/stable-diffusion-3.5-medium",
    "flux_2_klein": "black-forest-labs/FLUX.2-klein-4B",
    "sit": "SiT-XL/2",
}


def published_rows() -> list[tuple[str, str, int, float]]:
    """Model, method, sampler steps and peak memory in GiB of every row that was measured on an H100."""
    rows = []
    for name, model in ROWS.items():
        text = (ROOT / "docs" / "tables" / f"full_size_{name}.md").read_text(encoding="utf-8")
        for method, steps, gib in re.findall(r"^\|[^|]*\|[^|]*B \| ([^|]*) \| (\d+) \|[^|]*\| (\d+) \|$", text, re.M):
            rows.append((model, method, int(steps), float(gib)))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method", "steps", "measured"), published_rows())
def test_peak_memory_is_that_measured_on_an_h100(model, method, steps, measured):
    """Within 10 % in each row of `docs/tables/full_size_*.md`; no constant is fitted."""
    trainer = next(t for t in TRAINERS.values() if t._name == method)
    settings = {"height": 512, "width": 512} | ({} if "klein" in model else {"guidance_scale": 1.0})
    bins = {"timestep_bins": min(5, steps - 1)} if method == "VGG-Flow" else {}
    critic = {"critic": "convolutional"} if method == "AC-Flow" else {}  # as it was measured
    config = read_anywhere(trainer.config_class, 1)(
        output_dir="unused", bf16=True, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        num_generations=4, num_inference_steps=steps, **settings, **bins, **critic,
    )  # fmt: skip
    flow = find(model).flow(torch.bfloat16, settings)
    reward = blank_reward("pickscore", torch.bfloat16)
    lora = LoraConfig(r=32, lora_alpha=32)
    estimator = Estimator(flow, [reward], lora, torch.bfloat16, config.head_kind, encoder_dtype=torch.bfloat16)
    drawing = Drawing(guided=False, decoded_together=4)
    found = estimator.estimate(config.calls(drawing), [], config.updates_on_rollout, 8 * config.latents_kept, [])
    assert found.peak_gib == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("settings", "part", "numbers"), [
    ({"ema_decay": 0.9}, "average", 4),
    ({"old_policy_decay": 0.0}, "old policy", -4),
    ({"optim": "sgd"}, "optimizer", -8),
    ({"optim": "sgd", "optim_args": "momentum=0.9"}, "optimizer", -4),
    ({"optim": "lion_32bit"}, "optimizer", -4),
    ({"optim": "adamw_8bit"}, "optimizer", -6),
])  # fmt: skip
def test_what_a_run_keeps_of_each_trained_number_is_counted(capsys, tmp_path, settings, part, numbers):
    """Beside a run of DiffusionNFT on all weights with AdamW, in bytes for each of them."""

    def parts(**more) -> dict[str, float]:
        path = write_run(tmp_path, reward_funcs=["jpeg_compressibility"], **more)
        assert main(["estimate", "diffusion_nft", "--config", str(path), "--lora_r", "0", "--json"]) == 0
        return json.loads(capsys.readouterr().out)["phases"]["update"]["gib"]

    plain, found = parts(), parts(**settings)
    count = plain["trained weights"] / 4
    assert found.get(part, 0) - plain.get(part, 0) == pytest.approx(numbers * count)
    assert {name: size for name, size in found.items() if name != part} == pytest.approx(
        {name: size for name, size in plain.items() if name != part}
    )


def test_the_average_holds_the_value_network_too(capsys, tmp_path):
    path = write_run(tmp_path, reward_funcs=["jpeg_compressibility"], ema_decay=0.9)
    assert main(["estimate", "vgg_flow", "--config", str(path), "--lora_r", "4", "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)["phases"]["update"]["gib"]
    assert parts["average"] == pytest.approx(parts["adapter"] + parts["head"])


def test_a_merged_adapter_and_the_precision_of_the_decoder_are_counted(capsys, tmp_path):
    def phases(**more) -> dict[str, dict[str, float]]:
        path = write_run(tmp_path, reward_funcs=["jpeg_compressibility"], bf16=False, **more)
        assert main(["estimate", "ac_flow", "--config", str(path), "--lora_r", "4", "--json"]) == 0
        return {name: cost["gib"] for name, cost in json.loads(capsys.readouterr().out)["phases"].items()}

    plain, merged, rounded = phases(), phases(merge_adapter=True), phases(decoder_dtype="bfloat16")
    assert 0 < merged["rollout"]["merged weights"] < plain["rollout"]["weights"]
    assert "merged weights" not in merged["update"]
    assert rounded["rollout"]["autoencoder"] == pytest.approx(plain["rollout"]["autoencoder"] / 2, rel=0.01)


def test_a_reward_at_hand_is_counted_by_its_class_and_in_its_precision(clip):
    remote = RemoteReward("http://127.0.0.1:9", name="pickscore")
    assert blank_of(remote) == BlankReward("pickscore", None)
    (named,) = as_rewards({"taste": CLIPScore(clip, dtype=torch.bfloat16)})
    found = blank_of(named)
    assert found.name == "taste"
    assert {p.dtype for p in found.network.parameters()} == {torch.bfloat16}


# ---- before a run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gib", [1e-4, 1e3])
def test_a_run_that_will_not_fit_says_so_before_the_model_is_loaded(tmp_path, monkeypatch, caplog, gib):
    pipeline = tiny_sd3()
    pipeline.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(base_trainer, "memory_of", lambda device: int(gib * 2**30))
    config = ACFlowConfig(
        str(tmp_path / "run"), use_cpu=True, report_to="none", max_sequence_length=8, height=16, width=16
    )
    with caplog.at_level("WARNING"):
        ACFlowTrainer(
            str(tmp_path / "model"), "jpeg_compressibility", config, ["a red circle"], peft_config=LoraConfig(r=2)
        )
    found = [record.getMessage() for record in caplog.records if "is estimated to need" in record.getMessage()]
    assert len(found) == (gib < 1)
    assert all(
        re.search(r"need 0\.\d GiB in the phase '.+', and the device has 0\.0; lower it by: `", text) for text in found
    )


# ---- rewards of latents, and another decoder for gradients ----------------------------------------------------------


def phases_of(capsys: Any, path: Path, *more: str) -> dict[str, Any]:
    """What `flowrl estimate adjoint_matching --json` finds."""
    size = ["--max_sequence_length", "8", "--height", "64", "--width", "64"]
    assert main(["estimate", "adjoint_matching", "--config", str(path), "--json", *size, *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_whose_rewards_see_latents_is_estimated_without_a_decoder(tmp_path, capsys):
    """Where one of two rewards sees pictures, and in an evaluation, the decoder stays."""
    tiny_sd3().save_pretrained(tmp_path / "model")
    rewards = ["judges.inner", "judges.outer"]
    path = write_run(tmp_path, model=str(tmp_path / "model"), reward_funcs=rewards, bf16=False, eval_split="held_out")
    mixed, latent = (phases_of(capsys, path, "--latent_rewards", *names) for names in (rewards[:1], rewards))
    assert mixed["phases"]["decode and reward"]["tflop_per_update"] > 0
    assert latent["phases"]["decode and reward"]["tflop_per_update"] == 0
    assert latent["phases"]["decode and reward"]["gib"]["largest call"] < 1e-3
    for phase in ("evaluation", "update"):
        assert latent["phases"][phase] == mixed["phases"][phase]
    command = ["estimate", "adjoint_matching", "--config", str(path), "--latent_rewards", "other"]
    assert main(command) == 2
    assert "`latent_rewards` names 'other', which is no reward of the run: name one of judges.inner" in (
        capsys.readouterr().err
    )


def test_gradients_through_a_reward_decoder_are_those_of_its_size(tmp_path, capsys):
    """Its bytes are as a CPU allocates them, within 5 %; the peak is that of the first rollout, which takes both."""
    pipeline, settings = tiny_sd3(), {"max_sequence_length": 8, "height": 64, "width": 64}
    pipeline.save_pretrained(tmp_path / "model")
    tiny_autoencoder().save_pretrained(tmp_path / "tiny")
    decode = TinyDecoder(tmp_path / "tiny")
    flow = FlowPipeline.from_pipeline(pipeline, **settings)
    latents = flow.initial_latents(4, torch.Generator().manual_seed(0))

    def gradient() -> None:
        x = latents.clone().requires_grad_()
        torch.autograd.grad(decode(x).clone().flatten(1).mean(dim=1).sum(), x)

    gradient()
    with META:
        blank = TinyDecoder(AutoencoderTiny.from_config(decode.autoencoder.config))
    estimator = Estimator(
        architecture_of(pipeline).flow(torch.float32, settings), [BlankReward("redness", None)],
        LoraConfig(r=4, lora_alpha=4), reward_decoder=blank,
    )  # fmt: skip
    estimated = estimator.work(Call(Kind.REWARD_GRADIENT, 4, 1, Phase.REWARD))
    assert estimated.peak == pytest.approx(allocated(gradient), rel=0.05)
    assert estimator.resident()["reward decoder"] == sum(p.nbytes for p in decode.autoencoder.parameters())
    own = estimator.work(Call(Kind.OWN_REWARD_GRADIENT, 8, 1, Phase.REWARD))
    assert own.flop > 2 * 2 * estimated.flop

    path = write_run(tmp_path, model=str(tmp_path / "model"), reward_funcs=["judges.outer"], bf16=False)
    found = phases_of(capsys, path, "--reward_decoder", str(tmp_path / "tiny"))
    phase = found["phases"]["decode and reward"]
    assert phase["gib"]["largest call"] * 2**30 == own.peak
    assert phase["largest_call"] == "own_decode_and_reward_gradient of 8"
    assert phase["tflop_per_update"] == pytest.approx(2 * estimated.flop / 1e12)
    assert found["calls"]["decode_and_reward_gradient"] == 1
    assert found["calls_once"]["own_decode_and_reward_gradient"] == 1
    # One that is not in the cache is taken to be of the usual size.
    unknown = blank_reward_decoder("nobody/tiny", estimator.flow)
    assert unknown.autoencoder.num_parameters() == AutoencoderTiny(latent_channels=4).num_parameters()


# ---- fewer bits, and networks that take turns ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8", "float8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_quantised_weights_are_those_that_are_stored(kind, dtype):
    """By bitsandbytes and torchao on a tiny network, but for the zeros of torchao's int8, a byte for each row."""
    network = tiny_sd3().transformer.to(dtype)
    full = sum(p.nbytes for p in network.parameters())
    rows = sum(layer.out_features for layer in network.modules() if isinstance(layer, torch.nn.Linear))
    said = full - quantized_size(linear_layers(network), kind).saved
    quantize(network, kind)
    stored = sum(tensor.nbytes for p in network.parameters() for tensor in stored_tensors(p))
    assert said == stored - (rows if kind == "int8" else 0)


@pytest.mark.parametrize("family", ["sd 3", "flux 2 klein", "z image"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
def test_bytes_of_text_encoders_are_those_that_are_loaded(tmp_path, family, kind, dtype):
    """By transformers, but for the zeros of int8; of nf4, which loads on a GPU alone, the layers that it replaces."""
    pipeline = tiny_sd3() if family == "sd 3" else tiny(family)
    for name, encoder in pipeline.components.items():
        if not name.startswith("text_encoder") or encoder is None:
            continue
        encoder.to(dtype).save_pretrained(tmp_path / name)
        with META:
            blank = type(encoder)(encoder.config).to(dtype)
        buffers = sum(buffer.nbytes for buffer in blank.buffers())
        chosen = quantization_config(None, None if kind == "nf4" else kind, ["text_encoder"], dtype)
        how = {} if chosen is None else {"quantization_config": chosen.quant_mapping["text_encoder"]}
        loaded = type(encoder).from_pretrained(tmp_path / name, dtype=dtype, **how)
        stored = sum(tensor.nbytes for p in loaded.parameters() for tensor in stored_tensors(p))
        in_bits = [p for p in loaded.parameters() if len(stored_tensors(p)) > 1]
        if kind == "nf4":
            in_nf4 = quantization_config(None, kind, ["text_encoder"], dtype).quant_mapping["text_encoder"]
            with META:
                replaced = type(encoder)(encoder.config)
                Bnb4BitHfQuantizer(in_nf4)._process_model_before_weight_loading(replaced, device_map=None)
            layers = {n for n, layer in replaced.named_modules() if isinstance(layer, Linear4bit)}
            in_bits = [layer.weight for n, layer in loaded.named_modules() if n in layers]
            stored -= sum(w.nbytes - w.numel() // 2 - 4 * -(-w.numel() // 64) for w in in_bits)
        elif kind == "int8":
            stored -= sum(len(p) for p in in_bits)
        assert bool(in_bits) == (kind is not None)
        assert encoder_bytes(blank, kind) - buffers == stored


@pytest.mark.parametrize(("settings", "peak", "advice"), [
    ({}, {"weights": 3, "largest call": 1}, "`quantization: nf4`, or `activation_checkpointing: true`, or `per_"),
    ({"activation_checkpointing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
     {"largest call": 1}, "a smaller picture or"),
    ({"activation_checkpointing": True}, {"largest call": 1}, "`per_device_train_batch_size` (with more"),
])  # fmt: skip
def test_nothing_is_advised_that_is_done(tmp_path, settings, peak, advice):
    config = ACFlowConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    phases = {str(Phase.UPDATE): PhaseCost(peak, "forward_backward of 4")}
    assert lower(Estimate(phases, {}, 1, {}, taken(config, has_adapter=True))).startswith(advice)
    judging = {str(Phase.REWARD): PhaseCost({"largest call": 1}, "decode of 4")}
    without_gradient = lower(Estimate(judging, {"decode": 1}, 1, {}, taken(config, has_adapter=True)))
    assert "activation_checkpointing" not in without_gradient
    assert "`decoder_dtype: bfloat16`" in without_gradient
    with_gradient = lower(Estimate(judging, {str(Kind.REWARD_GRADIENT): 1}, 1, {}, frozenset()))
    assert "activation_checkpointing" in with_gradient
    assert "decoder_dtype" not in with_gradient


@pytest.mark.slow
def test_an_estimate_counts_fewer_bits_and_phases_that_are_apart(capsys):
    """FLUX.1-dev has 11.9e9 parameters, nearly all of them in linear layers: 22.2 GiB in bfloat16, 6.3 in nf4."""
    base = ["estimate", "ac_flow", "--model", "FLUX.1-dev", "--dataset", "shapes", "--output_dir", "x", "--bf16"]
    base += ["--reward_funcs", "pickscore", "--json", "--height", "256", "--width", "256", "--num_generations", "2"]
    base += ["--per_device_train_batch_size", "2"]
    found = []
    in_bits = ["--quantization", "nf4", "--text_encoder_quantization", "int8"]
    for more in ([], in_bits, ["--offload_between_phases"], [*in_bits, "--offload_between_phases"]):
        main([*base, *more])
        found.append(json.loads(capsys.readouterr().out)["phases"])
    full, small, apart, small_apart = found
    # bitsandbytes quantises on the device, so that the network is there while prompts are encoded.
    beside = small["encode"]["gib"].pop("weights")
    assert beside == pytest.approx(small["rollout"]["gib"]["weights"])
    assert small["encode"]["gib"] == small_apart["encode"]["gib"]
    assert full["rollout"]["gib"]["weights"] == pytest.approx(22.2, abs=0.1)
    assert small["rollout"]["gib"]["weights"] == pytest.approx(11.9e9 * 0.5625 / 2**30, rel=0.02)
    assert small_apart["encode"]["peak_gib"] < 0.63 * full["encode"]["peak_gib"]
    assert "rewards" not in apart["rollout"]["gib"]
    assert "autoencoder" not in apart["update"]["gib"]
    assert "weights" not in apart["decode and reward"]["gib"]
    assert apart["decode and reward"]["gib"]["rewards"] > 0
