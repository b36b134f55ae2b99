"""The calls that a method's configuration states are those that real updates make."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from flowrl_trainers import FlowRLTrainer
from flowrl_trainers.cost import Call, Drawing, Kind, Phase, counted
from flowrl_trainers.cost.calls import parts
from flowrl_trainers.networks import BackboneCritic
from flowrl_trainers.rewards import FunctionReward
from flowrl_trainers.rewards.base import Sees
from flowrl_trainers.sampling import scoring
from flowrl_trainers.sampling.scoring import pictures_at_a_time
from flowrl_trainers.trainers.reward_gradient_trainer import RewardGradientTrainer

from .helpers import make_trainer, redness
from .tiny import tiny_autoencoder

ROLLOUTS = 2  # of each run
ROLLOUT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_generations": 2}

# A trainer, its settings, and the pictures that are decoded at a time (None: any number).
OPTIONS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "lean": ("AdjointMatchingTrainer", {"adjoint_steps": 3, "num_inference_steps": 4}, None),
    "cached prefixes": (
        "AdjointMatchingTrainer",
        {"adjoint_steps": 2, "num_inference_steps": 4, "prefix_pool_size": 8, "guidance_scale": 3.0},
        None,
    ),
    "branches in one call": (
        "AdjointMatchingTrainer",
        {"adjoint_steps": 2, "guidance_scale": 3.0, "guidance_in_one_call": True, "rollout_batch_size": 4},
        3,
    ),
    "one step": ("AdjointMatchingTrainer", {"adjoint_steps": 1, "num_inference_steps": 1, "reward_scale": 10.0}, None),
    "full": ("AdjointMatchingTrainer", {"adjoint": "full", "adjoint_steps": 3, "product_batch_size": 4}, None),
    "current": ("AdjointMatchingTrainer", {"adjoint": "current", "adjoint_steps": 3}, None),
    "hamiltonian, all weights": ("AdjointMatchingTrainer", {"loss_type": "hamiltonian", "lora": False}, None),
    "memoryless": (
        "AdjointMatchingTrainer",
        {"dynamics": "memoryless", "num_inference_steps": 5, "adjoint_steps": 5, "reward_scale": 10.0},
        None,
    ),
    "memoryless, one step": (
        "AdjointMatchingTrainer",
        {"dynamics": "memoryless", "num_inference_steps": 1, "adjoint_steps": 1, "reward_scale": 10.0},
        None,
    ),
    "guided window": ("AdjointMatchingTrainer", {"guidance_scale": 3.0, "decode_batch_size": 1}, None),
    "value network": ("VGGFlowTrainer", {"num_iterations": 2}, 3),
    "value network, larger rollouts": ("VGGFlowTrainer", {"rollout_batch_size": 4, "decode_batch_size": 3}, None),
    "value network, smaller products": (
        "VGGFlowTrainer",
        {"rollout_batch_size": 4, "product_batch_size": 2, "guidance_scale": 3.0},
        None,
    ),
    "no value network": ("VGGFlowTrainer", {"value_network": "none", "decode_batch_size": 3}, None),
    "guided value network": ("VGGFlowTrainer", {"guidance_scale": 3.0, "timestep_bins": 1}, None),
    "no value network, larger rollouts": (
        "VGGFlowTrainer",
        {"value_network": "none", "rollout_batch_size": 4, "gradient_accumulation_steps": 3, "num_generations": 3},
        None,
    ),
    "guided value network, branches in one call": (
        "VGGFlowTrainer",
        {"guidance_scale": 3.0, "timestep_bins": 1, "guidance_in_one_call": True},
        None,
    ),
    "critic, larger rollouts": (
        "ACFlowTrainer",
        {"critic_warmup_max_steps": 0, "critic_bins_in_one_call": True, "rollout_batch_size": 4, "timestep_bins": 2},
        None,
    ),
    "critic": ("ACFlowTrainer", {"critic_warmup_max_steps": 0, "critic_steps": 3, "decode_batch_size": 3}, None),
    "critic of one's own": (
        "ACFlowTrainer",
        {"critic": "module", "critic_warmup_max_steps": 0, "timestep_bins": 2},
        None,
    ),
    "critic that sees": ("ACFlowTrainer", {"critic": "backbone", "critic_warmup_max_steps": 0}, None),
    "reward of the estimate": ("ACFlowTrainer", {"critic": "reward_of_estimate", "decode_batch_size": 3}, None),
    "no critic": ("ACFlowTrainer", {"critic": "none", "timestep_bins": 2, "guidance_scale": 3.0}, 1),
    "no anchor": ("ACFlowTrainer", {"wasserstein_coefficient": 0, "critic_warmup_max_steps": 0, "lora": False}, None),
    "fixed target": ("ACFlowTrainer", {"target": "fixed", "critic": "none", "guidance_scale": 3.0}, None),
    "fixed target, old anchor": (
        "ACFlowTrainer",
        {"target": "fixed", "target_anchor": "old", "critic": "none", "loss_guidance": False, "guidance_scale": 3.0},
        None,
    ),
    "pull and guard": (
        "ACFlowTrainer",
        {"critic": "none", "wasserstein_coefficient": 0, "old_policy_coefficient": 0.1, "norm_guard": 0.1},
        None,
    ),
    "two branches": ("DiffusionNFTTrainer", {"timestep_bins": 2}, 3),
    "two branches, larger rollouts": (
        "DiffusionNFTTrainer",
        {"timestep_bins": 2, "rollout_batch_size": 4, "guidance_scale": 3.0, "guidance_in_one_call": True},
        None,
    ),
    "two branches, no reference": ("DiffusionNFTTrainer", {"timestep_bins": 2, "reference_coefficient": 0}, None),
    "shared noise": ("TAFSGRPOTrainer", {"num_inference_steps": 4}, None),
    "groups over micro-batches": ("TAFSGRPOTrainer", {"num_generations": 4, "credit_rule": "gain"}, None),
    "larger batches of pictures": ("TAFSGRPOTrainer", {"num_inference_steps": 4, "rollout_batch_size": 4}, None),
    "noise of its own": ("TAFSGRPOTrainer", {"share_initial_noise": False, "credit_rule": "final"}, 1),
    "no divergence": ("TAFSGRPOTrainer", {"beta": 0.0, "guidance_scale": 3.0, "num_inference_steps": 2}, None),
    "budget": ("TAFSGRPOTrainer", {"beta": 0.0, "max_velocity_distance": 1e9, "lora": False}, None),
    "rollouts used twice": (
        "TAFSGRPOTrainer",
        {"steps_per_generation": 4, "num_iterations": 2, "num_generations": 4},
        None,
    ),
    "latents": ("AdjointMatchingTrainer", {"sees": "latents"}, 1),
    "latents, no value network": ("VGGFlowTrainer", {"sees": "latents", "value_network": "none"}, 1),
    "latents, no gradient": ("TAFSGRPOTrainer", {"sees": "latents", "rollout_batch_size": 4}, 1),
    "reward decoder": ("AdjointMatchingTrainer", {"reward_decoder": "tiny"}, 1),
    "reward decoder, value network": ("VGGFlowTrainer", {"reward_decoder": "tiny", "timestep_bins": 1}, None),
}


class Observer:
    """Counts the calls of a trainer's networks and rewards, told apart by grad mode, adapter and what takes gradients."""

    def __init__(self, sees: Sees) -> None:
        self.calls: Counter[tuple[Kind, int]] = Counter()
        function = self._of_latents if sees == "latents" else self._reward
        self.reward = FunctionReward(function, differentiable=True, name="redness", sees=sees)

    def _reward(self, images: torch.Tensor, prompts: list[str], **columns: Any) -> torch.Tensor:
        if not images.requires_grad:
            self.calls[Kind.REWARD, len(images)] += 1
        return redness(images, prompts)

    def _of_latents(self, latents: torch.Tensor, prompts: list[str], **columns: Any) -> torch.Tensor:
        self.calls[Kind.REWARD_GRADIENT if latents.requires_grad else Kind.REWARD, len(latents)] += 1
        return latents.mean(dim=(1, 2, 3))

    def watch(self, t: FlowRLTrainer) -> None:
        layers = [m for m in t.model.transformer.modules() if isinstance(m, BaseTunerLayer)]
        adapter_is_off = lambda: any(layer.disable_adapters for layer in layers)  # noqa: E731
        self._watch_network(t.model.transformer, adapter_is_off)
        if t.model.frozen is not None:
            self._watch_network(t.model.frozen, lambda: True)
        for network in t.extra_networks().values():
            if isinstance(network, BackboneCritic):  # calls of the transformer
                self._watch_network(network.backbone, lambda: not torch.is_grad_enabled())
            else:
                network.register_forward_pre_hook(self._head)
        tiny = t.tiny_decoder if isinstance(t, RewardGradientTrainer) else None
        if tiny is not None:
            self._watch_decoder(tiny.autoencoder, Kind.REWARD_GRADIENT)
        self._watch_decoder(t.flow.pipeline.vae, Kind.REWARD_GRADIENT if tiny is None else Kind.OWN_REWARD_GRADIENT)

    def _watch_decoder(self, autoencoder: Any, with_gradient: Kind) -> None:
        decode = autoencoder.decode

        def decoder(z: torch.Tensor, **settings: Any) -> Any:
            self.calls[with_gradient if torch.is_grad_enabled() else Kind.DECODE, len(z)] += 1
            return decode(z, **settings)

        autoencoder.decode = decoder

    def _head(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self.calls[Kind.HEAD_TRAIN if torch.is_grad_enabled() else Kind.HEAD, len(args[0])] += 1

    def _watch_network(self, network: torch.nn.Module, is_base: Callable[[], bool]) -> None:
        def seen(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = kwargs["hidden_states"]
            if not torch.is_grad_enabled():
                kind = Kind.BASE if is_base() else Kind.FORWARD
            elif x.requires_grad:
                kind = Kind.BASE_PRODUCT if is_base() else Kind.PRODUCT
            else:
                assert not is_base()
                kind = Kind.TRAIN
            self.calls[kind, len(x)] += 1

        network.register_forward_pre_hook(seen, with_kwargs=True)


def calls_of_the_probe(t: FlowRLTrainer, drawing: Drawing) -> list[Call]:
    """Two pictures before training."""
    steps = len(t.sigmas) - 1
    calls = drawing.velocity(Kind.FORWARD, 2, steps, Phase.ROLLOUT)
    if t.needs_reward_gradient:
        return calls + drawing.reward_gradients(2, 1, t.args.decode_batch_size, t.args.images_at_once)
    decoded = parts(2, min(2, drawing.decoded_together)) if drawing.decodes else {}
    calls += [Call(Kind.DECODE, size, count, Phase.REWARD) for size, count in decoded.items()]
    return [*calls, Call(Kind.REWARD, 2, 1, Phase.REWARD)]


# What another option shows as well, but for the combination.
SLOW = {
    "memoryless, one step", "guided value network", "no value network, larger rollouts",
    "guided value network, branches in one call", "critic, larger rollouts", "fixed target, old anchor",
    "two branches, larger rollouts", "larger batches of pictures", "latents, no gradient",
    "reward decoder, value network",
}  # fmt: skip


@pytest.mark.parametrize("option", [pytest.param(o, marks=[pytest.mark.slow] if o in SLOW else []) for o in OPTIONS])
def test_calls_made_are_the_calls_stated(tmp_path, monkeypatch, option):
    """Over two rollouts with all updates on them, the probe before, and what the first rollout alone needs."""
    name, settings, together = OPTIONS[option]
    settings, sees = {k: v for k, v in settings.items() if k != "sees"}, settings.get("sees", "images")
    if "reward_decoder" in settings:
        tiny_autoencoder().save_pretrained(tmp_path / "tiny")
        settings["reward_decoder"] = str(tmp_path / "tiny")
    own = None
    if settings.get("critic") == "module":
        own = make_trainer("ACFlowTrainer", tmp_path, critic="convolutional").critic
    monkeypatch.setattr(scoring, "MEGAPIXEL", (together or 1000) * 32**2)
    observer = Observer(sees)
    updates = settings.get("steps_per_generation", 2) // 2 * settings.get("num_iterations", 1)
    steps = ROLLOUTS * updates
    t = make_trainer(name, tmp_path, reward=observer.reward, own_critic=own, **(ROLLOUT | settings), max_steps=steps)
    assert t.args.updates_on_rollout == updates
    observer.watch(t)
    t.train()
    together = pictures_at_a_time(t.flow, 1000)
    drawing = Drawing(t.flow.guided, together, t.flow.guidance_in_one_call, decodes=sees == "images")
    stated = [*calls_of_the_probe(t, drawing), *t.args.first_calls(drawing), *ROLLOUTS * t.args.calls(drawing)]
    assert observer.calls == counted(stated)


def test_a_batch_is_split_into_whole_parts_and_a_rest():
    assert parts(7, 3) == {3: 2, 1: 1}
    assert parts(6, 3) == {3: 2}
    assert parts(2, 3) == {2: 1}
