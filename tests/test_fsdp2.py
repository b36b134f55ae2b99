"""A network that two processes share (FSDP2) draws, learns, saves and resumes as a whole one does."""

import json
import os
import re
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.nn import Int8Params, Params4bit
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from flowrl_trainers import AdjointMatchingTrainer, FlowPipeline, FlowRLTrainer
from flowrl_trainers.cli import main
from flowrl_trainers.cli.evaluate import evaluate
from flowrl_trainers.cost.estimate import Estimator, share_of
from flowrl_trainers.pipelines.quantization import refuse_unsplittable
from flowrl_trainers.run_folder.checkpoints import fault
from flowrl_trainers.sampling.conditioning import ConditioningCache
from flowrl_trainers.sampling.flow_model import FlowModel
from flowrl_trainers.sampling.sharding import own_part, own_parts, refuse_other_sharding, whole
from flowrl_trainers.trainers import base_trainer
from flowrl_trainers.trainers.loss_scaling import LossScaler

from .forked import flowrl
from .fsdp2 import ENVIRONMENT, on_two_processes, pretend_gpus
from .helpers import FORMS, adjoint_matching_config, architecture_of, make_trainer, redness, update_rows
from .quantized import quantize
from .runs import assert_same
from .tiny import tiny_sd3

VALUE_NETWORK, SMALL = "flowrl_trainers.networks.value_network", (32, 32)  # the default is 20 MB large
HELD_OUT = Dataset.from_dict({"prompt": ["a red circle", "a blue square", "a green cross"]})
# Each rollout is used twice, so that the checkpoint after the first update lies in the middle of it. With an epsilon
# far above the gradients, Adam's step is proportional to its mean gradient, and rounding stays rounding.
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 1, "num_generations": 2, "num_iterations": 2, "max_steps": 3,
    "save_strategy": "steps", "save_steps": 1, "learning_rate": 1.0, "adam_epsilon": 1.0, "ema_decay": 0.5,
    "log_images": 2,
}  # fmt: skip


def trained(name: str, folder: Path, resume: Path | None = None, **settings: Any) -> FlowRLTrainer:
    """A trainer that has trained, evaluated and saved; `found` has what it drew and found on this process."""
    t = make_trainer(name, folder, **SETTINGS | settings)
    rollouts: list[Any] = []
    prepare = t.prepare

    def remember(rollout):
        rollouts.append([b.record.map(torch.clone).to_dict() for b in rollout])
        return prepare(rollout)

    t.prepare = remember
    t.train(resume_from_checkpoint=None if resume is None else str(resume))
    evaluation = t.evaluate(HELD_OUT)
    t.save_model()
    optimizer = own_parts(t.optimizer.state_dict())
    found = {
        "rollouts": rollouts,
        "evaluation": evaluation,
        "weights": {n: whole(p.detach()) for n, p in t.model.trained_tensors().items()},
        "optimizer": optimizer["state"],
        "average": t.average.state_dict()["shadow_params"],
        "algorithm": t.algorithm_state(),
        "history": [
            {k: v for k, v in row.items() if not k.startswith(("seconds/", "train_"))} for row in t.state.log_history
        ],
    }
    torch.save(found, folder / f"found_{t.args.process_index}.pt")
    return t


def share(name: str, folder: Path, lora: bool) -> None:
    """On each of two processes: a run, and another that goes on from the first checkpoint of it."""
    torch.set_num_threads(1)
    import_module(VALUE_NETWORK).WIDTHS = SMALL
    pretend_gpus()
    settings = {"lora": lora, "use_cpu": False, "gradient_accumulation_steps": 2}
    t = trained(name, folder / "two", **settings)
    facts = {
        "world_size": t.args.world_size,
        "type": str(t.accelerator.distributed_type),
        "root": isinstance(t.model, FSDPModule),
        "blocks": [type(module).__name__ for module in t.flow.transformer.modules() if isinstance(module, FSDPModule)],
        "wrapped": t.model_wrapped is t.model,
        "held": sum(own_part(p).numel() for p in t.model.parameters()) / sum(p.numel() for p in t.model.parameters()),
    }
    facts["bytes"] = sum(own_part(p).nbytes for p in t.flow.transformer.parameters())
    if t.model.frozen is not None:
        copy = list(t.model.frozen.parameters())
        facts["held of the copy"] = sum(own_part(p).numel() for p in copy) / sum(p.numel() for p in copy)
    torch.save(facts, folder / f"facts_{t.args.process_index}.pt")
    trained(name, folder / "resumed", resume=folder / "two" / "checkpoint-1", **settings)


