"""`Estimator`: operations and bytes of every call of a run, and the sum of what each phase holds."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..networks import critic, value_network
from ..pipelines.quantization import Quantization
from ..pipelines.tiny_decoder import TinyDecoder
from ..rewards.base import Sees
from .architectures import META
from .calls import Call, Kind, Phase, counted
from .conditioning import blank_conditioning
from .meter import LikeAGPU, Meter, metered
from .optimizers import ADAMW_BYTES
from .rewards import BlankReward

GATHERED_BLOCKS = 2  # the one that computes, and the one that is fetched, or whose gradients are added up, meanwhile
ENCODE = "encode"


@dataclass(frozen=True)
class Work:
    """What one call costs.

    Attributes:
        flop: Floating-point operations.
        operations: ATen operations.
        peak: The most bytes that it holds at a time.
        graph: Those of a training call before its backward pass.
    """

    flop: int
    operations: int
    peak: int
    graph: int = 0


@dataclass(frozen=True)
class PhaseCost:
    """What a phase holds at its peak, in bytes by name, and what is computed in it.

    Attributes:
        parts: Bytes of weights, adapter, gradients, optimizer, rewards, buffer and of the largest call.
        largest: The call that holds most beside what stays.
        flop: Floating-point operations of the phase, over one rollout and its updates.
        operations: ATen operations.
    """

    parts: dict[str, int]
    largest: str
    flop: int = 0
    operations: int = 0

    @property
    def peak(self) -> int:
        """The bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """What a run costs one process.

    Attributes:
        phases: By name, in the order of a run.
        calls: The calls of the transformer, rewards and heads by kind, per update.
        updates: Those that use one rollout.
        once: The calls by kind that the first rollouts make beside that, once in a run.
        taken: The names of settings that save memory and are as low as they go.
    """

    phases: dict[str, PhaseCost]
    calls: dict[str, float]
    updates: int
    once: dict[str, int]
    taken: frozenset[str] = frozenset()

    @property
    def peak_phase(self) -> str:
        """The name of the phase that holds most."""
        return max(self.phases, key=lambda name: self.phases[name].peak)

    @property
    def peak_gib(self) -> float:
        """What it holds, in GiB."""
        return self.phases[self.peak_phase].peak / 2**30

    @property
    def tflop_per_update(self) -> float:
        """Floating-point operations of one update, in units of 10^12, evaluation left out."""
        counted_phases = [cost for name, cost in self.phases.items() if name != Phase.EVALUATION]
        return sum(cost.flop for cost in counted_phases) / self.updates / 1e12

    def after(self, encoding: PhaseCost) -> "Estimate":
        """With the phase before training in which prompts are encoded; without encoders, as it is."""
        return replace(self, phases={ENCODE: encoding} | self.phases) if encoding.parts else self

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "peak_gib": self.peak_gib,
            "peak_phase": self.peak_phase,
            "phases": {
                name: {
                    "peak_gib": cost.peak / 2**30,
                    "gib": {part: size / 2**30 for part, size in cost.parts.items()},
                    "largest_call": cost.largest,
                    "tflop_per_update": cost.flop / self.updates / 1e12,
                }
                for name, cost in self.phases.items()
            },
            "tflop_per_update": self.tflop_per_update,
            "calls": self.calls,
            "calls_once": self.once,
        }


