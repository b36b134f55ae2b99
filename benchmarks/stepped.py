"""What the benchmarks share: trainers of the embedded pipeline whose updates take turns, and the calls that they make.

Times are the CPU seconds of this process, which other processes on the machine disturb less than the clock.
"""

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import flowrl_trainers
from flowrl_trainers import FlowRLTrainer
from flowrl_trainers.sampling.draws import ImageKey
from flowrl_trainers.shapes import load_pipeline, prompts

Calls = Counter[tuple[str, int]]
"""How often a network is called: by the kind of call and the number of images in it."""


def make_trainer(method: str, folder: str, updates: int, images: int, **settings: Any) -> FlowRLTrainer:
    """A trainer of the embedded pipeline without guidance, whose update is one micro-step.

    Args:
        method: Such as "AdjointMatching".
        folder: For what the run leaves.
        updates: Of the run.
        images: Of an update.
        **settings: Of the method.
    """
    defaults: dict[str, Any] = {
        "output_dir": folder, "per_device_train_batch_size": images, "max_steps": updates, "guidance_scale": 1.0,
        "max_sequence_length": 8, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    config = getattr(flowrl_trainers, f"{method}Config")(**(defaults | settings))
    trainer = getattr(flowrl_trainers, f"{method}Trainer")
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return trainer(pipeline, "shapes", config, prompts("train"), peft_config=LoraConfig(r=16, lora_alpha=32))


class SteppedRun(TrainerCallback):
    """A trainer's own `train` in a thread that waits after every update, so that several runs can take turns.

    Args:
        trainer: Its run must have as many updates as are asked for.
    """

    def __init__(self, trainer: FlowRLTrainer) -> None:
        self.trainer, self.error = trainer, None
        self.go, self.done, self.stopping = threading.Semaphore(0), threading.Semaphore(0), False
        trainer.add_callback(self)
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()

    def _train(self) -> None:
        self.go.acquire()
        try:
            self.trainer.train()
        except BaseException as error:  # raised again where the update was asked for
            self.error = error
        self.done.release()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.done.release()
        self.go.acquire()
        control.should_training_stop |= self.stopping

    def update(self) -> float:
        """The CPU seconds of the next update, with the log of the update before it."""
        start = time.process_time()
        self.go.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error
        return time.process_time() - start

    def close(self) -> None:
        """End the run."""
        self.stopping = True
        self.go.release()
        self.thread.join()


@contextmanager
def counting(trainer: FlowRLTrainer) -> Iterator[Calls]:
    """Inside, the calls that a trainer makes are counted.

    forward: of the transformer, without a gradient. base: the same with the adapter off. product: forward and backward
    pass to the input. train: forward and backward pass to the weights. score, score_gradient: decoder and rewards,
    without and with a gradient. head, head_train: of the value network or the critic, without and with a gradient.
    """
    calls: Calls = Counter()
    network, vae = trainer.flow.transformer, trainer.flow.decoders()[0]
    lora = next(module for module in network.modules() if isinstance(module, BaseTunerLayer))

    def of_transformer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = kwargs["hidden_states"]
        if torch.is_grad_enabled():
            kind = "product" if x.requires_grad else "train"
        else:
            kind = "base" if lora.disable_adapters else "forward"
        calls[kind, len(x)] += 1

    def of_decoder(module: Any, args: tuple[Any, ...]) -> None:
        calls["score_gradient" if args[0].requires_grad else "score", len(args[0])] += 1

    def of_head(module: Any, args: tuple[Any, ...]) -> None:
        calls["head_train" if torch.is_grad_enabled() else "head", len(args[0])] += 1

    hooks = [network.register_forward_pre_hook(of_transformer, with_kwargs=True)]
    hooks += [vae.decoder.register_forward_pre_hook(of_decoder)]
    hooks += [head.register_forward_pre_hook(of_head) for head in trainer.extra_networks().values()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def one_call(trainer: FlowRLTrainer, kind: str, images: int) -> Callable[[], None]:
    """A function that makes one call of a kind, as `counting` names them."""
    example = trainer.train_dataset[ImageKey(0, 0, 0)]
    examples = [example] * images
    conditioning = trainer.condition(examples)
    x = trainer.initial_latents([example.key] * images, "benchmark")
    sigma = torch.full((images,), 0.5)
    features, mask = trainer.flow.prompt_features(conditioning)
    model = trainer.model

    def velocity(x: Tensor) -> Tensor:
        return model(x, sigma, conditioning, guidance=False)

    def with_gradient(function: Callable[[], Tensor]) -> None:
        with torch.enable_grad():
            function().square().mean().backward()

    def without_gradient(function: Callable[[], Any]) -> None:
        with torch.no_grad():
            function()

    def base() -> None:
        with torch.no_grad(), model.reference():
            velocity(x)

    def product() -> None:
        with torch.enable_grad(), model.reference():
            leaf = x.detach().requires_grad_()
            torch.autograd.grad(velocity(leaf), leaf, grad_outputs=x)

    def head() -> Tensor:
        (network,) = trainer.extra_networks().values()
        return network(x, sigma, features.float(), mask)

    return {
        "forward": lambda: without_gradient(lambda: velocity(x)),
        "base": base,
        "product": product,
        "train": lambda: with_gradient(lambda: velocity(x)),
        "score": lambda: without_gradient(lambda: trainer.scorer.score(x, examples)),
        "score_gradient": lambda: (trainer.scorer.score_with_gradient(x, examples), None)[1],
        "head": lambda: without_gradient(head),
        "head_train": lambda: with_gradient(head),
    }[kind]


def seconds_of(call: Callable[[], None], times: int = 1) -> float:
    """The CPU seconds of one of so many calls."""
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) / times


class PeakMemory(TorchDispatchMode):
    """Inside, the bytes of all tensors that are made there and still in use are counted; weights are not among them.

    Attributes:
        peak: The most bytes at once since `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known: set[int] = set()

    def restart(self) -> None:
        """Forget the peak."""
        self.peak = self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or not size:
            return
        self.known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size