def move(folder: Path) -> None:
    """On each of two processes: all weights are trained, by a run whose network leaves the device and by one whose
    network stays. Leaving and coming back give a parameter new memory, as on a GPU.
    """
    torch.set_num_threads(1)
    pretend_gpus()
    plain = nn.Module.to

    def to(module, *arguments, **more):
        if arguments and isinstance(arguments[0], torch.device):
            return module._apply(torch.clone)
        return plain(module, *arguments, **more)

    nn.Module.to = to
    for apart in (False, True):
        t = make_trainer(
            "DiffusionNFTTrainer", folder / str(apart), lora=False, use_cpu=False, offload_between_phases=apart,
            per_device_train_batch_size=2, learning_rate=1e-3,
        )  # fmt: skip
        t.train()
        weights = {n: whole(p.detach()) for n, p in t.model.trained_tensors().items()}
        torch.save(weights, folder / f"{apart}_{t.args.process_index}.pt")


def test_a_shared_network_that_leaves_the_device_learns_the_same(tmp_path):
    for process in on_two_processes(move, tmp_path, **ENVIRONMENT):
        assert process.returncode == 0, process.stderr
    stayed, left = (torch.load(tmp_path / f"{apart}_0.pt") for apart in (False, True))
    assert_same(left, stayed)
    start = make_trainer("DiffusionNFTTrainer", tmp_path / "new", lora=False).model.trained_tensors()
    assert all(not torch.equal(stayed[name], p.detach()) for name, p in start.items() if "proj_out" in name)


SHARED = [
    pytest.param(name, lora, id=f"{name}-{'lora' if lora else 'full'}", marks=() if quick else pytest.mark.slow)
    for name in FORMS
    for lora, quick in ((True, name == "AdjointMatchingTrainer"), (False, False))
]


@pytest.mark.parametrize(("name", "lora"), SHARED)
def test_two_processes_share_one_network(tmp_path, monkeypatch, name, lora):
    """Rollouts to the last bit, updates within the rounding of sums, the resumed run to the last bit."""
    monkeypatch.setattr(import_module(VALUE_NETWORK), "WIDTHS", SMALL)
    for process in on_two_processes(share, name, tmp_path, lora, **ENVIRONMENT):
        assert process.returncode == 0, process.stderr
    trained(name, tmp_path / "one", lora=lora, gradient_accumulation_steps=4)
    for rank in (0, 1):
        facts = torch.load(tmp_path / f"facts_{rank}.pt")
        assert facts["world_size"] == 2
        assert facts["type"] == "DistributedType.FSDP"
        assert facts["root"]
        assert facts["wrapped"]
        assert facts["blocks"] == ["FSDPJointTransformerBlock"] * tiny_sd3().transformer.config.num_layers
        assert facts["held"] == pytest.approx(0.5, abs=0.02)  # tensors of an odd length are not halved
        assert facts.get("held of the copy", 0.5) == pytest.approx(0.5, abs=0.02)
    lora_config = LoraConfig(r=2, lora_alpha=4) if lora else None
    blank = Estimator(architecture_of(tiny_sd3()).flow(torch.float32, {}), [], lora_config, shared_by=2)
    assert torch.load(tmp_path / "facts_0.pt")["bytes"] == share_of(blank.flow.transformer.parameters(), 2)
    one = torch.load(tmp_path / "one" / "found_0.pt")
    two = [torch.load(tmp_path / "two" / f"found_{rank}.pt") for rank in (0, 1)]
    assert_same(one["rollouts"][0], two[0]["rollouts"][0] + two[1]["rollouts"][0])
    assert_same(two[0]["weights"], two[1]["weights"])
    start = {n: p.detach() for n, p in make_trainer(name, tmp_path / "new", lora=lora).model.trained_tensors().items()}
    moved = max(float((one["weights"][n] - p).abs().max()) for n, p in start.items())
    assert moved > 1e-4
    for weight, value in one["weights"].items():
        torch.testing.assert_close(two[0]["weights"][weight], value, atol=1e-3 * moved, rtol=1e-5)
    assert two[0]["evaluation"] == two[1]["evaluation"]
    assert {k: v for k, v in two[0]["evaluation"].items() if k != "epoch"} == pytest.approx(
        {k: v for k, v in one["evaluation"].items() if k != "epoch"}, rel=1e-3, abs=1e-5
    )
    assert "shared by 2 processes (FSDP2)" in (tmp_path / "two" / "README.md").read_text()
    # The files: those of one process, in every checkpoint too, and nothing of the frozen network in checkpoints.
    assert fault(tmp_path / "two" / "checkpoint-2") is None
    for folder in ("", "checkpoint-2"):
        if lora:
            files = [tmp_path / run / folder / "pytorch_lora_weights.safetensors" for run in ("one", "two")]
            tiny_sd3().load_lora_weights(str(files[1].parent))
        else:
            files = [
                tmp_path / run / folder / "transformer" / "diffusion_pytorch_model.safetensors"
                for run in ("one", "two")
            ]
            assert (files[0].parent / "config.json").read_text() == (files[1].parent / "config.json").read_text()
        saved = [load_file(file) for file in files]
        assert saved[0].keys() == saved[1].keys()
        for key, value in saved[0].items():
            torch.testing.assert_close(saved[1][key], value, atol=1e-3 * moved, rtol=1e-5)
    # A run that was resumed after the first update.
    for rank, through in enumerate(two):
        resumed = torch.load(tmp_path / "resumed" / f"found_{rank}.pt")
        for what in ("weights", "optimizer", "average", "algorithm", "evaluation", "history"):
            assert_same(through[what], resumed[what])
        assert any(
            isinstance(v, Tensor) and v.abs().max() > 0 for s in resumed["optimizer"].values() for v in s.values()
        )


