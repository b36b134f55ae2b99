"""The critic that sees with the base network: whose weights are whose, what it learns, what is kept of it."""

from functools import partial

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn

from flowrl_trainers import ACFlowConfig, ACFlowTrainer, FlowPipeline
from flowrl_trainers.networks import BackboneCritic
from flowrl_trainers.sampling.prompt_groups import ImageKey

from .gaussian import NUMBERED, GaussianFlow, height
from .helpers import make_trainer
from .runs import fork_two, run
from .tiny import tiny_sd3
from .tiny_families import FAMILIES, GUIDANCE, PROMPTS, tiny


def seeing(folder, lora=True, **settings) -> ACFlowTrainer:
    return make_trainer("ACFlowTrainer", folder, lora=lora, **({"critic": "backbone", "timestep_bins": 2} | settings))


def states_of(t: ACFlowTrainer, count: int = 4):
    """Noisy states of one level each, and their conditioning."""
    examples = [t.train_dataset[ImageKey(row, 0, 0)] for row in range(count)]
    return t.initial_latents([e.key for e in examples]), torch.linspace(0.2, 0.9, count), t.condition(examples)


@pytest.mark.parametrize("lora", [True, False])
def test_the_critic_shares_the_weights_of_the_base_and_nothing_of_its_own(tmp_path, lora):
    """Its base velocity is that of the reference, whatever the model learns; it starts from zero; the model's own
    adapter, parameters and gradients are those of a run without a critic.
    """
    t, without = seeing(tmp_path, lora), make_trainer("ACFlowTrainer", tmp_path / "none", lora=lora, critic="none")
    network = t.model.transformer if lora else t.model.frozen
    shared = {p.data_ptr() for p in network.parameters()}
    own = {p.data_ptr() for p in t.critic.parameters()}
    assert all(p.data_ptr() in shared | own for p in t.critic.backbone.parameters())
    assert not own & shared
    assert set(t.model.trained_tensors()) == set(without.model.trained_tensors())
    with torch.no_grad():
        for p in t.trained_parameters():
            p += 0.1 * torch.randn_like(p)
    z, sigma, conditioning = states_of(t)
    assert t.critic(z, sigma, conditioning).tolist() == [0.0] * 4
    with torch.no_grad(), t.model.reference():
        base = t.model(z, sigma, conditioning, guidance=False)
    seen = t.critic.velocity(t.critic.backbone, z, sigma, conditioning)
    torch.testing.assert_close(seen, base, atol=1e-6, rtol=1e-6)
    nn.init.normal_(t.critic.out.weight)
    t.critic(z, sigma, conditioning).sum().backward()
    assert all(p.grad is None for p in [*t.model.parameters(), *network.parameters()])
    assert any(p.grad.abs().max() > 0 for n, p in t.critic.adapter.items() if "lora_B" in n and p.grad is not None)
    if lora:
        assert t.flow.transformer.active_adapters() == ["default"]
        assert list(t.flow.transformer.peft_config) == ["default"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_critic_reads_the_last_layer_of_every_family(family):
    """It depends on the state, the level and the prompt of each image, and learns in every adapted layer it needs."""
    flow = FlowPipeline.from_pipeline(tiny(family), height=32, width=32, **FAMILIES[family][1], **GUIDANCE[family][0])
    flow.transformer.requires_grad_(False)
    z, conditioning = flow.initial_latents(2, torch.Generator().manual_seed(0)), flow.encode_prompts(PROMPTS)
    one = {name: value[:1] for name, value in conditioning.items()}
    critic = BackboneCritic(
        flow.transformer, partial(flow.velocity, guidance=False), flow.last_layer, (z[:1], one),
        flow.lora_target_modules, flow.lora_exclude_modules,
        (lambda conditioning: flow.prompt_features(conditioning)[1]) if flow.last_layer_varies else None,
    )  # fmt: skip
    nn.init.normal_(critic.out.weight)
    sigma = torch.tensor([0.3, 0.8])
    values = critic(z, sigma, conditioning)
    assert values.shape == (2,)
    for other in (critic(z.flip(0), sigma, conditioning), critic(z, sigma.flip(0), conditioning)):
        assert (other - values).abs().min() > 1e-6
    for row, prompt in enumerate(PROMPTS):  # whatever else is in the batch; but for the order of sums
        alone = critic(z[row : row + 1], sigma[row : row + 1], flow.encode_prompts([prompt]))
        torch.testing.assert_close(alone, values[row : row + 1], atol=1e-4, rtol=1e-4)
    values.sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in critic.adapter.items() if "lora_B" in n)


