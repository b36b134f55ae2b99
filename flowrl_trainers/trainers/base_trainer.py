"""`FlowRLTrainer`: what the four methods share around their own rollout, targets and loss."""

import copy
import logging
import math
import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast
from datasets import Dataset
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.training_utils import EMAModel, cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState, enable_full_determinism, set_seed
from transformers.trainer_utils import TrainOutput
from transformers.utils import is_in_notebook

from ..pipelines import Conditioning, FlowPipeline
from ..rewards import as_rewards
from ..rewards.named import RewardLike
from ..run_folder.checkpoints import MANIFEST, checkpoints
from ..sampling.conditioning import ConditioningCache
from ..sampling.draws import keyed_generator
from ..sampling.flow_model import FlowModel
from ..sampling.micro_batch import MicroBatch
from ..sampling.prompt_groups import Example, ImageKey, PromptDataset, PromptGroupSampler
from ..sampling.scoring import ask_rewards, call_rewards, decoded, pictures_at_a_time, score_with_gradient
from .base_config import FlowRLConfig
from .evaluation import Pictures, Sampler
from .input_checks import check_best_metric, check_dataset, check_lora, check_output_dir, check_rewards
from .loop_callback import LoopCallback
from .run_evaluation import RunEvaluation, means

logger = logging.getLogger(__name__)

SETTINGS = ("height", "width", "guidance_scale", "negative_prompt", "max_sequence_length")
PROBE = 2


