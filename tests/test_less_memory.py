"""What lowers the memory without a change of results: networks that take turns, prompts on disk."""

import gc
import os
from collections import defaultdict
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from torch import nn

from flowrl_trainers import FlowPipeline
from flowrl_trainers.rewards import differentiable
from flowrl_trainers.sampling.conditioning import GIB, ConditioningCache
from flowrl_trainers.sampling.flow_model import FlowModel

from .helpers import CAPTIONS, FIXED_TARGET, TRAINERS, first_examples, make_trainer, seeds
from .tiny import tiny_sd3

QUICK = ("VGGFlowTrainer", "ACFlowTrainer")  # the others are slow tests


class Judge(nn.Module):
    """Redness by weights."""

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Parameter(torch.tensor([1.0, -0.5, -0.5]), requires_grad=False)

    def forward(self, images, prompts, **columns):
        return torch.einsum("bchw,c->b", images, self.colours) / images[0, 0].numel()


class Places:
    """Where parameters are, by what `nn.Module.to` was last told: all CPUs are one device to torch."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.of, self.seen = device, {}, defaultdict(set)
        self.plain = nn.Module.to

    def to(self, module, *args, **kwargs):
        place = kwargs.get("device", args[0] if args else None)
        if isinstance(place, (str, torch.device)):
            on_device = isinstance(module, FlowModel) or torch.device(place) == self.device  # Trainer's is the CPU
            self.of |= {id(p): on_device for p in module.parameters()}
        return self.plain(module, *args, **kwargs)

    def recorded(self):
        return patch.object(nn.Module, "to", lambda module, *args, **kwargs: self.to(module, *args, **kwargs))

    def watch(self, phase: str, module: nn.Module, others: dict[str, nn.Module]) -> None:
        """Note at every call of a module the share of the parameters of others that are on the device."""
        module.register_forward_pre_hook(lambda *_: self.note(phase, others))

    def note(self, phase, others):
        for name, other in others.items():
            on_device = sum(p.numel() for p in other.parameters() if self.of.get(id(p), False))
            self.seen[phase, name].add(on_device / sum(p.numel() for p in other.parameters()))


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        *(pytest.param(name, True, marks=() if name in QUICK else pytest.mark.slow) for name in TRAINERS),
        ("AdjointMatchingTrainer", False),
    ],
)
def test_network_and_rewards_are_never_on_the_device_at_once(tmp_path, name, lora):
    """What is learned is the same, bit for bit; an evaluation with a judge of its own is part of the run."""
    learned = []
    for apart in (False, True):
        judge, watcher, pipeline = Judge(), Judge(), tiny_sd3()
        t = make_trainer(
            name, tmp_path / str(apart), pipeline, differentiable(judge), lora=lora, offload_between_phases=apart,
            learning_rate=0.01, height=16, width=16, eval_dataset=Dataset.from_dict({"prompt": CAPTIONS[:2]}),
        )  # fmt: skip
        t.eval_rewards.append(differentiable(watcher))
        places = Places(torch.device("cpu:0"))
        t.placement.device = places.device
        network = pipeline.transformer
        places.of |= {id(p): True for p in network.parameters()}
        judges = {"decoder": pipeline.vae.decoder, "judge": judge, "watcher": watcher}
        places.watch("network", network, {"network": network} | judges)
        for part in judges.values():
            places.watch("judge", part, {"network": network})
        with places.recorded():
            t.train()
            t.evaluate()
        if apart:
            shares = {"network": {1.0}, "decoder": {0.0}, "judge": {0.0}, "watcher": {0.0}}
            assert {part: places.seen["network", part] for part in shares} == shares
            assert places.seen["judge", "network"] == {0.0}
        learned.append(
            [p.detach().clone() for p in t.trained_parameters()] + [torch.tensor(t.rows["tuned"]["velocity_distance"])]
        )
    assert all(torch.equal(a, b) for a, b in zip(*learned, strict=True))
    assert learned[0][-1] > 0


@pytest.mark.parametrize(("name", "times"), [
    ("AdjointMatchingTrainer", 1), ("VGGFlowTrainer", 2), ("ACFlowTrainer", 1), (FIXED_TARGET, 2),
    ("DiffusionNFTTrainer", 1), ("TAFSGRPOTrainer", 1),
])  # fmt: skip
def test_the_network_leaves_once_for_all_micro_batches_and_states(tmp_path, name, times):
    t = make_trainer(
        name, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, offload_between_phases=True,
        log_images=0,
    )  # fmt: skip
    examples, plain, moved = first_examples(t), nn.Module.to, []

    def to(module, *arguments, **more):
        if module is t.model.transformer:
            moved.append(arguments[0])
        return plain(module, *arguments, **more)

    with patch.object(nn.Module, "to", to):
        t.make_rollout(examples)
    assert len(moved) == 2 * times  # away and back


def test_prompts_are_known_by_their_own_embeddings_after_a_full_disk(monkeypatch):
    flow = FlowPipeline.from_pipeline(tiny_sd3(), guidance_scale=3.0, max_sequence_length=8)
    prompts, device = [f"{caption} {number}" for caption in CAPTIONS for number in range(4)], torch.device("cpu")
    whole, spilled = ConditioningCache(flow, 4), ConditioningCache(flow, 4, most_in_memory=0.0)
    whole.encode(prompts, device, show_progress=False)
    with monkeypatch.context() as full:
        full.setattr(spilled, "_spill", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            spilled.encode(prompts, device, show_progress=False)
    spilled.encode(prompts, device, show_progress=False)
    expected, found = whole(prompts[::-1], device), spilled(prompts[::-1], device)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_prompts_beyond_a_bound_are_read_from_disk_bit_for_bit():
    """In all precisions; what all prompts share is kept once, in memory and on disk."""
    flow = FlowPipeline.from_pipeline(tiny_sd3(), guidance_scale=3.0, max_sequence_length=8)
    prompts = [f"{caption} {number}" for caption in CAPTIONS for number in range(10)]
    encode, device = flow.encode_prompts, torch.device("cpu")

    def with_more(prompts):
        found = encode(prompts)
        found |= {"half": found["prompt_embeds"].bfloat16(), "mask": found["prompt_embeds"] > 0}
        return found

    with patch.object(flow, "encode_prompts", with_more):
        whole, spilled = ConditioningCache(flow, 4), ConditioningCache(flow, 4, most_in_memory=20_000 / GIB)
        for cache in (whole, spilled):
            cache.encode(prompts[:30], device, show_progress=False)
            cache.encode(prompts[20:], device, show_progress=False)
    asked = [prompts[i] for i in (39, 0, 17, 17, 30, 5)]
    expected, found = whole(asked, device), spilled(asked, device)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert all(expected[name].dtype == found[name].dtype for name in expected)
    in_memory = [sum(rows.bytes_in_memory for rows in cache.stored.values()) for cache in (whole, spilled)]
    assert in_memory[1] <= 20_000 < in_memory[0] / 4
    assert len(whole.stored["negative_prompt_embeds"].in_memory) == 1
    assert len(spilled.stored["negative_prompt_embeds"].on_disk) == 1
    folder = spilled._folder.name
    assert os.listdir(folder)
    del spilled, cache
    gc.collect()
    assert not os.path.exists(folder)


def test_the_frozen_copy_may_keep_the_precision_of_the_loaded_network(tmp_path):
    """Half of the bytes; its velocity is that of the network as it was loaded, bit for bit, after an update too."""
    pipeline, sizes = tiny_sd3(), []
    pipeline.transformer.to(torch.bfloat16)
    for choice in ("float32", "as_loaded"):
        t = make_trainer(
            "AdjointMatchingTrainer", tmp_path / choice, pipeline, lora=False, frozen_copy=choice,
            offload_between_phases=choice == "as_loaded", embedding_memory_gib=0.5 if choice == "as_loaded" else None,
        )  # fmt: skip
        sizes.append(sum(p.nbytes for p in t.model.frozen.parameters()))
        if choice == "float32":  # the trainer before is done with the pipeline
            pipeline = tiny_sd3()
            loaded = pipeline.transformer.to(torch.bfloat16)
            flow = FlowPipeline.from_pipeline(pipeline, guidance_scale=1.0, max_sequence_length=8)
            x, sigma = flow.initial_latents(2, seeds(2)), torch.tensor([0.3, 0.9])
            conditioning = flow.encode_prompts(CAPTIONS[:2])
            with torch.no_grad():
                expected = flow.velocity(loaded, x, sigma, conditioning, guidance=True)
    t.train()
    with torch.no_grad(), t.model.reference():
        found = t.model(x, sigma, conditioning, guidance=True)
    assert sizes[0] == 2 * sizes[1]
    assert torch.equal(found, expected)
    said = {
        "frozen copy": "in the precision of the loaded model", "network and rewards": "on the device in turn",
        "embeddings": "0.5 GiB in memory",
    }  # fmt: skip
    assert said.items() <= t._card_facts().settings.items()
    assert {p.dtype for p in t.trained_parameters()} == {torch.float32}
    with pytest.raises(ValueError, match=r"`frozen_copy` \('as_loaded'\) has no effect with a LoRA"):
        make_trainer("AdjointMatchingTrainer", tmp_path / "lora", frozen_copy="as_loaded")