def test_the_critic_learns_what_a_noisy_state_shows(tmp_path):
    """The value is the mean of a channel of the state, read through a network of random weights: 40 steps explain more
    than a quarter of it on new states.
    """
    t = seeing(tmp_path, critic_learning_rate=5e-3)
    generator = torch.Generator().manual_seed(0)
    _, _, conditioning = states_of(t)

    def drawn(count: int):
        z, sigma = torch.randn(4 * count, 4, 4, 4, generator=generator), torch.rand(4 * count, generator=generator)
        repeated = {name: value.repeat_interleave(count, dim=0) for name, value in conditioning.items()}
        return z, sigma, repeated, 4 * z[:, 0].mean(dim=(1, 2))

    for _ in range(40):
        z, sigma, repeated, value = drawn(8)
        (t.critic(z, sigma, repeated) - value).square().mean().backward()
        t.critic_optimizer.step()
        t.critic_optimizer.zero_grad()
    z, sigma, repeated, value = drawn(64)
    with torch.no_grad():
        left = (t.critic(z, sigma, repeated) - value).var() / value.var()
    print(float(left))
    assert left < 0.75


def test_a_run_learns_with_it_and_keeps_its_adapter_alone(tmp_path):
    """The critic's steps leave the model where it is; its folder has its LoRA and head, and no weight of the base."""
    pipeline = tiny_sd3()
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    t = seeing(
        tmp_path,
        pipeline=pipeline,
        max_steps=2,
        critic_warmup_max_steps=2,
        critic_steps=1,
        activation_checkpointing=True,
    )
    trained = [p.detach().clone() for p in t.trained_parameters()]
    start = [p.detach().clone() for p in t.critic.parameters()]
    t.train()
    assert all(torch.equal(a, b) for a, b in zip(trained, t.trained_parameters(), strict=True))  # it only warmed up
    assert not all(torch.equal(a, b) for a, b in zip(start, t.critic.parameters(), strict=True))
    after = {name.replace(".base_layer", ""): v for name, v in pipeline.transformer.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    t.save_model()
    saved = load_file(tmp_path / "critic" / "model.safetensors")
    assert {name.split(".")[0] for name in saved} == {"adapter", "places", "time", "out"}
    assert all(torch.equal(saved[name], p) for name, p in t.critic.state_dict().items())
    assert "BackboneCritic" in (tmp_path / "README.md").read_text()
    assert pipeline.transformer.active_adapters() == ["default"]


@pytest.mark.slow
def test_two_processes_learn_the_critic_of_one(tmp_path):
    settings = {
        "per_device_train_batch_size": 1, "num_generations": 2, "max_steps": 2, "save_strategy": "no", "optim": "sgd",
        "learning_rate": 1.0, "lora_dropout": 0.0, "critic": "backbone", "critic_steps": 1, "timestep_bins": 2,
    }  # fmt: skip
    one = run(tmp_path / "one", "ACFlowTrainer", settings | {"gradient_accumulation_steps": 4})
    assert one.returncode == 0, one.stderr
    for process in fork_two(
        tmp_path / "two", "ACFlowTrainer", settings | {"gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    ):
        assert process.returncode == 0, process.stderr
    whole, shared = (torch.load(tmp_path / name / "result.pt") for name in ("one", "two"))
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(shared["weights"][name], weight, atol=2e-6, rtol=1e-5)
    losses = [[row["critic/loss"] for row in r["history"] if "critic/loss" in row] for r in (whole, shared)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_the_critic_cannot_see_with_is_refused(tmp_path):
    shared = {"output_dir": str(tmp_path), "per_device_train_batch_size": 8, "use_cpu": True, "report_to": "none"}
    with pytest.raises(ValueError, match=r"`critic` \('backbone'\) cannot be trained with `fp16`"):
        ACFlowConfig(**shared, critic="backbone", fp16=True, critic_warmup_max_steps=0)
    with pytest.raises(ValueError, match=r"`critic` \('backbone'\) needs a network that takes adapters .* but Linear"):
        ACFlowTrainer(
            GaussianFlow(nn.Linear(1, 1), 1), height, ACFlowConfig(**shared, critic="backbone"),
            Dataset.from_dict(NUMBERED.to_dict()),
        )  # fmt: skip
