"""Truncated adjoint matching from a pool of (prompt, noise) pairs whose states before the window are kept."""

import re
from collections import Counter
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from flowrl_trainers import AdjointMatchingTrainer, FlowPipeline
from flowrl_trainers.sampling.draws import ImageKey, keyed_generators
from flowrl_trainers.sampling.prefix_pool import PrefixPool
from flowrl_trainers.sampling.prompt_groups import PromptGroupSampler
from flowrl_trainers.trainers.checkpointed_trainer import WEIGHTS

from .helpers import adjoint_matching, adjoint_matching_config, first_examples, make_trainer, redness
from .runs import assert_same, fork_two, run
from .tiny import tiny_sd3

# Two rollouts of two images, in four steps with two controlled ones; a pass over the pool takes two updates.
POOL = {"prefix_pool_size": 4, "adjoint_steps": 2}


# ---- which images ---------------------------------------------------------------------------------------------------


def pooled(pool_size: int = 12, num_processes: int = 1) -> PromptGroupSampler:
    return PromptGroupSampler(
        num_prompts=5, num_generations=2, images_per_update=4, updates_per_rollout=1, repeats=1,
        num_processes=num_processes, seed=0, pool_size=pool_size,
    )  # fmt: skip


def test_every_epoch_takes_every_pair_of_the_pool_once_in_whole_groups():
    """Six groups of five prompts: one prompt has two groups, with four different images."""
    sampler, pool = pooled(), pooled().pool()
    assert [(key.row, key.image) for key in sampler] == [(key.row, key.image) for key in pool]
    assert len(sampler) == len(set(pool)) == 12
    counts = Counter(key.row for key in pool)
    assert sorted(counts.values()) == [2, 2, 2, 2, 4]
    (twice,) = (row for row, count in counts.items() if count == 4)
    assert {key.image for key in pool if key.row == twice} == {0, 1, 2, 3}
    orders = []
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        images = list(sampler)
        assert {(key.row, key.image) for key in images} == {(key.row, key.image) for key in pool}
        assert [key.rollout for key in images[::4]] == [3 * epoch, 3 * epoch + 1, 3 * epoch + 2]
        assert all(a.row == b.row for a, b in zip(images[::2], images[1::2], strict=True))
        orders.append([(key.row, key.image) for key in images])
    assert orders[0] != orders[1]
    assert set(sampler.rows_of(2)) == {key.row for key in pool[:8]}


def test_the_pool_begins_as_a_run_without_one():
    plain = PromptGroupSampler(
        num_prompts=5, num_generations=2, images_per_update=4, updates_per_rollout=1, repeats=1, num_processes=1,
        seed=0,
    )  # fmt: skip
    assert list(pooled())[:8] == list(plain)


# ---- the states -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [10**6, 0], ids=["memory", "file"])
def test_a_state_is_drawn_once_with_its_neighbours_and_kept_to_the_bit(memory):
    keys, asked = [ImageKey(row, 0, 0) for row in range(5)], []

    def draw(part: list[ImageKey]) -> torch.Tensor:
        asked.append([key.row for key in part])
        return torch.stack([torch.full((2, 3), 1 / (3 + key.row)) for key in part])

    pool = PrefixPool(keys, 2, draw, memory)
    for rollout, rows in enumerate([[3], [2, 3], [4, 0], [1, 4, 3]]):
        states = pool.states([ImageKey(row, 0, rollout) for row in rows], torch.device("cpu"))
        assert torch.equal(states, torch.stack([torch.full((2, 3), 1 / (3 + row)) for row in rows]))
    assert asked == [[2, 3], [0, 1], [4]]


def test_with_a_zero_adapter_the_cached_states_are_those_of_a_base_rollout_to_the_bit(tmp_path):
    """Guided, and against a pipeline that never had an adapter; then with the adapter awake, in another order."""
    t = adjoint_matching(tmp_path, tiny_sd3(), guidance_scale=4.0, **POOL)
    flow = FlowPipeline.from_pipeline(tiny_sd3(), guidance_scale=4.0, max_sequence_length=8)
    examples = first_examples(t)
    conditioning = t.condition(examples)
    x = flow.initial_latents(2, keyed_generators(t.args.seed, [e.key for e in examples], "initial latents"))
    with torch.no_grad():
        for sigma, sigma_next in pairwise(t.sigmas[:3]):
            v = flow.velocity(flow.transformer, x, sigma.expand(2), conditioning, guidance=True)
            x = x + (sigma_next - sigma) * v
        t.model.eval()
        plain = adjoint_matching(tmp_path, tiny_sd3(), guidance_scale=4.0, adjoint_steps=2)
        plain.model.eval()
        keys = [e.key for e in examples]
        drawn, expected = t.rollout(conditioning, keys), plain.rollout(conditioning, keys)
        assert torch.equal(drawn.states[:, 0], x)
        assert_same(drawn.to_dict(), expected.to_dict())
        awaken(t)
        again = t.rollout(conditioning, [ImageKey(key.row, key.image, 7) for key in keys])
        assert torch.equal(again.states[:, 0], x)
        assert not torch.allclose(again.final, drawn.final, atol=1e-4)
        assert not torch.allclose(uncached_opening(t, keys), x, atol=1e-4)