# ---- lower precision ----------------------------------------------------------------------------------------------

HALF: dict[str, Any] = SETTINGS | {"num_iterations": 1, "lr_scheduler_type": "constant", "ema_decay": None}


def in_lower_precision(folder: Path, precision: str, **settings: Any) -> FlowRLTrainer:
    """A trainer of a network that is loaded in the precision of the run, as one that is named is; fp16's scale doubles
    after each update.
    """
    pipeline = tiny_sd3()
    pipeline.transformer.to(torch.float16 if precision == "fp16" else torch.bfloat16)
    t = make_trainer("AdjointMatchingTrainer", folder, pipeline, **HALF | settings | {precision: True})
    if precision == "fp16":
        t.accelerator.scaler = LossScaler("cpu", growth_interval=1)
    return t


def share_in_lower_precision(folder: Path, precision: str) -> None:
    """On each of two processes. In fp16 there is a second update, in which the second process's part overflows; and a
    run goes on from the checkpoint between the two.
    """
    torch.set_num_threads(1)
    pretend_gpus()
    settings = {"use_cpu": False, "gradient_accumulation_steps": 2, "max_steps": 1}
    t = in_lower_precision(folder / "two", precision, **settings)
    computed, gradients = set(), set()
    layer = t.model.transformer.transformer_blocks[0].attn.to_q.lora_A["default"]
    layer.register_forward_hook(lambda module, inputs, output: computed.add(output.dtype))
    step = t.training_step

    def watched(*arguments: Any) -> Tensor:
        loss = step(*arguments)
        gradients.update(type(p.grad).__name__ for p in t.trained_parameters())
        return loss

    t.training_step = watched
    t.train()
    found = {
        "computed": computed,
        "gradients": gradients,
        "weights": {n: whole(p.detach()) for n, p in t.model.trained_tensors().items()},
        "types": {(type(p).__name__, p.dtype) for p in t.model.parameters()},
    }
    if precision == "fp16":
        found["scales"] = [t.accelerator.scaler.get_scale()]
        resumed = in_lower_precision(folder / "two", precision, **settings | {"max_steps": 2})
        scaler = resumed.accelerator.scaler
        unscale = scaler.unscale_

        def overflow(optimizer: torch.optim.Optimizer) -> None:
            if resumed.args.process_index == 1:
                own_part(resumed.trained_parameters()[0].grad).fill_(torch.inf)
            unscale(optimizer)

        scaler.unscale_ = overflow
        resumed.train(resume_from_checkpoint=True)
        found["scales"].append(scaler.get_scale())
        found["skipped"] = update_rows(resumed)[-1]["skipped_updates"]
        found["after"] = {n: whole(p.detach()) for n, p in resumed.model.trained_tensors().items()}
    torch.save(found, folder / f"found_{t.args.process_index}.pt")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.slow
