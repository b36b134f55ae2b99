"""`compile_blocks`: the blocks of every family are one graph each, no call falls back, and nothing is left behind."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from flowrl_trainers import FlowPipeline
from flowrl_trainers.sampling import flow_model

from .gaussian import GaussianFlow, Shifted, closeness
from .helpers import TRAINERS, adjoint_matching, first_examples, make_trainer
from .tiny import tiny_sd3
from .tiny_families import FAMILIES, tiny
from .tiny_sit import original_checkpoint, tiny_sit


@pytest.fixture
def graphs(monkeypatch):
    """Counts graphs that were made, and their calls, with a backend that runs them as they were traced."""
    found = {"made": 0, "called": 0}

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]):
        found["made"] += 1

        def call(*arguments: Any) -> Any:
            found["called"] += 1
            return graph(*arguments)

        return call

    monkeypatch.setattr(flow_model, "BACKEND", backend)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ACFlowTrainer", "AdjointMatchingTrainer"])
def test_merged_adapters_are_compiled_too(tmp_path, graphs, trainer):
    """Rollouts and, for the memoryless sampler, the base model inside of them."""
    memoryless = {"dynamics": "memoryless", "adjoint_steps": 3, "reward_scale": 10.0}
    settings = {"critic": "none"} if trainer == "ACFlowTrainer" else memoryless
    settings |= {"max_steps": 3, "learning_rate": 0.05, "merge_adapter": True}
    plain = make_trainer(trainer, tmp_path / "plain", **settings)
    plain.train()
    t = make_trainer(trainer, tmp_path / "compiled", compile_blocks=True, **settings)
    calls = list[int]()
    t.flow.transformer.register_forward_hook(lambda module, inputs, output: calls.append(2))  # blocks
    t.train()
    assert graphs["called"] == sum(calls) > 0
    for name, value in plain.model.trained_tensors().items():
        torch.testing.assert_close(t.model.trained_tensors()[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_is_compiled_in_every_call_learns_the_same_and_gives_the_pipeline_back(tmp_path, graphs, trainer):
    """Probe, rollout, vector-Jacobian product, base velocities and update, which take more graphs than torch may allow.
    Afterwards the blocks are as the user gave them, and compiled again, without a new graph, at work.
    """
    settings = {"max_steps": 2 if trainer == "ACFlowTrainer" else 1, "learning_rate": 0.05}
    plain = make_trainer(trainer, tmp_path / "plain", **settings)
    t = make_trainer(trainer, tmp_path / "compiled", compile_blocks=True, **settings)
    assert plain.model.state_dict().keys() == t.model.state_dict().keys()
    network, calls = t.flow.transformer, list[int]()
    network.register_forward_hook(lambda module, inputs, output: calls.append(2))  # blocks
    plain.train()
    assert graphs["called"] == 0
    with torch._dynamo.config.patch(recompile_limit=4):
        t.train()
    assert graphs["called"] == sum(calls) > 0
    made = graphs["made"]
    assert made > 4
    expected, found = plain.model.trained_tensors(), t.model.trained_tensors()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)

    def compiled() -> int:
        return sum(module._compiled_call_impl is not None for module in network.modules())

    assert compiled() == 0
    examples = first_examples(t)
    with t.at_work(), torch.no_grad():
        assert compiled() == 2
        t.model.eval()
        t.rollout(t.condition(examples), [e.key for e in examples])
    assert graphs["called"] == sum(calls)
    assert graphs["made"] == made
    t.create_model_card()
    assert re.search(r"\| .*compiled.* \| .*blocks", (tmp_path / "compiled" / "README.md").read_text(encoding="utf-8"))


def test_a_frozen_copy_is_compiled_too(tmp_path, graphs):
    t = adjoint_matching(tmp_path, tiny_sd3(), lora=None, compile_blocks=True)
    assert all(
        sum(module._compiled_call_impl is not None for module in network.modules()) == 2
        for network in (t.flow.transformer, t.model.frozen)
    )


@pytest.mark.parametrize("family", [
    "sd3", "sana",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("sit", *FAMILIES) if name != "sana"),
])  # fmt: skip
def test_the_blocks_of_every_family_are_one_graph_each(tmp_path, graphs, family):
    """With gradients; what it gives is what it gave."""
    torch.save(original_checkpoint(), tmp_path / "sit.pt")
    special = {"sd3": tiny_sd3, "sit": lambda: tiny_sit(tmp_path / "sit.pt")}
    pipeline = special[family]() if family in special else tiny(family)
    settings = {} if family in special else {"height": 32, "width": 32} | FAMILIES[family][1]
    flow = FlowPipeline.from_pipeline(pipeline, **settings)
    model = flow_model.FlowModel(flow, has_adapter=True)
    prompts = ["0", "1"] if family == "sit" else ["a red circle", "a blue square"]
    conditioning = flow.encode_prompts(prompts)
    x = flow.initial_latents(2, [torch.Generator().manual_seed(i) for i in range(2)]).requires_grad_()
    sigma, found = torch.tensor([0.7, 0.4]), []
    for _ in range(2):
        v = model(x, sigma, conditioning, guidance=False)
        found.append([v.detach(), torch.autograd.grad(v.square().sum(), x)[0]])
        model.compile_blocks()
    assert graphs["called"] == len(flow.blocks(flow.transformer)) > 0
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_an_update_by_inductor_is_that_of_eager_torch_within_rounding(tmp_path):
    gradients = []
    for compiled in (False, True):
        t = adjoint_matching(tmp_path / str(compiled), tiny_sd3(), compile_blocks=compiled)
        t.current_gradient_accumulation_steps = 1
        t.training_step(t.model, next(iter(t.get_train_dataloader())))
        gradients.append({n: p.grad.clone() for n, p in t.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4 * scale + 1e-9, rtol=1e-3)


def test_a_trainer_may_be_made_in_another_thread_than_it_runs_in(tmp_path, graphs):
    t = adjoint_matching(tmp_path, tiny_sd3(), compile_blocks=True)
    with ThreadPoolExecutor(1, initializer=setattr, initargs=(torch._dynamo.config, "recompile_limit", 4)) as pool:
        pool.submit(t.train).result()
    assert graphs["made"] > 4
    assert t.state.global_step == t.state.max_steps


def test_past_the_limit_of_graphs_torch_raises_instead_of_going_on_uncompiled(tmp_path, graphs, monkeypatch):
    monkeypatch.setattr(flow_model, "GRAPHS", 2)
    with torch._dynamo.config.patch(recompile_limit=2):
        t = adjoint_matching(tmp_path, tiny_sd3(), compile_blocks=True)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            t.train()


def test_a_model_that_names_no_blocks_is_refused(tmp_path):
    settings = {"lora": None, "guidance_scale": None, "max_sequence_length": None, "compile_blocks": True}
    with pytest.raises(ValueError, match="`compile_blocks` is True, but GaussianFlow names no blocks of its network"):
        adjoint_matching(tmp_path, GaussianFlow(Shifted(), 1), closeness(0.0), **settings)