def awaken(t: AdjointMatchingTrainer) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in t.model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


def uncached_opening(t: AdjointMatchingTrainer, keys: list[ImageKey]) -> torch.Tensor:
    """Where the adapted model itself opens the window."""
    pool, t.prefixes = t.prefixes, None
    try:
        return t.rollout(t.condition([t.train_dataset[key] for key in keys]), keys).states[:, 0]
    finally:
        t.prefixes = pool


# ---- the update -----------------------------------------------------------------------------------------------------


def test_the_gradient_of_an_update_is_that_of_the_same_pair_with_the_adapter_off_before_the_window(tmp_path):
    """By autograd alone: x_2 by a pipeline without an adapter, then x_3 and x_4 by the adapted one; the adjoint from
    the Jacobian of the first at x_3; the gradient of the mean of |v_base - v - g|^2 over both controlled steps.

    In the second pass over the pool, where nothing before the window is computed.
    """
    t = adjoint_matching(tmp_path, tiny_sd3(), max_steps=4, **POOL)
    loader = t.get_train_dataloader()
    t.current_gradient_accumulation_steps = 1
    for examples in loader:
        t.training_step(t.model, examples)
        t.model.zero_grad()
    awaken(t)
    t.sampler.set_epoch(1)
    examples = next(iter(loader))
    assert examples[0].key.rollout == 2
    base = FlowPipeline.from_pipeline(tiny_sd3(), guidance_scale=1.0, max_sequence_length=8)
    keys = [ImageKey(e.key.row, e.key.image, 0) for e in examples]
    conditioning, levels = t.condition(examples), t.sigmas

    def velocity(flow: FlowPipeline, x: torch.Tensor, k: int) -> torch.Tensor:
        return flow.velocity(flow.transformer, x, levels[k].expand(2), conditioning, guidance=False)

    t.model.eval()
    states = [base.initial_latents(2, keyed_generators(t.args.seed, keys, "initial latents"))]
    with torch.no_grad():
        for k in range(4):
            v = velocity(base if k < 2 else t.flow, states[k], k)
            states.append(states[k] + (levels[k + 1] - levels[k]) * v)
    x_3, x_4 = states[3].requires_grad_(), states[4].requires_grad_()
    (g_4,) = torch.autograd.grad(50.0 * redness(images=base.decode(x_4), prompts=None).sum(), x_4)
    (carried,) = torch.autograd.grad((velocity(base, x_3, 3) * g_4).sum(), x_3)
    g_3 = g_4 - (levels[3] - levels[4]) * carried
    loss = sum(
        (velocity(base, x.detach(), k).detach() - velocity(t.flow, x.detach(), k) - g).square().mean() / 2
        for x, k, g in ((states[2], 2, g_3), (x_3, 3, g_4))
    )
    trained = dict(t.model._named_trained_parameters())
    expected = dict(zip(trained, torch.autograd.grad(loss, list(trained.values()), allow_unused=True), strict=True))

    calls = counted(t)
    t.training_step(t.model, examples)
    assert calls() == 2 + 2 + 2  # the window; one product and one base velocity; the loss
    assert sum(float(g.abs().max()) > 1e-4 for g in expected.values() if g is not None) > 10
    for name, parameter in trained.items():
        if expected[name] is not None:
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4 * scale + 1e-9, rtol=1e-3)


def counted(t: AdjointMatchingTrainer):
    """What counts the forward passes of the transformer from now on."""
    calls: list[int] = []
    t.flow.transformer.register_forward_hook(lambda module, inputs, output: calls.append(len(output[0])))
    return lambda: len(calls)


def test_an_update_of_3_of_20_steps_takes_9_calls_instead_of_26(tmp_path):
    """Without guidance: 20 + 1 + 2 + 3 calls, of which the first 17 of the rollout fall away; and with one reward."""
    settings = {"num_inference_steps": 20, "adjoint_steps": 3}
    counts = []
    for pool in ({"prefix_pool_size": 2}, {}):
        t = adjoint_matching(tmp_path, tiny_sd3(), **settings, **pool)
        t.current_gradient_accumulation_steps = 1
        examples, calls = first_examples(t), counted(t)
        t.training_step(t.model, examples)
        first = calls()
        t.training_step(t.model, examples)
        counts.append((first, calls() - first))
    assert counts == [(26, 9), (26, 26)]


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_trained_whole_draws_its_prefixes_by_the_frozen_copy(tmp_path):
    t = adjoint_matching(tmp_path, tiny_sd3(), lora=None, learning_rate=0.01, max_steps=4, **POOL)
    t.train()
    keys = t.sampler.pool()[:2]
    fresh = adjoint_matching(tmp_path, tiny_sd3(), adjoint_steps=2)
    fresh.model.eval()
    with torch.no_grad():
        expected = fresh.rollout(fresh.condition([fresh.train_dataset[key] for key in keys]), keys)
    assert torch.equal(t.prefixes.states(keys, torch.device("cpu")), expected.states[:, 0])
    networks = [owner.flow.transformer.parameters() for owner in (t, fresh)]
    assert any((p != q).any() for p, q in zip(*networks, strict=True))