class FlowRLTrainer(RunEvaluation):
    """The base of all trainers.

    An algorithm overrides `rollout` (how latents are drawn and what is kept of it), `prepare` (what is computed once per rollout)
    and `micro_batch_losses`.

    Args:
        model: a Hub id or folder of a diffusers pipeline, a loaded pipeline, or a `FlowPipeline`.
        reward_funcs: a name, a callable, a `Reward`, or a list of them; see `flowrl_trainers.rewards.Reward`.
        args: the configuration; None for its defaults.
        train_dataset: a `datasets.Dataset` with the column `prompt`; its other columns reach the rewards.
        eval_dataset: held-out prompts, one image each; a row that is repeated gives another image of the same prompt.
        eval_reward_funcs: rewards that evaluation adds to `reward_funcs` and training never sees.
        callbacks: as in `transformers.Trainer`.
        optimizers: as in `transformers.Trainer`, of all trained parameters; where these are made by the trainer (a LoRA from
            `peft_config`, a value network), set `trainer.optimizer` afterwards instead.
        peft_config: the LoRA to train; None trains the adapter that the pipeline carries or, without one, all weights.
    """

    config_class: ClassVar[type[FlowRLConfig]] = FlowRLConfig
    needs_reward_gradient: ClassVar[bool] = False
    replayed_settings: ClassVar[tuple[str, ...]] = ("seed", "num_inference_steps", "num_generations", "num_iterations", "ema_decay")
    loss_is_scaled_for_ga = False

    args: FlowRLConfig
    model: FlowModel

    def __init__(
        self,
        model: str | Path | DiffusionPipeline | FlowPipeline,
        reward_funcs: RewardLike | list[RewardLike],
        args: FlowRLConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        eval_reward_funcs: RewardLike | list[RewardLike] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: LoraConfig | None = None,
    ) -> None:
        args = args or self.config_class(output_dir=self._name.lower().replace(" ", "-"))
        check_output_dir(args)
        self.rewards = as_rewards(reward_funcs)
        self.eval_rewards = as_rewards(eval_reward_funcs, "eval_reward_funcs") if eval_reward_funcs else []
        check_rewards(self.rewards, args, type(self).__name__ if self.needs_reward_gradient else None)
        check_best_metric(args, [*self.rewards, *self.eval_rewards])
        train_dataset = check_dataset(train_dataset, "train_dataset", args)
        if eval_dataset is not None:
            check_dataset(eval_dataset, "eval_dataset")
        elif args.eval_strategy != "no":
            raise ValueError(f"`eval_strategy` is '{args.eval_strategy.value}', but there is no `eval_dataset`: pass held-out prompts.")
        self.flow = self._flow_pipeline(model, args)
        for sentence in self.flow.advice(args.num_inference_steps):
            logger.warning(sentence)
        (enable_full_determinism if args.full_determinism else set_seed)(args.seed)  # a LoRA starts from random numbers
        self.peft_config = self._add_adapter(peft_config)
        self.sampler = PromptGroupSampler(
            num_prompts=len(train_dataset),
            num_generations=args.num_generations,
            images_per_update=args.images_per_update,
            updates_per_rollout=args.updates_per_rollout,
            repeats=args.micro_steps_per_rollout * args.num_iterations,
            num_processes=args.world_size,
            seed=args.seed,
        )
        self.conditioning = ConditioningCache(self.flow)
        # Before Trainer places the network: it and the text encoders need not fit onto the device together.
        self._encode_prompts(args, train_dataset, eval_dataset)
        super().__init__(
            model=FlowModel(self.flow, has_adapter=self.peft_config is not None),
            args=args,
            data_collator=list,
            train_dataset=PromptDataset(train_dataset),
            eval_dataset=eval_dataset,
            callbacks=[LoopCallback(self), *(callbacks or [])],
            optimizers=optimizers,
        )
        if is_in_notebook() and not args.disable_tqdm:
            from .notebook_table import NotebookProgressCallback, NotebookTable  # which need IPython

            self.remove_callback(NotebookProgressCallback)
            self.add_callback(NotebookTable(self))
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._window: list[MicroBatch] = []
        self._micro_step = 0
        self._updates = 0  # since `train` was called
        self._base_rows: dict[str, tuple[dict[str, float], dict[str, torch.Tensor]]] = {}
        self._base_pictures: dict[str, Pictures] = {}
        self.rows: dict[str, dict[str, float]] = {}
        self.told_for_card: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self._training_since: float | None = None
        self.rollout_reward: float | None = None
        self.reward_weights = torch.tensor(args.reward_weights or [1.0] * len(self.rewards), device=args.device)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("FSDP and DeepSpeed are not supported: use `--accelerate_config ddp`, which keeps the network whole.")
        if args.device.type == "cuda" and torch.backends.cuda.cudnn_sdp_enabled():
            # pytorch/pytorch#196678 and NVIDIA/cudnn-frontend#628: NaN in the gradients, or an illegal memory access.
            torch.backends.cuda.enable_cudnn_sdp(False)
            logger.warning("cuDNN's attention is turned off in this process: its backward pass fails on some shapes on Hopper cards.")
        self._place_frozen_parts()
        self.sigmas = self.flow.sigmas(args.num_inference_steps).to(args.device)
        head = self.make_head()
        self.model.head = None if head is None else self.same_on_all_processes(head.to(args.device))
        self.ema = EMAModel(self.trained_parameters(), decay=args.ema_decay) if args.ema_decay is not None else None
        self.settings = self.run_settings()
        self.set_up()
        if self.optimizer is not None:
            self._check_optimizer(self.optimizer)

    # ---- what an algorithm overrides -------------------------------------------------------------------------------------

    num_trained_states: int
    """The states of each trajectory at which the loss is taken."""

    def make_head(self) -> nn.Module | None:
        """The network that is trained beside the transformer, called with latents, sigma, prompt features and their mask; none by default.

        `head_name` is what its folder and metrics are called.
        """
        return None

    def head_learning_rate(self) -> float:
        """The learning rate of the head."""
        return self.args.learning_rate

    def set_up(self) -> None:
        """The last act of `__init__`: check and keep what the algorithm needs; nothing by default."""
        return None

    @abstractmethod
    def rollout(self, latents: torch.Tensor, conditioning: Conditioning, keys: list[ImageKey]) -> dict[str, torch.Tensor]:
        """Sample from initial latents (B, ...) with `self.model`, without gradients; return what is kept, images first.

        keys: of the images, from which further random draws are to be made; see `keyed_generator`.
        """

    @abstractmethod
    def prepare(self, rollout: list[MicroBatch]) -> None:
        """Score a rollout and add what the loss needs (targets, adjoints, advantages) to its micro-batches, in place."""

    @abstractmethod
    def micro_batch_losses(self, model: nn.Module, batch: MicroBatch, conditioning: Conditioning, state: int) -> torch.Tensor:
        """The losses (B,) of the images of a micro-batch at one trained state; what is minimised is the mean over images and states.

        Each state is differentiated before the next is computed, so that memory does not grow with their number.
        """

    @property
    def learns(self) -> bool:
        """Whether the transformer learns from the present rollout; not while an algorithm warms up."""
        return True

    def reason_to_stop(self) -> str | None:
        """Why training should end after this update, if it should."""
        target, reward = self.args.target_reward, self.rollout_reward
        if target is not None and reward is not None and reward >= target:
            return f"the mean reward of a rollout, {reward:.4g}, reached `target_reward` ({target})"
        return None

    def evaluation_samplers(self) -> dict[str, Sampler]:
        """How evaluation draws, by the names of its rows. Pictures are drawn by the first, whose name is empty. The ODE by default."""
        steps = self.args.eval_num_inference_steps or self.args.num_inference_steps
        return {"": self.ode_sampler(self.flow.sigmas(steps).to(self.args.device))}

    def algorithm_state(self) -> dict[str, Any]:
        """What a checkpoint has to keep of the algorithm beside weights and rollout: tensors, numbers, strings."""
        return {}

    def load_algorithm_state(self, state: dict[str, Any]) -> None:
        """Take up what `algorithm_state` returned."""

    # ---- set-up ----------------------------------------------------------------------------------------------------------

    @staticmethod
    def _flow_pipeline(model: str | Path | DiffusionPipeline | FlowPipeline, args: FlowRLConfig) -> FlowPipeline:
        settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
        if isinstance(model, FlowPipeline):
            if settings:
                raise ValueError(
                    f"`{next(iter(settings))}` is set in `args`, but `model` is a `FlowPipeline` with settings of its own: set it there."
                )
            return model
        if isinstance(model, (str, Path)):
            dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
            return FlowPipeline.from_pretrained(model, dtype=dtype, **settings)
        return FlowPipeline.from_pipeline(model, **settings)

    def _add_adapter(self, peft_config: LoraConfig | None) -> LoraConfig | None:
        """Prepare the transformer's trainable parameters; returns the configuration of the adapter that is trained, if any."""
        if any(isinstance(module, BaseTunerLayer) for encoder in self.flow.text_encoders() for module in encoder.modules()):
            raise ValueError(
                "A text encoder of the pipeline carries a LoRA, which training would use and its file would not keep: call "
                "`pipeline.fuse_lora()` and `pipeline.unload_lora_weights()` first, or load the transformer's part alone."
            )
        transformer: Any = self.flow.transformer
        carries = any(isinstance(module, BaseTunerLayer) for module in transformer.modules())
        if peft_config is None:
            if carries:
                return self._continued_adapter(transformer)
            transformer.requires_grad_(True)
            cast_training_params(transformer, dtype=torch.float32)
            return None
        if carries:
            raise ValueError(
                "The pipeline already carries a LoRA: call `pipeline.fuse_lora()` and `pipeline.unload_lora_weights()` first, or pass no "
                "`peft_config` to train that one further."
            )
        if not isinstance(transformer, PeftAdapterMixin):
            raise ValueError(
                f"`peft_config` is set, but {type(transformer).__name__} has no `add_adapter`: derive it from "
                "`diffusers.loaders.PeftAdapterMixin`, or pass no `peft_config` to train all weights."
            )
        check_lora(peft_config)
        peft_config = copy.deepcopy(peft_config)
        peft_config.target_modules = peft_config.target_modules or list(self.flow.lora_target_modules)
        peft_config.exclude_modules = peft_config.exclude_modules or list(self.flow.lora_exclude_modules) or None
        transformer.requires_grad_(False)
        try:
            transformer.add_adapter(peft_config)
        except ValueError as error:
            raise ValueError(f"`peft_config` does not fit the transformer: {error}") from error
        cast_training_params(transformer, dtype=torch.float32)
        return peft_config

    @staticmethod
    def _continued_adapter(transformer: Any) -> LoraConfig:
        active = transformer.active_adapters()
        if len(active) != 1:
            raise ValueError(
                f"The pipeline has {len(active)} active adapters ({', '.join(active)}): choose the one to train with "
                "`pipeline.set_adapters`."
            )
        (name,) = active
        for module in transformer.modules():
            if isinstance(module, LoraLayer) and name in module.r:
                rank = module.r[name]
                full = module.lora_alpha[name] / (math.sqrt(rank) if transformer.peft_config[name].use_rslora else rank)
                if not math.isclose(module.scaling[name], full):
                    raise ValueError(
                        f"The adapter {name!r} has a weight of {module.scaling[name] / full:.3g}, which its file could not keep: call "
                        f"`pipeline.set_adapters({name!r}, 1.0)` first."
                    )
        transformer.requires_grad_(False)
        transformer.enable_adapters()  # makes the active adapter trainable
        cast_training_params(transformer, dtype=torch.float32)
        return transformer.peft_config[name]

    def _place_frozen_parts(self) -> None:
        for module in self.flow.decoders():
            module.requires_grad_(False).eval()
            module.to(self.args.device).float()  # rewards and their gradients are float32
            if self.args.activation_checkpointing and isinstance(module, ModelMixin):
                with suppress(ValueError):  # which those raise that have none
                    module.enable_gradient_checkpointing()
        if self.model.frozen is not None:
            self.model.frozen.to(self.args.device)
        for reward in self.rewards:
            reward.to(self.args.device)

    def _encode_prompts(self, args: FlowRLConfig, train_dataset: Dataset, eval_dataset: Dataset | None) -> None:
        """Only those prompts that the run will ask for."""
        for module in self.flow.text_encoders():
            module.requires_grad_(False).eval()
        rows = list(range(len(train_dataset)))
        if args.max_steps > 0:
            rollouts = -(-args.max_steps // (args.updates_per_rollout * args.num_iterations))
            rows = sorted({*range(min(PROBE, len(train_dataset))), *self.sampler.rows_of(rollouts)})
        prompts = list(train_dataset["prompt"])
        wanted = [prompts[row] for row in rows] + (list(eval_dataset["prompt"]) if eval_dataset is not None else [])
        self.conditioning.encode(wanted, args.device, show_progress=args.local_process_index == 0 and not args.disable_tqdm)

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that training changes."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def same_on_all_processes(self, network: nn.Module) -> nn.Module:
        """A network with the parameters that the first process has; those that a user passes may differ."""
        with torch.no_grad():
            for tensor in [*network.parameters(), *network.buffers()]:
                tensor.copy_(broadcast(tensor.detach().clone()))
        return network

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """That of Trainer, with parameter groups of its own for the head."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        self._check_optimizer(optimizer)
        if self.model.head is not None and not given:
            heads = {id(p) for p in self.model.head.parameters()}
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in heads]
                group["params"] = [p for p in group["params"] if id(p) not in heads]
                optimizer.add_param_group({**group, "params": own, "lr": self.head_learning_rate()})
        return optimizer

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) not in held for p in self.trained_parameters()):
            raise ValueError(
                "The optimizer that was given lacks some of the trained parameters, which exist once the trainer is made: set "
                "`trainer.optimizer` to one of `trainer.trained_parameters()` before `trainer.train()`."
            )

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """Clip transformer and head apart, each to `max_grad_norm`. Private, as Trainer's callbacks come after its clipping."""
        if self.model.head is None:
            return super()._clip_grad_norm(model)
        heads = list(self.model.head.parameters())
        others = [p for name, p in self.model.named_parameters() if not name.startswith("head.")]
        norm = self.accelerator.clip_grad_norm_(others, self.args.max_grad_norm)  # unscales the gradients of both
        self.log_metric(f"{self.head_name}_grad_norm", torch.nn.utils.clip_grad_norm_(heads, self.args.max_grad_norm))
        return norm

    # ---- the loop --------------------------------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None
    ) -> TrainOutput:
        """Probe model and rewards with two pictures, then train.

        resume_from_checkpoint: True for the newest complete checkpoint of `output_dir`, "auto" for that or, where none is complete, a new
        run, or a checkpoint's folder. The resumed run repeats what the uninterrupted one would have done, bit for
        bit. Raises `ValueError` for a checkpoint that is incomplete or damaged.
        """
        if resume_from_checkpoint == "auto":
            found = checkpoints(Path(self.args.output_dir))
            resume_from_checkpoint = any((folder / MANIFEST).exists() for folder in found)
            if found and not resume_from_checkpoint:
                logger.warning("No checkpoint in %s is complete: the run starts anew.", self.args.output_dir)
        folder = self.find_checkpoint(resume_from_checkpoint) if resume_from_checkpoint else None
        if self.args.activation_checkpointing:  # as Trainer will, so that the probe meets a family that refuses it
            self.model.activation_checkpointing_enable(self.args.activation_checkpointing_kwargs)
        self.probe()
        self._micro_step, self._window, self._updates, self._best_step = 0, [], 0, None
        if folder is not None and self._is_finished(folder):
            return TrainOutput(self.state.global_step, 0.0, {})
        self._training_since = time.perf_counter()
        try:
            output = super().train(None if folder is None else str(folder), trial, ignore_keys_for_eval)
        except (Exception, KeyboardInterrupt):
            if self._updates:
                logger.error(
                    "Training broke off after %d updates: what it has learned is in %s.", self.state.global_step, self.args.output_dir
                )
                self.save_model(_internal_call=True)
            raise
        self.seconds = self.seconds_so_far()
        self._training_since = None
        return output

    def _is_finished(self, folder: Path) -> bool:
        """Whether a checkpoint is the end of its run; if so, it is loaded, or the best one. Trainer would make one more update."""
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        updates = self.args.max_steps if self.args.max_steps > 0 else math.ceil(self.args.num_train_epochs * self._updates_per_epoch)
        self._load_from_checkpoint(str(folder))
        reason = f"the run has {updates}" if state.global_step >= updates else self.reason_to_stop()
        if reason is None:
            return False
        logger.warning("%s has %d updates, and nothing is left to train: %s.", folder, state.global_step, reason)
        state.is_local_process_zero, state.is_world_process_zero = self.is_local_process_zero(), self.is_world_process_zero()
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            noted = Path(state.best_model_checkpoint)
            best = next((place for place in (folder.parent / noted.name, noted) if place.is_dir()), None)  # the run may have been moved
            if best is not None:
                state.best_model_checkpoint = str(best)
                self._load_best_model()
            else:
                logger.warning("The best checkpoint, %s, is gone: the model is that of %s.", noted, folder)
        return True

    @property
    def _updates_per_epoch(self) -> int:
        return self.sampler.rollouts_per_epoch * self.args.updates_per_rollout * self.args.num_iterations

    def seconds_so_far(self) -> dict[str, float]:
        """Seconds of training and of evaluation, those before a resumption included."""
        running = 0.0 if self._training_since is None else time.perf_counter() - self._training_since
        return self.seconds | {"training": self.seconds.get("training", 0.0) + running}

    def probe(self) -> None:
        """Draw and score two pictures; raises `ValueError` if the rewards cannot be trained on."""
        examples = [self.train_dataset[ImageKey(row % len(self.train_dataset), row, 0)] for row in range(PROBE)]
        self.model.eval()
        with torch.no_grad():
            latents = self.initial_latents([e.key for e in examples], "probe")
            with self.accelerator.autocast():
                latents = self.flow.sample_latents(self.model.active_transformer, self.condition(examples), latents, self.sigmas)
        if self.needs_reward_gradient:
            scores, _ = self.score_with_gradient(latents, examples)
        else:
            with torch.no_grad():
                scores = call_rewards(self.rewards, decoded(self.flow, latents), examples, **self.reward_context())
        # On the rows of the evaluation, where they are known: their columns may be others.
        judges = self.eval_rewards if self.eval_dataset is None else [*self.rewards, *self.eval_rewards]
        if judges:
            asked = examples if self.eval_dataset is None else [PromptDataset(self.eval_dataset)[ImageKey(0, 0, 0)]] * PROBE
            with torch.no_grad(), self.judges_at_hand():
                judged = call_rewards(judges, decoded(self.flow, latents), asked, **self.reward_context())
            scores = torch.cat([scores, judged], dim=1)
        for reward, column in zip([*self.rewards, *judges], scores.unbind(dim=1), strict=True):
            if column.isinf().any() and not column.isfinite().any():  # None, which is NaN here, is no fault
                raise ValueError(
                    f"Reward {reward.name!r} gave no finite score to {PROBE} probe pictures ({column.tolist()}): call it on two pictures "
                    "of the model to see why."
                )
        self._metrics.clear()

    def get_train_dataloader(self) -> DataLoader:
        """Batches of one process's share of a rollout, once per micro-step in which it is used."""
        size = self.args.per_device_train_batch_size * self.args.micro_steps_per_rollout
        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=size, sampler=self.sampler, collate_fn=list))

    def training_step(self, model: nn.Module, inputs: list[Example], num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        """Make a rollout where one is due, then accumulate the gradient of one micro-batch, one trained state at a time."""
        if self._micro_step % (self.args.micro_steps_per_rollout * self.args.num_iterations) == 0:
            self._window = self._make_rollout(inputs)
        batch = self._window[self._micro_step % self.args.micro_steps_per_rollout]
        self._micro_step += 1
        if not self.learns:
            return torch.zeros((), device=self.args.device)
        model.train()
        with self.timed("micro_step"):
            return self._accumulate_gradient(model, batch)

    def _accumulate_gradient(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        conditioning, states = self.condition(batch.examples), self.num_trained_states
        total, bad = torch.zeros((), device=self.args.device), torch.zeros((), device=self.args.device)
        for state in range(states):
            # Gradients of all but the last state are reduced over processes together with the last one's.
            with nullcontext() if state == states - 1 else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    losses = self.micro_batch_losses(model, batch, conditioning, state)
                good = losses.detach().isfinite() & batch.good
                loss = torch.where(good, losses, 0.0).mean() / (states * self.current_gradient_accumulation_steps)
                self.accelerator.backward(loss)
            total += loss.detach()
            bad += (~losses.detach().isfinite() & batch.good).float().mean() / states
        self.count_bad_samples("loss", bad.reshape(1))
        return total

    def _make_rollout(self, examples: list[Example]) -> list[MicroBatch]:
        size = self.args.per_device_train_batch_size
        self.model.eval()
        rollout = []
        with self.timed("rollout"), torch.no_grad():
            for start in range(0, len(examples), size):
                part = examples[start : start + size]
                latents = self.initial_latents([e.key for e in part], "initial latents")
                good = torch.ones(len(part), dtype=torch.bool, device=self.args.device)
                rollout += [MicroBatch(part, self.rollout(latents, self.condition(part), [e.key for e in part]), good)]
        self.prepare(rollout)
        return rollout

    def initial_latents(self, keys: list[ImageKey], purpose: str) -> torch.Tensor:
        """Float32 noise for images, each drawn on the CPU from its own key."""
        generators = [keyed_generator(self.args.seed, k.row, k.image, k.rollout, purpose) for k in keys]
        return self.flow.initial_latents(len(keys), generators).to(self.args.device)

    def condition(self, examples: list[Example]) -> Conditioning:
        """What the network reads of the examples' prompts."""
        return self.conditioning([e.prompt for e in examples], self.args.device)

    # ---- scores ----------------------------------------------------------------------------------------------------------

    def reward_context(self, log_metric: Callable[[str, float], None] | None = None) -> dict[str, Any]:
        """What every reward is called with beside images, prompts and columns."""
        return {"trainer_state": self.state, "log_metric": log_metric or self.log_metric, "log_extra": lambda name, values: None}

    def score(self, latents: torch.Tensor, examples: list[Example]) -> torch.Tensor:
        """Scores (B, number of rewards) of the pictures of final latents (B, ...), without gradients.

        While asynchronous rewards look at the pictures of one decoded batch, the next is decoded.
        """
        size = self.args.decode_batch_size or self.args.per_device_train_batch_size
        scores: list[torch.Tensor] = []
        asked: list[Callable[[], torch.Tensor]] = []
        with torch.no_grad():
            for start, part in zip(range(0, len(latents), size), latents.split(size), strict=True):
                images = decoded(self.flow, part)
                scores += [answer() for answer in asked]
                asked = [ask_rewards(self.rewards, images, examples[start : start + size], **self.reward_context())]
            return torch.cat([*scores, *(answer() for answer in asked)])

    def score_with_gradient(self, latents: torch.Tensor, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (B, number of rewards) of final latents, and the gradient (B, ...) of their weighted sum."""
        size = self.args.decode_batch_size or pictures_at_a_time(self.flow, self.args.per_device_train_batch_size)
        return score_with_gradient(self.flow, latents, examples, self.rewards, self.reward_weights, size, **self.reward_context())

    def log_rewards(self, scores: torch.Tensor) -> None:
        """Note mean and standard deviation of each reward, and the mean weighted sum, over the whole rollout of all processes."""
        scores = self.accelerator.gather(scores)
        total: float | None = 0.0
        for reward, weight, column in zip(self.rewards, self.reward_weights.tolist(), scores.unbind(dim=1), strict=True):
            column = column[column.isfinite()]
            if not len(column):
                total = None  # nobody knows the sum
                continue
            self.log_metric(f"reward/{reward.name}", column.mean())
            self.log_metric(f"reward_std/{reward.name}", column.std(correction=0))
            total = None if total is None else total + weight * float(column.mean())
        self.rollout_reward = total
        if total is not None:
            self.log_metric("reward", total)

    def mean_of_good(self, values: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
        """The mean of values (B,) over the images of all processes that were not left out."""
        own = torch.stack([torch.where(good, values.detach(), 0.0).sum(), good.sum().to(values.dtype)])
        total, count = self.accelerator.reduce(own, "sum")
        return total / count.clamp(min=1)

    def count_bad_samples(self, what: str, bad: torch.Tensor) -> None:
        """Note the share of bad samples (B,), 0 or 1 each, over all processes; too large a share ends the run."""
        share = float(self.accelerator.gather(bad.float()).mean())
        self.log_metric(f"bad_samples/{what}", share)
        if share > self.args.max_bad_sample_share:
            raise RuntimeError(
                f"The {what} is not finite for {100 * share:.0f} % of the samples, more than `max_bad_sample_share` "
                f"({self.args.max_bad_sample_share}) allows: lower the learning rate, or look at the rewards."
            )

    # ---- logs ------------------------------------------------------------------------------------------------------------

    def log_metric(self, name: str, value: float | torch.Tensor) -> None:
        """Note a number; the mean of all that were noted since the last log, by all processes, is logged."""
        self._metrics[name].append(float(value))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Note the seconds of a phase."""
        self._finish_device_work()
        start = time.perf_counter()
        yield
        self._finish_device_work()
        self.log_metric(f"seconds/{phase}", time.perf_counter() - start)

    def _finish_device_work(self) -> None:
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the noted numbers to what Trainer logs of training."""
        if "loss" in logs:
            logs |= means(self._metrics)
            self._metrics.clear()
        super().log(logs, start_time)