def test_a_shared_network_learns_in_lower_precision(tmp_path, precision):
    """Of frozen weights in 16 bits and an adapter in 32, what one process learns; and an overflow in one process's part
    skips the update on both. All of it, rollouts too, computes in 16 bits, and gradients are spread after each of the
    two micro-batches. Products are rounded alike, and sums over pictures differ in float32 alone.
    """
    for process in on_two_processes(share_in_lower_precision, tmp_path, precision, **ENVIRONMENT):
        assert process.returncode == 0, process.stderr
    one = in_lower_precision(tmp_path / "one", precision, gradient_accumulation_steps=4, max_steps=1)
    one.train()
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    for rank in (0, 1):
        two = torch.load(tmp_path / f"found_{rank}.pt")
        assert two["types"] == {("DTensor", torch.float32), ("DTensor", half)}
        assert two["computed"] == {half}
        assert two["gradients"] == {"DTensor"}
        moved = max(float(p.abs().max()) for n, p in two["weights"].items() if "lora_B" in n)
        assert moved > 1e-4
        for name, value in one.model.trained_tensors().items():
            torch.testing.assert_close(two["weights"][name], value.detach(), atol=1e-2 * moved, rtol=1e-5)
        if precision == "fp16":
            assert two["scales"] == [2.0**17, 2.0**16]
            assert two["skipped"] == 1
            assert_same(two["after"], two["weights"])


# ---- `flowrl evaluate` --------------------------------------------------------------------------------------------


def measure_together(arguments: list[str], folder: Path) -> None:
    """On each of two processes: the command, and how much of the network each of them holds."""
    torch.set_num_threads(int(os.environ.get("FLOWRL_TEST_THREADS", "1")))  # as in one process
    pretend_gpus()
    sharded = FlowModel.shard

    def shard(model: FlowModel, accelerator: Accelerator) -> None:
        sharded(model, accelerator)
        parameters = list(model.parameters())
        held = sum(own_part(p).numel() for p in parameters) / sum(p.numel() for p in parameters)
        torch.save(held, folder / f"held_{accelerator.process_index}.pt")

    FlowModel.shard = shard
    evaluate(arguments)


def test_evaluate_draws_with_a_network_that_processes_share(tmp_path):
    """Pictures are those of one process to the last bit, where batches are of one size; means of their scores are sums
    in another order, in float64. The base model is that without adapters, and of two each is measured by itself.
    """
    tiny_sd3().save_pretrained(tmp_path / "model")
    for name, targets in (("first", ["attn.to_q"]), ("second", ["attn.to_q", "attn.to_v"])):
        pipeline = tiny_sd3()
        pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        FlowPipeline.from_pipeline(pipeline).save_lora(tmp_path / name)
    (tmp_path / "held_out.txt").write_text("\n".join(HELD_OUT["prompt"]))
    base = ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "held_out.txt")]
    base += ["--rewards", "tests.helpers.redness", "jpeg_compressibility", "--num_inference_steps", "3"]
    base += ["--batch_size", "2", "--pictures_per_prompt", "2", "--max_sequence_length", "8", "--guidance_scale", "3"]
    base += ["--height", "32", "--width", "32"]
    found = {}
    for number, adapters in enumerate((["first", "second"], ["second"])):
        paths = [str(tmp_path / name) for name in adapters]
        done = flowrl(tmp_path, "evaluate", *base, "--use_cpu", "--adapter", *paths, "--out", f"one_{number}")
        assert done.returncode == 0, done.stderr
        found[number] = json.loads((tmp_path / f"one_{number}" / "table.json").read_text())
    assert found[1] == {label: found[0][label] for label in ("base", "second")}
    assert len({row["reward/redness"] for row in found[0].values()}) == 3
    together = [*base, "--adapter", str(tmp_path / "first"), str(tmp_path / "second"), "--out", str(tmp_path / "two")]
    for process in on_two_processes(measure_together, together, tmp_path, **ENVIRONMENT):
        assert process.returncode == 0, process.stderr
    for label, row in json.loads((tmp_path / "two" / "table.json").read_text()).items():
        assert row == pytest.approx(found[0][label], rel=1e-12)
    sheets = [(tmp_path / folder / "pictures.png").read_bytes() for folder in ("one_0", "two")]
    assert sheets[0] == sheets[1]
    for rank in (0, 1):
        assert torch.load(tmp_path / f"held_{rank}.pt") == pytest.approx(0.5, abs=0.02)


def test_evaluate_refuses_other_sharding_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert main(["evaluate", "--model", "no/model", "--adapter", "none", "--rewards", "no_reward", "--use_cpu"]) == 2
    assert REFUSED["cpu"][1] in capsys.readouterr().err


# ---- what is refused ------------------------------------------------------------------------------------------------