@dataclass
class Estimator:
    """Measures calls on the meta device.

    Attributes:
        flow: The pipeline, on the meta device.
        rewards: Those of training.
        lora: The adapter that is trained; None for all weights.
        autocast: The lower precision of the run; None for float32.
        head: "value_network" or "critic"; None without one.
        checkpointing: Whether activations are computed twice instead of kept.
        encoder_dtype: The precision of the text encoders.
        judges: Rewards that evaluation adds; they are on the device meanwhile.
        quantization: In how many bits the linear layers of the transformer are kept.
        copy_as_loaded: Whether the frozen copy of full fine-tuning keeps the precision of the loaded network.
        apart: Whether the transformer leaves the device while pictures are decoded and scored, and decoders and
            rewards at all other times.
        reward_decoder: Takes the gradient of the reward in place of the pipeline's own decoder; on the meta device.
        shared_by: The processes over which FSDP2 spreads the transformer, its frozen copy and a value network; 1
            leaves them whole. It may be set anew between two estimates.
        optimizer_bytes: What the optimizer keeps for each trained number, see `state_bytes`; a critic has AdamW.
        copies: The names of further sets of the trained weights that are kept, such as their average.
        merged: Whether rollouts are drawn with the adapter added to a copy of the adapted weights.
    """

    flow: Any
    rewards: list[BlankReward]
    lora: LoraConfig | None
    autocast: torch.dtype | None = None
    head: str | None = None
    checkpointing: bool = False
    encoder_dtype: torch.dtype = torch.float32
    judges: list[BlankReward] = field(default_factory=list)
    quantization: Quantization | None = None
    copy_as_loaded: bool = False
    apart: bool = False
    reward_decoder: TinyDecoder | None = None
    shared_by: int = 1
    optimizer_bytes: int = ADAMW_BYTES
    copies: Sequence[str] = ()
    merged: bool = False
    _works: dict[tuple[Kind, int, bool, bool], Work] = field(default_factory=dict)
    _meter: Meter = field(default_factory=Meter)

    def __post_init__(self) -> None:
        network = self.flow.transformer
        loaded = deepcopy(network) if self.lora is None and self.copy_as_loaded else None
        self.quantized = quantized_size(linear_layers(network), self.quantization)
        quantized = [] if self.quantization is None else [layer.weight for layer in linear_layers(network)]
        self.whole = {id(weight) for weight in quantized}  # by FSDP2 as well
        if self.lora is not None:
            self.lora.target_modules = self.lora.target_modules or list(self.flow.lora_target_modules)
            self.lora.exclude_modules = self.lora.exclude_modules or list(self.flow.lora_exclude_modules) or None
            network.requires_grad_(False)
            network.add_adapter(self.lora)
        else:
            network.requires_grad_(True)
        with META:
            cast_training_params(network, dtype=torch.float32)
        self.frozen = loaded or (deepcopy(network) if self.lora is None else None)
        if self.checkpointing:
            network.enable_gradient_checkpointing(
                gradient_checkpointing_func=partial(self._checkpointed, self.autocast)
            )
            for decoder in self.flow.decoders():
                with suppress(ValueError):  # raised by models without gradient checkpointing
                    decoder.enable_gradient_checkpointing(
                        gradient_checkpointing_func=partial(self._checkpointed, None)
                    )

    # ---- the work of a call ----------------------------------------------------------------------------------------

    def work(self, call: Call) -> Work:
        """What one call of this kind and batch costs; every one is measured once."""
        shared = self.shared_by > 1
        key = call.kind, call.batch, call.guided, shared and self.lora is None
        if key not in self._works:
            if call.kind in (Kind.TRAIN, Kind.HEAD_TRAIN):  # gradients are added to those of states before
                for parameter in self._of_the_optimizer:
                    parameter.grad = torch.empty_like(parameter)
            with metered(self.autocast if call.kind in _OF_TRANSFORMER else None, not shared) as self._meter:
                graph = self._do(call)
            self._works[key] = Work(self._meter.flop, self._meter.operations, self._meter.peak, graph)
            for network in (self.flow.transformer, self._head):
                if network is not None:
                    network.zero_grad()
        return self._works[key]

    def _checkpointed(self, autocast: torch.dtype | None, block: Callable[..., Any], *inputs: Any) -> Any:
        """What a block returns, computed again in the backward pass: as on a GPU, where torch leaves every mode."""
        like_a_gpu = LikeAGPU(self._meter, autocast)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), like_a_gpu))

    def _do(self, call: Call) -> int:
        """Do the work of a call, and return the bytes of its graph; see `Work`."""
        network, batch, graph = self.flow.transformer, call.batch, 0
        match call.kind:
            case Kind.FORWARD:
                with torch.no_grad():
                    self._velocity(self._latents(batch), call.guided)
            case Kind.BASE:
                with torch.no_grad():
                    self._as_base(lambda: self._velocity(self._latents(batch), call.guided))
            case Kind.PRODUCT:
                self._product(batch, call.guided)
            case Kind.BASE_PRODUCT:
                self._as_base(lambda: self._product(batch, call.guided))
            case Kind.TRAIN:
                network.train()
                loss = self._velocity(self._latents(batch), call.guided).square().mean()
                graph = self._meter.alive
                loss.backward()
                network.eval()
            case Kind.HEAD:
                with torch.no_grad():
                    self._ask_head(batch)
            case Kind.HEAD_TRAIN:
                self._ask_head(batch).square().mean().backward()
            case Kind.DECODE:
                with torch.no_grad():
                    self.flow.images(self._latents(batch))
            case Kind.REWARD:
                with torch.no_grad():
                    self._score(
                        self._latents(batch) if self._is_seen("latents") else None,
                        self._pictures(batch) if self._is_seen("images") else None,
                    )
            case Kind.REWARD_GRADIENT:
                self._reward_gradient(batch, self.reward_decoder or self.flow.decode)
            case Kind.OWN_REWARD_GRADIENT:
                self._reward_gradient(batch, self.flow.decode)
        return graph

    def _latents(self, batch: int) -> Tensor:
        return self.flow.initial_latents(batch)

    def _pictures(self, batch: int) -> Tensor:
        height, width = (self.flow.settings[name] for name in ("height", "width"))
        return torch.empty(batch, 3, height, width, device=META)

    def _velocity(self, x: Tensor, guided: bool) -> Tensor:
        sigma, conditioning = x.new_empty(len(x)), blank_conditioning(self.flow, len(x), self.encoder_dtype)
        return self.flow.velocity(self.flow.transformer, x, sigma, conditioning, guidance=guided)

    def _product(self, batch: int, guided: bool) -> None:
        x = self._latents(batch).requires_grad_()
        v = self._velocity(x, guided)
        torch.autograd.grad(v, x, torch.empty_like(v))

    def _as_base(self, work: Callable[[], Any]) -> None:
        """With the adapter off; all weights frozen where these are trained, as in the frozen copy."""
        network = self.flow.transformer
        if self.lora is None:
            network.requires_grad_(False)
            work()
            network.requires_grad_(True)
        else:
            network.disable_adapters()
            work()
            network.enable_adapters()

    def _reward_gradient(self, batch: int, decode: Callable[[Tensor], Tensor]) -> None:
        x = self._latents(batch).requires_grad_()
        torch.autograd.grad(self._score(x, decode(x) if self._is_seen("images") else None), x)

    def _is_seen(self, view: Sees) -> bool:
        return any(reward.sees == view for reward in self.rewards)

    def _score(self, latents: Tensor | None, images: Tensor | None) -> Tensor:
        """latents, images: None where no reward sees them."""
        views = {"latents": latents, "images": images}
        seen = [(reward, views[reward.sees]) for reward in self.rewards]
        return torch.stack([reward(view.clone()) for reward, view in seen if view is not None]).sum()

    def _ask_head(self, batch: int) -> Tensor:
        assert self._head is not None
        x = self._latents(batch)
        features, mask = self.flow.prompt_features(blank_conditioning(self.flow, batch, self.encoder_dtype))
        return self._head(x, x.new_empty(batch), features.float().to(META), mask.to(META))

    @cached_property
    def _head(self) -> nn.Module | None:
        if self.head is None:
            return None
        features, _ = self.flow.prompt_features(blank_conditioning(self.flow, 1, self.encoder_dtype))
        make = value_network if self.head == "value_network" else critic
        with META:
            return make(self._latents(1).shape[1:], features.shape[-1])

    # ---- a run -----------------------------------------------------------------------------------------------------

    def estimate(
        self, calls: list[Call], evaluation: list[Call], updates: int, latents_kept: int, once: list[Call]
    ) -> Estimate:
        """The sums over one rollout and its updates.

        Args:
            calls: Of one rollout and its updates.
            evaluation: Of one batch of an evaluation; none without one.
            updates: Those that use a rollout.
            latents_kept: The latents of all images of the rollout that wait in the buffer.
            once: Calls of the first rollouts alone; they are named and must fit, and their operations are not
                counted.
        """
        phases = {}
        for phase in Phase:
            mine = [call for call in (*calls, *evaluation) if call.phase == phase]
            first = [call for call in once if call.phase == phase]
            if mine:
                phases[str(phase)] = self._phase(phase, mine, first, latents_kept)
        per_update = {kind: count / updates for kind, count in _by_kind(calls).items()}
        return Estimate(phases, per_update, updates, _by_kind(once))

    def _phase(self, phase: Phase, calls: list[Call], once: list[Call], latents_kept: int) -> PhaseCost:
        works = [(self.work(call), call) for call in calls]
        first = [(self.work(call), call) for call in once]
        held = [(self._held(phase, work, call, latents_kept), call) for work, call in (*works, *first)]
        if phase == Phase.UPDATE:
            # Of VGG-Flow's two networks the value network is asked last, and so is differentiated first.
            of_head = max((work.peak for work, call in works if call.kind == Kind.HEAD_TRAIN), default=0)
            for (parts, _), (work, _) in zip(held, (*works, *first), strict=True):
                parts["largest call"] += max(0, work.graph + of_head - work.peak) if work.graph else 0
        parts, call = max(held, key=lambda pair: sum(pair[0].values()))
        return PhaseCost(
            parts,
            f"{call.kind} of {call.batch}",
            sum(work.flop * call.count for work, call in works),
            sum(work.operations * call.count for work, call in works),
        )

    def _held(self, phase: Phase, work: Work, call: Call, latents_kept: int) -> dict[str, int]:
        """What is on the device during a call, in bytes by name; arguments as in `_phase`."""
        parts = self.resident() | {"buffer": latents_kept * _bytes_of(self._latents(1))}
        if phase == Phase.EVALUATION:
            parts["further rewards"] = _bytes_of_rewards(self.judges)
        if phase == Phase.ROLLOUT and self.merged:
            adapted = [m for m in self.flow.transformer.modules() if isinstance(m, BaseTunerLayer)]
            parts["merged weights"] = sum(bytes_of_network(m.get_base_layer()) for m in adapted)
        if phase == Phase.UPDATE:
            parts["gradients"] = self._held_of(self._of_the_optimizer)
        if self.apart:
            judges = call.kind in _OF_JUDGES
            away = NETWORK if judges else JUDGES
            parts = {name: size for name, size in parts.items() if name not in away}
        layer = self.quantized.largest if call.kind in _OF_TRANSFORMER else 0  # one at a time in all its bits
        return parts | {"gathered": self.gathered(call.kind), "largest call": work.peak + layer}

    @property
    def trained(self) -> list[nn.Parameter]:
        """The adapter, or all weights where these are trained."""
        return [p for p in self.flow.transformer.parameters() if p.requires_grad]

    @property
    def _of_the_optimizer(self) -> list[nn.Parameter]:
        """What is trained, with a value network; a critic has an optimizer of its own."""
        head = self._head if self._head_is_shared else None
        return self.trained + ([] if head is None else [*head.parameters()])

    def resident(self) -> dict[str, int]:
        """What stays on the device during a run, in bytes."""
        network, head = self.flow.transformer, self._head
        trained = self._held_of(self.trained)
        of_head = (
            0 if head is None else self._held_of(head.parameters()) if self._head_is_shared else bytes_of_network(head)
        )
        weights = self._held_of(p for p in network.parameters() if not p.requires_grad)
        copy = [] if self.frozen is None else [*self.frozen.parameters()]
        buffers = [buffer for part in (network, self.frozen) if part is not None for buffer in part.buffers()]
        weights += self._held_of(copy) + sum(map(_bytes_of, buffers)) - self.quantized.saved
        # What is trained is in float32. A critic has an AdamW of its own.
        of_critic, with_head = (0, trained + of_head) if self._head_is_shared else (of_head, trained)
        optimizer = (self.optimizer_bytes * with_head + ADAMW_BYTES * of_critic) // torch.float32.itemsize
        return {
            "weights": weights,
            "adapter" if self.lora is not None else "trained weights": trained,
            "optimizer": optimizer,
            **dict.fromkeys(self.copies, with_head),
            "head": of_head,
            "autoencoder": sum(bytes_of_network(network) for network in self.flow.decoders()),
            "reward decoder": 0 if self.reward_decoder is None else bytes_of_network(self.reward_decoder.autoencoder),
            "rewards": _bytes_of_rewards(self.rewards),
        }

    # ---- FSDP2 -----------------------------------------------------------------------------------------------------

    @property
    def _head_is_shared(self) -> bool:
        """A value network is trained with the transformer; a critic has an optimizer of its own, and stays whole."""
        return self.head == "value_network"

    def _held_of(self, parameters: Iterable[Tensor]) -> int:
        """What this process holds of them: its share, and quantised weights whole."""
        return sum(share_of([p], 1 if id(p) in self.whole else self.shared_by) for p in parameters)

    def gathered(self, kind: Kind) -> int:
        """What a call gathers from the other processes beside this one's share, in bytes.

        A call of the model gathers what lies outside of the repeated blocks (a value network included) until it ends;
        one of the transformer, every block before it computes, while the one before still does: two blocks. A backward
        pass has their gradients whole beside that, until the processes have added and divided them.
        """
        network = self.flow.transformer
        of_head = [*self._head.parameters()] if self._head is not None and self._head_is_shared else []
        if self.shared_by == 1 or kind not in (*_OF_TRANSFORMER, *([Kind.HEAD, Kind.HEAD_TRAIN] if of_head else [])):
            return 0
        blocks = [[p for p in block.parameters() if id(p) not in self.whole] for block in self.flow.blocks(network)]
        inside = self.whole | {id(p) for block in blocks for p in block}
        outside = [p for p in network.parameters() if id(p) not in inside] + of_head
        found = sum(_bytes_of(p) for p in outside)
        if kind in (Kind.TRAIN, Kind.HEAD_TRAIN):
            found += sum(_bytes_of(p) for p in outside if p.requires_grad)
        if kind in _OF_TRANSFORMER:
            found += GATHERED_BLOCKS * max(sum(_bytes_of(p) for p in block) for block in blocks)
        if kind == Kind.TRAIN:
            found += GATHERED_BLOCKS * max(sum(_bytes_of(p) for p in block if p.requires_grad) for block in blocks)
        return found