def test_evaluation_uses_the_adapter_in_all_steps_and_the_card_names_the_pool(tmp_path):
    t = adjoint_matching(tmp_path, tiny_sd3(), **POOL)
    awaken(t)
    conditioning = t.condition(first_examples(t))
    states = [t.initial_latents(t.sampler.pool()[:2], "initial latents")]
    with torch.no_grad():
        for k in range(4):
            v = t.flow.velocity(t.flow.transformer, states[k], t.sigmas[k].expand(2), conditioning, guidance=True)
            states.append(states[k] + (t.sigmas[k + 1] - t.sigmas[k]) * v)
        drawn = t.evaluation_samplers()[""](t.model, states[0], conditioning, None)
    torch.testing.assert_close(drawn, states[-1], atol=1e-6, rtol=0)
    t.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert re.search(
        r"\| .*rollouts.* \| .*from 4 pairs of prompt and noise, by the base model up to sigma 0\.\d+", card
    )


def test_a_run_goes_on_bit_for_bit_in_the_second_pass_over_its_pool(tmp_path):
    """Two rollouts a pass. The resumed run draws again, for its last rollout, what the other has kept since its first
    pass.
    """
    settings = {"prefix_pool_size": 8, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 1}
    whole, resumed = (
        make_trainer("AdjointMatchingTrainer", tmp_path / name, max_steps=4, **settings) for name in ("whole", "again")
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    before, expected, found = (
        load_file(tmp_path / folder / WEIGHTS)
        for folder in ("whole/checkpoint-3", "whole/checkpoint-4", "again/checkpoint-4")
    )
    assert_same(found, expected)
    assert any(not torch.equal(before[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    config = {
        "per_device_train_batch_size": 1, "num_generations": 2, "max_steps": 3, "save_strategy": "no", "optim": "sgd",
        "learning_rate": 1.0, "lora_dropout": 0.0, "prefix_pool_size": 8,
    }  # fmt: skip
    name = "AdjointMatchingTrainer"
    one = run(tmp_path / "one", name, config | {"gradient_accumulation_steps": 4})
    assert one.returncode == 0, one.stderr
    for process in fork_two(
        tmp_path / "two", name, config | {"gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    ):
        assert process.returncode == 0, process.stderr
    whole, first, second = (
        torch.load(tmp_path / folder / f"rollout_{rank}.pt") for folder, rank in (("one", 0), ("two", 0), ("two", 1))
    )
    for number in range(3):  # two rollouts a pass; the third is in another order
        opening = [
            [[part["drawn"]["rows"], part["drawn"]["states"][:, 0]] for part in rollout[number]]
            for rollout in (whole, first, second)
        ]
        assert_same(opening[0], opening[1] + opening[2])
    first_pass, order = [[part["drawn"]["rows"] for part in rollout] for rollout in (whole[0] + whole[1], whole[2])]
    assert order not in (first_pass[:4], first_pass[4:])
    weights = [torch.load(tmp_path / folder / "result.pt")["weights"] for folder in ("one", "two")]
    for parameter, value in weights[0].items():
        torch.testing.assert_close(weights[1][parameter], value, atol=2e-6, rtol=1e-5)


# ---- one clear sentence each ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"prefix_pool_size": 0}, r"`prefix_pool_size` \(0\) must be at least 1, or None"),
    ({"prefix_pool_size": 3}, r"`prefix_pool_size` \(3\) must be a multiple of the images per rollout \(2\): make it 2 or 4"),
    ({"prefix_pool_size": 1}, r"`prefix_pool_size` \(1\) must be a multiple of the images per rollout \(2\): make it 2\."),
    ({"prefix_pool_size": 2, "adjoint_steps": 4}, r"`prefix_pool_size` \(2\) keeps what comes before the controlled window, but `adjoint_steps` \(4\) controls all"),
])  # fmt: skip
def test_a_pool_that_does_not_fit_is_refused(tmp_path, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        adjoint_matching_config(tmp_path, **settings)


def test_a_pool_without_room_on_the_disk_is_refused(monkeypatch):
    def full(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    pool = PrefixPool([ImageKey(0, 0, 0)], 1, lambda keys: torch.zeros(1, 4), memory=0)
    with pytest.raises(ValueError, match=r"`prefix_pool_size` \(1\) takes 0.0 GiB in .*no room .*No space left"):
        pool.states([ImageKey(0, 0, 3)], torch.device("cpu"))