REFUSED = {
    "deepspeed": (
        {"ACCELERATE_USE_DEEPSPEED": "true"},
        "DeepSpeed is not supported: take `--accelerate_config fsdp2`",
    ),
    "fsdp1": ({"FSDP_VERSION": "1", "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "set `fsdp_version: 2` in the"),
    "int8": ({}, "`quantization` is 'int8', but FSDP2 cannot split the weights of torchao: take 'nf4', whose weights"),
    "compile_blocks": ({}, "`compile_blocks` is True, but the blocks are sharded"),
    "merge_adapter": ({}, "`merge_adapter` is True, but the weights are spread over the processes"),
    "cache_base_pictures": ({}, "`cache_base_pictures` is True, but all processes must call a sharded network"),
    "cpu": ({}, "there are 1 process(es) on 'cpu', where accelerate would leave the network whole in silence"),
    "loading": ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "`fsdp_cpu_ram_efficient_loading` of the accelerate file"),
    "offload": ({"FSDP_OFFLOAD_PARAMS": "true"}, "`fsdp_offload_params` of the accelerate file is true"),
    "checkpointing": ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "`activation_checkpointing` of the run's settings"),
    "reshard": (
        {"FSDP_RESHARD_AFTER_FORWARD": "false"},
        "`fsdp_reshard_after_forward` of the accelerate file is false",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_ways_to_shard_are_refused(monkeypatch, what):
    variables, sentence = REFUSED[what]
    for name, value in (ENVIRONMENT | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        refuse_other_sharding(
            compile_blocks=what == "compile_blocks",
            merge_adapter=what == "merge_adapter",
            cache_base_pictures=what == "cache_base_pictures",
            quantization="int8" if what == "int8" else None,
        )


def test_optimizers_that_cannot_step_a_part_of_a_weight_are_refused(tmp_path, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="`optim` is 'adamw_8bit', but bitsandbytes cannot step weights that FSDP2"):
        adjoint_matching_config(tmp_path, optim="adamw_8bit")


@pytest.mark.parametrize(("kind", "refused"), [
    (None, None), ("nf4", None),
    ("int8", r"`model` has quantised weights \(Int8Tensor\), which FSDP2 cannot split: quantise it by bitsandbytes to"),
    ("float8", r"`model` has quantised weights \(Float8Tensor\), which FSDP2 cannot split: quantise it by bitsandbytes"),
    ("bitsandbytes int8", r"`model` has quantised weights \(Int8Params\), which FSDP2 cannot split: quantise it by"),
    ("stored as floats", "`model` has 4-bit weights that are stored as torch.bfloat16, which FSDP2 would split without"),
])  # fmt: skip
def test_quantised_weights_that_cannot_be_split_are_refused(kind, refused):
    """Those in 4 bits can, as accelerate leaves them whole."""
    network = nn.Sequential(nn.Linear(64, 64))
    weight = network[0].weight.data.clone()
    if kind == "bitsandbytes int8":
        network[0].weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
    elif kind == "stored as floats":
        network[0].weight = Params4bit(weight, requires_grad=False, quant_storage=torch.bfloat16).to("cpu")
    elif kind is not None:
        quantize(network, kind)
    with nullcontext() if refused is None else pytest.raises(ValueError, match=refused):
        refuse_unsplittable(network)


def test_a_pipeline_that_is_quantised_so_is_refused_before_work_starts(tmp_path, monkeypatch):
    for name, value in (("asks_for_sharding", lambda: True), ("refuse_other_sharding", lambda **settings: None)):
        monkeypatch.setattr(base_trainer, name, value)
    monkeypatch.setattr(ConditioningCache, "encode", lambda *arguments: pytest.fail("prompts are encoded"))
    pipeline = tiny_sd3()
    quantize(pipeline.transformer, "int8")
    with pytest.raises(ValueError, match="`model` has quantised weights"):
        make_trainer("AdjointMatchingTrainer", tmp_path, pipeline)


@pytest.mark.parametrize(("name", "settings", "sentence"), [
    ("ACFlowTrainer", {"critic": "backbone"}, "`critic` ('backbone') shares the weights of the whole network"),
    ("AdjointMatchingTrainer", {"prefix_pool_size": 8, "adjoint_steps": 2}, "`prefix_pool_size` is 8, but all processes must"),
])  # fmt: skip
def test_what_needs_the_whole_network_is_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, name, settings, sentence
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(base_trainer, "refuse_other_sharding", lambda **settings: None)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make_trainer(name, tmp_path, "no/model", **settings)


def test_they_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(REFUSED["cpu"][1])):
        AdjointMatchingTrainer("no/model", redness, adjoint_matching_config(tmp_path), HELD_OUT)