def _by_kind(calls: list[Call]) -> dict[str, int]:
    names = Counter[str]()
    for (kind, _), count in counted(calls).items():
        names[str(kind)] += count
    return dict(names)


@dataclass(frozen=True)
class QuantizedSize:
    """What the quantisation of linear layers changes, in bytes.

    Attributes:
        saved: Those that its weights need less.
        largest: Of the largest of them in the precision of the computation, which a call holds for a moment.
    """

    saved: int = 0
    largest: int = 0


def quantized_size(layers: Iterable[nn.Linear], quantization: Quantization | None) -> QuantizedSize:
    """nf4: half a byte for each number, and 4 bytes for every 64; 8 bits: one byte, and 4 for each row."""
    if quantization is None:
        return QuantizedSize()
    saved = largest = 0
    for layer in layers:
        full, count = _bytes_of(layer.weight), layer.weight.numel()
        in_eight = count + 4 * layer.out_features
        saved += full - (count // 2 + 4 * -(-count // 64) if quantization == "nf4" else in_eight)
        largest = max(largest, full)
    return QuantizedSize(saved, largest)


def linear_layers(network: nn.Module) -> list[nn.Linear]:
    """Those of a transformer that quantisation keeps in fewer bits."""
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear)]


def share_of(tensors: Iterable[Tensor], processes: int) -> int:
    """The bytes that the first of so many processes holds of tensors which FSDP2 splits along their first dimension.

    It has the longer part of what cannot be divided evenly.
    """
    rows = [(t, t.shape[0] if t.dim() else 1) for t in tensors if t.numel()]
    return sum(-(-n // processes) * (_bytes_of(t) // n) for t, n in rows)


NETWORK = ("weights", "adapter", "trained weights")
JUDGES = ("autoencoder", "rewards", "further rewards")
_OF_JUDGES = (Kind.DECODE, Kind.REWARD, Kind.REWARD_GRADIENT, Kind.OWN_REWARD_GRADIENT)
_OF_TRANSFORMER = (Kind.FORWARD, Kind.BASE, Kind.PRODUCT, Kind.BASE_PRODUCT, Kind.TRAIN)


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes_of_rewards(rewards: list[BlankReward]) -> int:
    return sum(bytes_of_network(reward.network) for reward in rewards if reward.network is not None)


def bytes_of_network(network: nn.Module) -> int:
    """Of parameters and buffers."""
    return sum(_bytes_of(tensor) for tensor in [*network.parameters(), *network.buffers()])
