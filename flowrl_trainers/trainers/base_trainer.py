"""`FlowRLTrainer`: what the methods share around rollout, targets and loss, in the order of a run."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar, Generic, Literal, NoReturn, TypeVar

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import AutocastKwargs, broadcast
from datasets import Dataset
from diffusers import DiffusionPipeline, ModelMixin
from peft import LoraConfig
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState, enable_full_determinism, set_seed
from transformers.trainer_utils import IntervalStrategy, TrainOutput
from transformers.utils import is_in_notebook

from ..cost.rewards import blank_of
from ..cost.run import memory_of, warn_of_memory
from ..flow import norm_ratios, root_mean_square
from ..metrics import Change, signs_of_over_optimisation
from ..pipelines import Conditioning, FlowPipeline
from ..pipelines.quantization import is_quantized, refuse_other_precision, refuse_unsplittable
from ..rewards import Reward, as_rewards, chosen_by
from ..rewards.named import RewardLike, refuse_groupwise
from ..run_folder import CardFacts, RunFolder, before_after
from ..run_folder.identity import (
    adapter_identity,
    identity,
    refuse_another_run,
    shapes_identity,
    texts_identity,
    values_identity,
    weights_identity,
)
from ..run_folder.licence import licence_of
from ..run_folder.settings import run_settings
from ..sampling.buffer import MicroBatch, Record, RolloutBuffer
from ..sampling.comparison import Comparison
from ..sampling.conditioning import ConditioningCache
from ..sampling.draws import ImageKey, keyed_generators
from ..sampling.evaluator import Evaluator, Sampler, ode_sampler, rewards_at_hand
from ..sampling.flow_model import FlowModel, allow_graphs
from ..sampling.metric_log import MetricLog
from ..sampling.pictures import Pictures
from ..sampling.placement import Placement
from ..sampling.prompt_groups import Example, PromptDataset, PromptGroupSampler
from ..sampling.prompt_sources import PromptSource
from ..sampling.reward_watch import RewardWatch, share_without_spread
from ..sampling.scoring import Scorer, call_rewards, decoded, seen_images
from ..sampling.sharding import asks_for_sharding, refuse_other_sharding
from .adapters import check_lora_config, prepare_adapter
from .attention import attention_by, check_attention_backend
from .base_config import FlowRLConfig
from .checkpointed_trainer import CheckpointedTrainer, TrainingState
from .console import Console, LogFile, is_live, take_place_of_default
from .input_checks import (
    can_take,
    check_args,
    check_best_metric,
    check_callbacks,
    check_columns,
    check_dataset,
    check_optimizers,
    check_rewards,
    check_trained_part,
    check_weights,
    encoding_facts,
    refuse_shared_names,
    without_groups,
    writable_folder,
)
from .loop_callback import LoopCallback
from .loss_scaling import LossScaler
from .moving_average import MovingAverage
from .pipeline_state import PipelineState
from .surroundings import check_mergeable, check_modes, check_networks, check_sigmas, own_random_numbers
from .trackers import check_trackers, name_trackio_run, settle_tensorboard, show_picture

logger = logging.getLogger(__name__)

PIPELINE_SETTINGS = (
    "height", "width", "guidance_scale", "guidance_in_one_call", "negative_prompt", "max_sequence_length",
)  # fmt: skip
PROBE_IMAGES = 2
LONG = 1.05  # |v| / |v_base| from which on an evaluation warns
SHOW_EVERY = 10  # rollouts, from one whose pictures trackers get to the next

RolloutT = TypeVar("RolloutT", bound=Record)
RecordT = TypeVar("RecordT", bound=Record)


class FlowRLTrainer(CheckpointedTrainer, Generic[RolloutT, RecordT]):
    """The base of all trainers.

    An algorithm overrides `rollout` (how latents are drawn and what is kept of it), `prepare` (what is computed once
    per rollout) and `micro_batch_losses`. What a rollout keeps, and what the loss needs, are two frozen records of the
    method's own.

    Args:
        model: A Hub id or folder of a diffusers pipeline, a loaded pipeline, or a `FlowPipeline`.
        reward_funcs: A name, a callable, a `Reward`, a list of them, or a dictionary from names to them; see
            `flowrl_trainers.rewards.Reward`.
        args: The configuration; None for its defaults.
        train_dataset: A `datasets.Dataset` with the column `prompt`, whose other columns reach the rewards; a path of
            such a file (.txt, .csv, .tsv, .json, .jsonl, .parquet); or a list of prompts.
        eval_dataset: Held-out prompts, passed in the same ways, one image each; a row that is repeated gives another
            image of the same prompt.
        eval_reward_funcs: Rewards that evaluation adds to `reward_funcs` and training never sees.
        callbacks: As in `transformers.Trainer`.
        optimizers: As in `transformers.Trainer`, of all trained parameters; where these are made by the trainer (a
            LoRA from `peft_config`, a value network), set `trainer.optimizer` afterwards instead.
        peft_config: The LoRA to train; None trains the adapter that the pipeline carries or, without one, all weights.
    """

    config_class: ClassVar[type[FlowRLConfig]] = FlowRLConfig
    record_class: ClassVar[Any] = Record
    _name: ClassVar[str] = "Reward fine-tuning"
    _tag_names: ClassVar[list[str]] = []
    _paper: ClassVar[dict[str, str] | None] = None
    needs_reward_gradient: ClassVar[bool] = False
    replays_rollout: ClassVar[bool] = False
    """Whether the loss computes again what the rollout did, so that both need batches of one size: see rounding."""
    loss_is_scaled_for_ga = False

    args: FlowRLConfig
    model: FlowModel
    train_dataset: PromptDataset
    eval_dataset: Dataset | None

    def __init__(
        self,
        model: str | Path | DiffusionPipeline | FlowPipeline,
        reward_funcs: RewardLike | list[RewardLike] | dict[str, RewardLike],
        args: FlowRLConfig | None = None,
        train_dataset: PromptSource | None = None,
        eval_dataset: PromptSource | None = None,
        eval_reward_funcs: RewardLike | list[RewardLike] | dict[str, RewardLike] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: LoraConfig | None = None,
    ) -> None:
        # What needs no model; prompts before rewards, which may be large networks.
        check_modes()
        args = args or self.config_class(output_dir=self._name.lower().replace(" ", "-"))
        check_args(args, self.config_class)
        check_weights(model, args)
        if peft_config is not None:
            check_lora_config(peft_config)
        if peft_config is not None or isinstance(model, (str, Path)):  # a loaded pipeline may carry an adapter
            check_trained_part(args, has_adapter=peft_config is not None)
        refuse_other_sharding(
            compile_blocks=args.compile_blocks,
            merge_adapter=args.merge_adapter,
            cache_base_pictures=args.cache_base_pictures,
            quantization=args.quantization,
        )
        self.check_arguments(args, peft_config)
        if args.should_save:
            writable_folder(str(args.output_dir))
        train_dataset = check_dataset(train_dataset, "train_dataset", args)
        if eval_dataset is not None:
            eval_dataset = check_dataset(eval_dataset, "eval_dataset")
        elif args.eval_strategy != "no":
            raise ValueError(
                f"`eval_strategy` is '{IntervalStrategy(args.eval_strategy).value}', but there is no `eval_dataset`: "
                "pass held-out prompts."
            )
        if args.eval_strategy == "no" and args.eval_steps and args.process_index == 0:
            logger.warning(
                "`eval_steps` is %g, but `eval_strategy` is 'no', so that nothing is evaluated during training: set "
                "that to 'steps', or leave `eval_steps` out.",
                args.eval_steps,
            )
        self.rewards = chosen_by(as_rewards(reward_funcs), args.rewards_column)
        self.eval_rewards = as_rewards(eval_reward_funcs, "eval_reward_funcs") if eval_reward_funcs else []
        check_rewards(self.rewards, args, type(self).__name__ if self.needs_reward_gradient else None)
        refuse_groupwise(self.eval_rewards, "eval_reward_funcs")
        refuse_shared_names(self.rewards, self.eval_rewards)
        if self.needs_reward_gradient and args.decoder_dtype != "float32":
            raise ValueError(
                f"`decoder_dtype` ({args.decoder_dtype!r}) must be 'float32' with {type(self).__name__}, which takes "
                "the gradient of the reward through the decoder."
            )
        check_best_metric(args, [*self.rewards, *self.eval_rewards])
        check_columns(self.rewards, train_dataset, "train_dataset")
        if eval_dataset is not None:
            check_columns(self.evaluated_rewards, eval_dataset, "eval_dataset", others=self.rewards)

        check_callbacks(callbacks or [], args)
        check_trackers(args, callbacks or [])
        check_optimizers(optimizers)

        # The model, and what is trained of it.
        memory = memory_of(args.device)
        if isinstance(model, (str, Path)) and memory is not None and args.process_index == 0:
            blank = ([blank_of(reward) for reward in rewards] for rewards in (self.rewards, self.eval_rewards))
            of_run = (pipeline_settings(args), peft_config, *blank)
            shared_by = args.world_size if asks_for_sharding() else 1
            warn_of_memory(memory, args, str(model), *of_run, evaluates=eval_dataset is not None, shared_by=shared_by)
        self.flow = _flow_pipeline(model, args)
        check_networks(self.flow)
        if asks_for_sharding():
            refuse_unsplittable(self.flow.transformer)
        self._given: PipelineState | None = self._as_given(args)
        self._at_work = False
        try:
            self._build(args, train_dataset, eval_dataset, callbacks, optimizers, peft_config)
        except BaseException:
            self._given.restore_without_adapter()
            raise

    def _build(
        self,
        args: FlowRLConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        callbacks: list[TrainerCallback] | None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None],
        peft_config: LoraConfig | None,
    ) -> None:
        """What `__init__` does with the model; see there."""
        if args.decoder_dtype == "float16" and self.flow.decoder_overflows_in_float16:
            raise ValueError(
                "`decoder_dtype` ('float16') is too narrow for the decoder of this model, which overflows in it: take "
                "'bfloat16' or 'float32'."
            )
        for sentence in self.flow.advice(args.num_inference_steps):
            logger.warning(sentence)
        (enable_full_determinism if args.full_determinism else set_seed)(
            args.seed
        )  # a LoRA starts from random numbers
        as_loaded = {name: parameter.dtype for name, parameter in self.flow.transformer.named_parameters()}
        self.peft_config = prepare_adapter(self.flow, peft_config)
        check_trained_part(args, has_adapter=self.peft_config is not None)
        if args.merge_adapter:
            check_mergeable(self.flow.transformer)
        if args.compile_blocks:
            refuse_other_precision(self.flow.transformer, _computing_dtype(self.flow.transformer, args))

        # The prompts, encoded before Trainer places the network: it and the text encoders need not fit together.
        self.sampler = PromptGroupSampler(
            num_prompts=len(train_dataset),
            num_generations=args.num_generations,
            images_per_update=args.images_per_update,
            updates_per_rollout=args.updates_per_rollout,
            repeats=args.micro_steps_per_rollout * args.num_iterations,
            num_processes=args.world_size,
            seed=args.seed,
            pool_size=args.pool_size,
        )
        if args.offload_between_phases:
            self.flow.transformer.to("cpu")  # where the text encoders need its room
        self._encode_prompts(args, train_dataset, eval_dataset)

        # Trainer, and the parts that this trainer has.
        self.average = MovingAverage(args.ema_decay)
        dtypes = as_loaded if args.frozen_copy == "as_loaded" else None
        flow_model = FlowModel(self.flow, has_adapter=self.peft_config is not None, dtypes=dtypes)
        metrics = MetricLog(args.device)
        loop = LoopCallback(self.sampler, flow_model, metrics, self.average, self.reason_to_stop, self.on_any_process)
        super().__init__(
            metrics=metrics,
            model=flow_model,
            args=args,
            data_collator=list,
            train_dataset=PromptDataset(train_dataset),
            eval_dataset=eval_dataset,
            callbacks=[loop, *(callbacks or [])],
            optimizers=optimizers,
        )
        if args.device.type == "cuda" and torch.backends.cuda.cudnn_sdp_enabled():
            # pytorch/pytorch#196678 and NVIDIA/cudnn-frontend#628: NaN in the gradients, or an illegal memory access.
            torch.backends.cuda.enable_cudnn_sdp(False)
            logger.warning("cuDNN's attention is turned off in this process: its backward pass fails on Hopper cards.")
        if args.fp16:  # accelerate would train in float32 on a CPU, and fail at an update without gradients on a GPU
            self.accelerator.native_amp, self.accelerator.scaler = True, LossScaler(args.device.type)
        self.reward_weights = torch.tensor(args.reward_weights or [1.0] * len(self.rewards), device=args.device)
        self.rollout_reward: float | None = None
        self.buffer: RolloutBuffer[RecordT] = RolloutBuffer(
            self.record_class, args.micro_steps_per_rollout, args.num_iterations
        )
        self.placement = Placement(flow_model, args.device, apart=args.offload_between_phases)
        self.scorer = Scorer(
            self.flow,
            self.rewards,
            self.reward_weights,
            self.reward_context,
            batch_size=args.images_at_once,
            decode_batch_size=args.decode_batch_size,
            group_size=args.num_generations,
            judging=self.placement.judging,
        )
        self.reward_watch = RewardWatch(self.rewards, judged=bool(self.eval_rewards))
        evaluator = Evaluator(
            self.flow,
            self.conditioning,
            self.evaluated_rewards,
            self.accelerator,
            seed=args.seed,
            batch_size=args.per_device_eval_batch_size,
            decode_batch_size=args.decode_batch_size,
            show_progress=is_live(args),
            judging=self.placement.judging,
        )
        base_facts = self._base_facts if args.cache_base_pictures else None
        self.comparison = Comparison(evaluator, flow_model, self.average.in_place, self.reward_context, base_facts)
        self.run_folder = RunFolder(self.output_dir, self.flow, self.peft_config is not None)
        self.told_for_card: dict[str, Any] = {}

        def step_of_weights() -> int:
            return self.step_of_weights

        settle_tensorboard(self.callback_handler.callbacks, self.output_dir)
        self.add_callback(LogFile(self.output_dir, step_of_weights))
        self.console = Console(self.run_folder, args.images_per_update, step_of_weights)
        if is_in_notebook() and not args.disable_tqdm:
            from .notebook_table import NotebookProgressCallback, NotebookTable  # these need IPython

            self.remove_callback(NotebookProgressCallback)
            self.add_callback(NotebookTable(self.run_folder, step_of_weights))
        else:
            take_place_of_default(self, self.console, callbacks or [])

        # What the algorithm adds.
        self._place_frozen_parts()
        self.sigmas = self.flow.sigmas(args.num_inference_steps).to(args.device)
        check_sigmas(self.sigmas)
        head = self.make_head()
        if head is not None:
            name, network = head
            self.model.attach_head(name, self.same_on_all_processes(network.to(args.device)))
        if self.is_fsdp_enabled:
            self.model.shard(self.accelerator)
            # Autocast would keep what it casts of trained weights, whole, until a call ends.
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
            # Which puts autocast around its calls; accelerate leaves that to FSDP's own casts, which are off here.
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
        self.average.start(self.trained_parameters())
        self.settings = run_settings(
            args,
            self.peft_config,
            model=self.flow.name,
            reward_funcs=[r.name for r in self.rewards],
            eval_reward_funcs=[r.name for r in self.eval_rewards],
        )
        self.set_up()
        if args.compile_blocks:
            self.model.compile_blocks()
        if args.attention_backend is not None:
            dtype = _computing_dtype(self.flow.transformer, args)
            check_attention_backend(self.flow.transformer, args.attention_backend, dtype)
        if self.optimizer is not None:
            self._check_optimizer(self.optimizer)
        self._working = PipelineState(self.flow)

    # ---- what an algorithm overrides -------------------------------------------------------------------------------

    def check_arguments(self, args: FlowRLConfig, peft_config: LoraConfig | None) -> None:
        """Refuse, before rewards and model are loaded, what the algorithm cannot train with; nothing by default.

        Args:
            args: The configuration.
            peft_config: Of the LoRA to make.
        """
        return None

    def make_head(self) -> tuple[str, nn.Module] | None:
        """The network that is trained beside the transformer, and what its folder and metrics are called; none by
        default.

        It is called with latents, sigma, prompt features and their mask.
        """
        return None

    def head_learning_rate(self) -> float:
        """The learning rate of the head."""
        return self.args.learning_rate

    def set_up(self) -> None:
        """The last act of `__init__`: check and keep what the algorithm needs; nothing by default."""
        return None

    def before_rollout(self) -> None:
        """What comes before the images of a rollout are drawn; nothing by default."""
        return None

    @property
    @abstractmethod
    def num_trained_states(self) -> int:
        """The number of states of each trajectory at which the loss is taken."""

    @abstractmethod
    def rollout(self, conditioning: Conditioning, keys: list[ImageKey]) -> RolloutT:
        """Sample with `self.model` from `self.initial_latents`, without gradients; returns what is kept of it.

        Args:
            conditioning: Of B prompts.
            keys: Of the images, from which all random draws are made; see `keyed_generators`.
        """

    @abstractmethod
    def prepare(self, rollout: list[MicroBatch[RolloutT]]) -> list[MicroBatch[RecordT]]:
        """Score a rollout, and compute from it what the loss needs (targets, adjoints, advantages).

        Returns nothing where the transformer learns nothing from this rollout, as while an algorithm warms up.
        """

    @abstractmethod
    def micro_batch_losses(
        self, model: nn.Module, batch: MicroBatch[RecordT], conditioning: Conditioning, state: int
    ) -> Tensor:
        """The losses (B,) of the images of a micro-batch at one trained state.

        What is minimised is the mean over images and states. Each state is differentiated before the next is computed,
        so that memory does not grow with their number.

        Args:
            model: The trained one, as Trainer wrapped it.
            batch: B images.
            conditioning: Of their prompts.
            state: Its number, below `num_trained_states`.
        """

    def reason_to_stop(self) -> str | None:
        """Why training should end after this update, if it should."""
        target, reward = self.args.target_reward, self.rollout_reward
        if target is not None and reward is not None and reward >= target:
            return f"the mean reward of a rollout, {reward:.4g}, reached `target_reward` ({target})"
        return None

    def evaluation_samplers(self) -> dict[str, Sampler]:
        """How evaluation draws, by the names of its rows; the ODE by default.

        Pictures are drawn by the first, whose name is empty.
        """
        steps = self.args.eval_num_inference_steps or self.args.num_inference_steps
        return {"": ode_sampler(self.flow.sigmas(steps).to(self.args.device))}

    def sampler_settings(self) -> dict[str, Any]:
        """The settings that the evaluation's samplers depend on, beside steps and levels; none by default."""
        return {}

    def _base_facts(self) -> dict[str, Any]:
        """All that the base model's pictures of an evaluation follow from, beside noise and prompts."""
        args = self.args
        steps = {name: value for name, value in args.to_dict().items() if "num_inference_steps" in name}
        levels = {count: self.flow.sigmas(count).tolist() for count in set(filter(None, steps.values()))}
        return {
            "base model": self._base_identity,
            "arguments of the pipeline": self.flow.call_arguments(),
            "guidance_in_one_call": self.flow.guidance_in_one_call,
            "steps": steps,
            "levels": levels,
            "precision": args.mixed_precision,
            "compile_blocks": args.compile_blocks,
            "attention_backend": args.attention_backend,
            "sampler": self.sampler_settings(),
        }

    def algorithm_state(self) -> dict[str, Any]:
        """What a checkpoint has to keep of the algorithm beside weights and rollout: tensors, numbers, strings."""
        return {}

    def load_algorithm_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `algorithm_state` returned."""

    def extra_networks(self) -> dict[str, nn.Module]:
        """The networks that are trained beside the transformer, under the names of their folders."""
        return self.model.heads

    def card_sampling(self) -> dict[str, Any]:
        """The facts of `CardFacts` about sampling, where an algorithm does not draw by the ODE on the stock grid."""
        return {}

    def card_settings(self) -> dict[str, Any]:
        """The settings of the algorithm that its card shows."""
        return {}

    # ---- set-up ----------------------------------------------------------------------------------------------------

    def _encode_prompts(self, args: FlowRLConfig, train_dataset: Dataset, eval_dataset: Dataset | None) -> None:
        """Those of evaluations, and of training only those that the run will ask for."""
        encoders = self.flow.text_encoders()
        for module in encoders:
            module.requires_grad_(False).eval()
        facts = None
        if args.cache_encoded_prompts:
            facts = {"text encoders": [weights_identity(module) for module in encoders]} | encoding_facts(self.flow)
        self.conditioning = ConditioningCache(self.flow, most_in_memory=args.embedding_memory_gib, facts=facts)
        held_out = [] if eval_dataset is None else list(eval_dataset["prompt"])
        show_progress = args.local_process_index == 0 and is_live(args)
        self.conditioning.encode(self._prompts_of_run(args, train_dataset) + held_out, args.device, show_progress)

    def _prompts_of_run(self, args: FlowRLConfig, train_dataset: Dataset) -> list[str]:
        """The prompts of the probe and of all rollouts."""
        rows = list(range(len(train_dataset)))
        if args.max_steps > 0:
            rollouts = -(-args.max_steps // args.updates_on_rollout)
            rows = sorted({*range(min(PROBE_IMAGES, len(train_dataset))), *self.sampler.rows_of(rollouts)})
        prompts = list(train_dataset["prompt"])
        return [prompts[row] for row in rows]

    def _encode_new(self, prompts: Iterable[str]) -> None:
        """Encode prompts that were not asked for when the trainer was made."""
        new = [prompt for prompt in prompts if prompt not in self.conditioning.index]
        if new:
            with self.placement.network_away():
                self.conditioning.encode(new, self.args.device, show_progress=False)

    def _place_frozen_parts(self) -> None:
        for module in self.flow.decoders():
            module.requires_grad_(False).eval()
            # Gradients of rewards are taken in float32; what is decoded becomes float32 in any case.
            module.to(self.placement.of_judges)
            dtype = getattr(torch, self.args.decoder_dtype)
            tensors = (*module.parameters(), *module.buffers())
            if any(t.is_floating_point() and t.dtype != dtype for t in tensors):  # diffusers warns of every cast
                module.to(dtype)
            if self.args.activation_checkpointing and isinstance(module, ModelMixin):
                with suppress(ValueError):  # raised by models without gradient checkpointing
                    module.enable_gradient_checkpointing()
        if self.model.frozen is not None and not self.is_fsdp_enabled:
            self.model.frozen.to(self.args.device)
        for reward in self.rewards:
            reward.to(self.placement.of_judges)

    @property
    def evaluated_rewards(self) -> list[Reward]:
        """Those that evaluations call: of training all but the groupwise ones, and those that it never sees."""
        return without_groups([*self.rewards, *self.eval_rewards])

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that training changes."""
        return self.model.trained_parameters()

    def same_on_all_processes(self, network: nn.Module) -> nn.Module:
        """A network with the parameters that the first process has; those that a user passes may differ."""
        with torch.no_grad():
            for tensor in [*network.parameters(), *network.buffers()]:
                tensor.copy_(broadcast(tensor.detach().clone()))
        return network

    def tried(self, argument: str, network: Any, per_image: Sequence[int]) -> nn.Module:
        """A network that a user passes, on the device, once it gave two images what it has to give.

        Args:
            argument: What the caller calls it.
            network: Called with latents (B, ...), sigma (B,), prompt features (B, L, D) and their mask (B, L).
            per_image: The shape of what it returns for each image.

        Raises:
            TypeError: For what is no module.
            ValueError: For one that fails, or returns another shape.
        """
        if not isinstance(network, nn.Module):
            raise TypeError(f"`{argument}` is a {type(network).__name__}: pass a `torch.nn.Module`.")
        network, was_training = network.to(self.args.device), network.training
        keys = [ImageKey(0, number, 0) for number in range(2)]
        features, mask = self.flow.prompt_features(self.condition([self.train_dataset[key] for key in keys]))
        latents = self.initial_latents(keys, "shape")
        try:
            with torch.no_grad():
                found = network.eval()(latents, latents.new_full((2,), 0.5), features.float(), mask)
        except Exception as error:  # of code that is the user's
            raise ValueError(
                f"`{argument}` failed on two images ({type(error).__name__}: {error}): it is called with latents "
                f"{tuple(latents.shape)}, sigma (2,), prompt features {tuple(features.shape)} and their mask "
                f"{tuple(mask.shape)}."
            ) from error
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if shape != (2, *per_image):
            raise ValueError(f"`{argument}` returned {shape} for two images: return {(2, *per_image)}.")
        return network.train(was_training)

    def latent_and_prompt_sizes(self) -> tuple[torch.Size, int]:
        """The shape of one latent, and the width of the prompt's features: what a network that reads both needs."""
        key = ImageKey(0, 0, 0)
        features, _ = self.flow.prompt_features(self.condition([self.train_dataset[key]]))
        return self.initial_latents([key], "shape").shape[1:], features.shape[-1]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """That of Trainer, with parameter groups of its own for the head."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        self._check_optimizer(optimizer)
        if self.model.head is not None and not given:
            heads = {id(p) for p in self.model.head.parameters()}
            for group in list(optimizer.param_groups):
                of_head = [p for p in group["params"] if id(p) in heads]
                group["params"] = [p for p in group["params"] if id(p) not in heads]
                optimizer.add_param_group({**group, "params": of_head, "lr": self.head_learning_rate()})
        return optimizer

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) not in held for p in self.trained_parameters()):
            raise ValueError(
                "The optimizer that was given lacks some of the trained parameters, which exist once the trainer is "
                "made: set `trainer.optimizer` to one of `trainer.trained_parameters()` before `trainer.train()`."
            )

    # ---- before the first update -----------------------------------------------------------------------------------

    def before_training(self) -> None:
        """Probe model and rewards, and start with an empty buffer."""
        check_modes()
        if not torch.is_grad_enabled():
            raise ValueError(
                "Gradients are switched off in this process (`torch.set_grad_enabled(False)`, or a `torch.no_grad()` "
                "around this call): switch them on before training."
            )
        if self.args.activation_checkpointing:  # as Trainer will, so that the probe meets a family that refuses it
            self.model.activation_checkpointing_enable(self.args.activation_checkpointing_kwargs)
        # `max_steps` may have been raised since the trainer was made.
        self._encode_new(self._prompts_of_run(self.args, self.train_dataset.dataset))
        self.probe()
        self.buffer.reset()

    def probe(self) -> None:
        """Draw and score two pictures; raises `ValueError` if the rewards cannot be trained on."""
        count = 1 if self.scorer.compares else len(self.train_dataset)  # a group has one prompt
        examples = [self.train_dataset[ImageKey(row % count, row, 0)] for row in range(PROBE_IMAGES)]
        self.model.eval()
        with torch.no_grad():
            latents = self.initial_latents([e.key for e in examples], "probe")
            conditioning = self.condition(examples)
            with self.accelerator.autocast():
                latents = ode_sampler(self.sigmas)(self.model, latents, conditioning, [])
        if not latents.isfinite().all():
            raise ValueError(
                "The model's own pictures are not finite before training: its weights are damaged, or its precision "
                "is too low for them (float16 takes `fp16` and `dtype`)."
            )
        if self.needs_reward_gradient:
            scores = self.scorer.probe_gradients(latents, examples)
        else:
            with torch.no_grad(), self.placement.judging(self.rewards):
                images = seen_images(self.flow, self.rewards, latents)
                scores = call_rewards(self.rewards, images, examples, latents, **self.reward_context())
        # On the first and the last row of the evaluation, where they are known: their columns may be others. Else by
        # those judges for which the columns of training are enough; `evaluate` is told others.
        known = set(self.train_dataset.dataset.column_names)
        judges, asked = [judge for judge in self.eval_rewards if can_take(judge, known)], examples
        if self.eval_dataset is not None:
            held_out = PromptDataset(self.eval_dataset)
            rows = (number * (len(held_out) - 1) // (PROBE_IMAGES - 1) for number in range(PROBE_IMAGES))
            judges, asked = self.evaluated_rewards, [held_out[ImageKey(row, 0, 0)] for row in rows]
        if judges:
            with torch.no_grad(), self.judges_at_hand(), self.placement.judging(judges):
                images = seen_images(self.flow, judges, latents)
                judged = call_rewards(judges, images, asked, latents, **self.reward_context())
            scores = torch.cat([scores, judged], dim=1)
        for reward, column in zip([*self.rewards, *judges], scores.unbind(dim=1), strict=True):
            # NaN marks a reward that returned None, which is allowed; inf marks an invalid score.
            if column.isinf().any() and not column.isfinite().any():
                raise ValueError(
                    f"Reward {reward.name!r} gave no score that is finite in float32 to {PROBE_IMAGES} probe "
                    "pictures: call it on two pictures of the model to see why."
                )
        everyone = [*self.rewards, *self.eval_rewards]
        check_best_metric(self.args, everyone, self.metrics.noted, self.evaluation_samplers())
        self.metrics.clear()

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """See `CheckpointedTrainer.train`; afterwards the pipeline is as it was given, see `at_work`."""
        with self.at_work():
            try:
                return super().train(*args, **kwargs)
            finally:
                self.model.eval()
                self.console.close()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, the pipeline's parts are as training needs them; on leaving, they are as the user gave them.

        Mode, device, precision, what takes gradients, gradient checkpointing and adapters of every part are restored,
        also after an error. What was learned stays: the adapter is loaded and active, and trained parameters are
        float32. From its construction until the first such context ends, a trainer holds the parts; after that, for as
        long as `train`, `evaluate` or `pictures` runs.
        """
        if self._at_work:
            yield
            return
        given, self._given = self._given or self._as_given(self.args), None
        self._at_work = True
        try:
            self._working.restore(self.trained_parameters())
            if self.args.compile_blocks:
                allow_graphs()  # this may be another thread than that in which the trainer was made
            with attention_by(self.args.attention_backend):
                yield
        finally:
            self._at_work = False
            given.restore(self.trained_parameters())

    def _as_given(self, args: FlowRLConfig) -> PipelineState:
        """How the parts of the pipeline are now, with the numbers of decoders that `decoder_dtype` rounds."""
        return PipelineState(self.flow, keep_decoders=args.decoder_dtype != "float32")

    def judges_at_hand(self) -> AbstractContextManager[None]:
        """A context in which the rewards that training never sees are on the device, if the network may be there."""
        if self.placement.apart:
            return nullcontext()
        return rewards_at_hand(self.eval_rewards, self.rewards, self.args.device)

    # ---- an update -------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Example]:
        """Batches of one process's share of a rollout, once per micro-step in which it is used."""
        size = self.args.images_per_device
        loader = DataLoader(self.train_dataset, batch_size=size, sampler=self.sampler, collate_fn=list)
        return self.accelerator.prepare(loader)

    def training_step(  # type: ignore[override]  # batches are examples, not tensors under names
        self, model: nn.Module, inputs: list[Example], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Make a rollout where one is due, then accumulate the gradient of one micro-batch, one trained state at a
        time.

        Args:
            model: The trained one, as Trainer wrapped it.
            inputs: This process's share of a rollout.
            num_items_in_batch: What Trainer counts of language; not used.
        """
        if self.buffer.needs_rollout:
            self.buffer.batches = self.make_rollout(inputs)
        batch = self.buffer.take()
        if batch is None:
            return torch.zeros((), device=self.args.device)
        model.train()
        with self.metrics.timed("micro_step"):
            return self._accumulate_gradient(model, batch)

    def make_rollout(self, examples: list[Example]) -> list[MicroBatch[RecordT]]:
        """Draw the images of a rollout, and prepare them for the loss."""
        size = self.args.per_device_train_batch_size
        at_once = size if self.replays_rollout else self.args.images_at_once
        self.model.eval()
        self.before_rollout()
        drawn = []
        with self.metrics.timed("rollout"), torch.no_grad():
            for start in range(0, len(examples), at_once):
                part = examples[start : start + at_once]
                with self.drawing_policy(), self._merged():  # what is merged are the weights of that policy
                    record = self.rollout(self.condition(part), [e.key for e in part])
                for first in range(0, len(part), size):
                    images = slice(first, first + size)
                    good = torch.ones(len(part[images]), dtype=torch.bool, device=self.args.device)
                    drawn.append(MicroBatch(part[images], record.of_images(images), good))
        prepared = self.prepare(drawn)
        for batch in prepared:
            if type(batch.record) is not self.record_class:  # else a checkpoint could not be read again
                raise TypeError(
                    f"`{type(self).__name__}.prepare` returns a {type(batch.record).__name__}, but its `record_class` "
                    f"is {self.record_class.__name__}: name the class of the records there."
                )
        return prepared

    def drawing_policy(self) -> AbstractContextManager[None]:
        """A context in which the model is the policy that draws rollouts: the present one by default."""
        return nullcontext()

    def _merged(self) -> AbstractContextManager[None]:
        """A context in which the adapter is added to the weights, where `merge_adapter` asks for it."""
        adapter = self.model.merged_adapter
        return adapter.in_place() if self.args.merge_adapter and adapter is not None else nullcontext()

    def initial_latents(self, keys: list[ImageKey], purpose: str = "initial latents") -> Tensor:
        """Float32 noise (B, ...) of images, each drawn on the CPU from its own key."""
        generators = keyed_generators(self.args.seed, keys, purpose)
        return self.flow.initial_latents(len(keys), generators).to(self.args.device)

    def condition(self, examples: list[Example]) -> Conditioning:
        """What the network reads of the examples' prompts."""
        return self.conditioning([e.prompt for e in examples], self.args.device)

    def at_once(
        self,
        function: Callable[..., Tensor],
        batches: Sequence[MicroBatch[Any]],
        *columns: Sequence[Tensor],
        images: int | None = None,
    ) -> list[Tensor]:
        """What a function that trains nothing says of each micro-batch, called with several of them at a time.

        Args:
            function: Maps one tensor (M, ...) of each column, and M examples, to (M, ...).
            batches: Micro-batches.
            *columns: One tensor (B, ...) for each of them.
            images: The most M, a multiple of `per_device_train_batch_size`. Default: `rollout_batch_size`.
        """
        count = (images or self.args.images_at_once) // self.args.per_device_train_batch_size
        found: list[Tensor] = []
        for start in range(0, len(batches), count):
            part = slice(start, start + count)
            sizes = [len(batch.examples) for batch in batches[part]]
            inputs = (torch.cat(list(column[part])) for column in columns)
            examples = [example for batch in batches[part] for example in batch.examples]
            found += function(*inputs, examples).split(sizes)
        return found

    @torch.no_grad()
    def velocities(
        self,
        states: Tensor,
        sigmas: Tensor,
        examples: list[Example],
        *,
        guidance: bool,
        part: Literal["velocity", "head"] = "velocity",
    ) -> Tensor:
        """The velocities (B, K, ...) at states of each image, or what the head says of them, without gradients.

        Args:
            states: (B, K, ...).
            sigmas: Their levels, (B, K).
            examples: B of them.
            guidance: Whether they are the guided ones.
            part: See `FlowModel.forward`.
        """
        conditioning = self.condition(examples)
        columns = zip(states.unbind(1), sigmas.unbind(1), strict=True)
        found = [self.model(x, s, conditioning, guidance=guidance, part=part) for x, s in columns]
        return torch.stack(found, dim=1)

    def base_velocities(self, states: Tensor, sigmas: Tensor, examples: list[Example], *, guidance: bool) -> Tensor:
        """Those of the base model; arguments as in `velocities`."""
        with self.model.reference():
            return self.velocities(states, sigmas, examples, guidance=guidance)

    def _accumulate_gradient(self, model: nn.Module, batch: MicroBatch[RecordT]) -> Tensor:
        conditioning, states = self.condition(batch.examples), self.num_trained_states
        total, bad = torch.zeros((), device=self.args.device), torch.zeros((), device=self.args.device)
        if self.model.is_sharded:
            self.model.reduce_at_once()
        # The last state's losses are taken in any case: gradients that are zero still move an optimizer with momentum,
        # and processes wait for each other there.
        for state in range(0 if self.has_signal(batch) else states - 1, states):
            # Gradients of all but the last state are reduced over processes together with the last one's; those of a
            # sharded network at once, in every micro-batch, as a whole gradient is as large as what is trained.
            with nullcontext() if state == states - 1 or self.model.is_sharded else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    losses = self.micro_batch_losses(model, batch, conditioning, state)
                good = losses.detach().isfinite() & batch.good
                loss = torch.where(good, losses, 0.0).mean() / (states * self.current_gradient_accumulation_steps)
                self.accelerator.backward(loss)
            total += loss.detach()
            bad += (~losses.detach().isfinite() & batch.good).float().mean() / states
        self.count_bad_samples("loss", bad.reshape(1))
        return total

    def has_signal(self, batch: MicroBatch[RecordT]) -> bool:
        """Whether any loss of a micro-batch can have a gradient, the same on all processes; True by default."""
        return True

    # ---- what is noted of an update --------------------------------------------------------------------------------

    def reward_context(self, log_metric: Callable[[str, float], None] | None = None) -> dict[str, Any]:
        """What every reward gets beside images, prompts and columns; log_metric: that of training by default."""
        log_metric = log_metric or self.metrics.note
        return {"trainer_state": self.state, "log_metric": log_metric, "log_extra": lambda name, values: None}

    def log_rewards(self, scores: Tensor, rollout: Sequence[MicroBatch[Any]]) -> None:
        """Note the rewards of a rollout over all processes, and warn of what is odd about them.

        Args:
            scores: (B, R) of this process's images.
            rollout: Its micro-batches, of B images together.
        """
        rows = self.prompt_rows(rollout)
        scores, rows = self.accelerator.gather(scores), self.accelerator.gather(rows)
        row, self.rollout_reward = self.scorer.summary(scores)
        for name, value in row.items():
            self.metrics.note(name, value)
        if self.rollout_reward is not None:
            self.metrics.note("reward", self.rollout_reward)
        trained = scores[:, self.reward_weights != 0]
        self.metrics.note("prompts_without_spread", share_without_spread(trained, rows), unless_nan=True)
        for sentence in self.reward_watch.observe(scores, rows):
            if self.is_world_process_zero():
                logger.warning(sentence)

    @torch.no_grad()
    def show_samples(self, final: Tensor, scores: Tensor, rollout: Sequence[MicroBatch[Any]]) -> None:
        """Show pictures of every tenth rollout, with prompts and scores, in the trackers.

        Args:
            final: The latents (B, ...) of this process's images.
            scores: (B, R) of them.
            rollout: Its micro-batches, of B images together.
        """
        examples = [example for batch in rollout for example in batch.examples]
        due = examples[0].key.rollout % SHOW_EVERY == 0 and self.is_world_process_zero()
        if not (due and self.args.report_to and self.args.log_images):
            return
        count = min(self.args.log_images, len(examples))
        shown = [i * len(examples) // count for i in range(count)]
        with self.placement.judging([]):
            images = decoded(self.flow, final[shown]).nan_to_num()
        if images.dim() == 4:
            captions = [
                f"{', '.join(f'{r.name} {s:.4g}' for r, s in zip(self.rewards, scores[i].tolist(), strict=True))}: "
                f"{examples[i].prompt}"
                for i in shown
            ]
            sheet, _ = before_after(captions, {"rollout": images})
            self._show_in_trackers("samples/train", sheet, "\n".join(captions))

    def prompt_rows(self, rollout: Sequence[MicroBatch[Any]]) -> Tensor:
        """The rows of the prompts of a rollout's images, (B,): equal numbers for images of one prompt."""
        return torch.tensor([key.row for batch in rollout for key in batch.keys], device=self.args.device)

    def note_norm_ratios(self, v: Tensor, base_lengths: Tensor, sigma: Tensor, good: Tensor) -> None:
        """Note `velocity_norm_ratio_N`, |v| / |v_base| in the N-th quarter of the noise levels, from 0.

        Every process notes its own, without waiting for the others.

        Args:
            v: Velocities, (B, ...).
            base_lengths: The root mean squares of the base's, (B,).
            sigma: Their levels, (B,).
            good: (B,), False for images that are left out.
        """
        ratios = norm_ratios(root_mean_square(v.detach()), base_lengths, sigma, good)
        for number, ratio in enumerate(ratios.unbind()):
            self.metrics.note(f"velocity_norm_ratio_{number}", ratio, unless_nan=True)

    def mean_of_good(self, values: Tensor, good: Tensor) -> Tensor:
        """The mean of values (B,) over the images of all processes that were not left out."""
        mine = torch.stack([torch.where(good, values.detach(), 0.0).sum(), good.sum().to(values.dtype)])
        total, count = self.accelerator.reduce(mine, "sum")
        return total / count.clamp(min=1)

    def count_bad_samples(self, what: str, bad: Tensor) -> None:
        """Note the share of bad samples (B,), 0 or 1 each, over all processes; too large a share ends the run."""
        share = float(self.accelerator.gather(bad.float()).mean())
        self.metrics.note(f"bad_samples/{what}", share)
        if share > self.args.max_bad_sample_share:
            raise RuntimeError(
                f"The {what} is not finite in float32 for {100 * share:.0f} % of the samples, more than "
                f"`max_bad_sample_share` ({self.args.max_bad_sample_share}) allows: lower the learning "
                "rate, or look at the rewards."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the noted numbers to what Trainer logs of training."""
        if "loss" in logs:
            logs |= self.metrics.means()
            self.metrics.clear()
        super().log(logs, start_time)
        name_trackio_run(self.args)

    # ---- an evaluation ---------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: PromptSource | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Draw one picture per row, with seeds that are the row's own, and score it with all rewards.

        Writes a sheet of `log_images` pictures into `samples/`.

        Args:
            eval_dataset: Held-out prompts; None for those of the trainer.
            ignore_keys: As in `transformers.Trainer`; not used.
            metric_key_prefix: Of the names.

        Returns:
            With the prefix, and logged: what `Evaluator.row` finds (`reward/<name>`, which is the mean over all rows,
            `diversity`, statistics that betray a hacked reward), the same of the base model with the same seeds under
            `base_reward/<name>` and so on, and `velocity_distance`, how far the velocity has moved from the base's,
            relative to it, with `velocity_norm_ratio_N`, its length beside the base's in the N-th quarter of the noise
            levels. Further samplers of an algorithm have rows of their own, such as `ode_reward/<name>` and
            `base_ode_reward/<name>`.

        Raises:
            ValueError: Without a dataset.
        """
        source = eval_dataset if eval_dataset is not None else self.eval_dataset
        if source is None:
            raise ValueError("`evaluate` needs prompts: pass `eval_dataset` to it or to the trainer.")
        dataset = check_dataset(source, "eval_dataset")
        check_columns(self.evaluated_rewards, dataset, "eval_dataset", others=self.rewards)
        with self.one_for_all(), self.at_work(), self.judges_at_hand(), own_random_numbers(self.args.device):
            self._encode_new(dataset["prompt"])
            start = perf_counter()
            rows, changes = self.comparison.rows(dataset, self.evaluation_samplers(), self.sigmas)
            self.run_folder.rows, self.run_folder.sheet, sheet = rows, None, None
            if self.args.log_images and (self.model.is_sharded or self.is_world_process_zero()):
                base, tuned = self.pictures(dataset, self.args.log_images)
                # A model of vectors has nothing to show.
                if base.images.dim() == 4 and self.is_world_process_zero():
                    sheet = self.run_folder.write_sheet(base, tuned, self.step_of_weights)
        self._warn_of_over_optimisation(changes)
        self._warn_of_long_velocities()
        self.seconds["evaluation"] = self.seconds.get("evaluation", 0.0) + perf_counter() - start
        metrics: dict[str, float] = {}
        for label, row in self.rows.items():
            prefix = "_".join(part for part in (metric_key_prefix, *label.removeprefix("tuned").split("_")) if part)
            metrics |= {f"{prefix}_{name}": value for name, value in row.items()}
        self.log(dict(metrics))
        self.state.log_history[-1]["step"] = self.step_of_weights  # not the last, where the best was loaded
        if sheet is not None:
            self._show_in_trackers("samples/held_out", sheet, "Base above tuned.")
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises `TypeError`: pictures have no labels to predict."""
        raise TypeError("`predict` has nothing to predict here: call `evaluate(dataset)` for scores, or `pictures`.")

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises `TypeError`: a trainer is bound to its pipeline, which one trial would hand to the next."""
        raise TypeError("`hyperparameter_search` is not supported: make a trainer and a folder for each trial.")

    @property
    def rows(self) -> dict[str, dict[str, float]]:
        """Those of the last evaluation, by label; empty before the first."""
        return self.run_folder.rows

    def pictures(self, dataset: PromptSource, count: int) -> tuple[Pictures, Pictures]:
        """Base and tuned pictures of `count` evenly spaced rows with different prompts, all of them on this process.

        With FSDP2, all processes must call it.

        Raises:
            ValueError: For what holds no prompts, and for a `count` below 1.
        """
        dataset = check_dataset(dataset, "dataset")
        check_columns(self.evaluated_rewards, dataset, "dataset", others=self.rewards)
        if count < 1:
            raise ValueError(f"`count` ({count}) must be at least 1.")
        with self.at_work(), self.judges_at_hand():
            self._encode_new(dataset["prompt"])
            return self.comparison.pictures(dataset, next(iter(self.evaluation_samplers().values())), count)

    def _show_in_trackers(self, name: str, sheet: Image, text: str) -> None:
        show_picture(self.callback_handler.callbacks, name, sheet, text, self.step_of_weights)

    def _warn_of_over_optimisation(self, changes: dict[str, Change]) -> None:
        weights = zip(self.rewards, self.reward_weights.tolist(), strict=True)
        trained = {reward.name: weight for reward, weight in weights if weight != 0 and not reward.groupwise}
        judges = [r.name for r in self.eval_rewards]
        signs = signs_of_over_optimisation(self.rows["base"], self.rows["tuned"], trained, judges, changes)
        if signs and self.is_world_process_zero():
            logger.warning(
                "The trained reward moved as it should, but %s: it may have been hacked. Look at the pictures.",
                "; ".join(signs),
            )

    def _warn_of_long_velocities(self) -> None:
        ratios = {n: r for n, r in self.rows["tuned"].items() if n.startswith("velocity_norm_ratio_") and r > LONG}
        if ratios and self.is_world_process_zero():
            name, largest = max(ratios.items(), key=lambda item: item[1])
            logger.warning(
                "The velocity is up to %.0f %% longer than the base model's (`%s`), as where a reward is pursued too "
                "far: look for glaring colours and contours; a lower learning rate, a stronger pull to the base model "
                "or `norm_guard` holds it back.",
                100 * (largest - 1),
                name,
            )

    # ---- files -----------------------------------------------------------------------------------------------------

    @contextmanager
    def weights_to_write(self) -> Iterator[None]:
        """See `CheckpointedTrainer.weights_to_write`: the average, where one is kept."""
        with self.average.in_place(), super().weights_to_write():
            yield

    def write_model(self, folder: Path) -> None:
        """The adapter as stock diffusers reads it (or `transformer/`), the card, `config.yaml` and `metrics.json`."""
        self.run_folder.write_networks(folder, self.extra_networks())
        if folder.resolve() == self.output_dir.resolve():
            self.run_folder.draw_curve(self.state.log_history, self.rewards[0].name)
        self.run_folder.write_facts(folder, self.settings, self.seconds_so_far(), self._card_facts())

    def create_model_card(  # type: ignore[override]  # the arguments are those of TRL
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        """Write the card of the run into `output_dir`; what is told once stands in later cards too.

        Args:
            model_name: The heading.
            dataset_name: The data set of the prompts on the Hub.
            tags: Added to those of the method.
            license: Of the adapter; that of the base model, where its card can be read, by default.
        """
        # `push_to_hub` passes the name that the card has anyway.
        name = None if model_name in ("", self._default_name) else model_name
        licence = None if license is None else {"license": license}
        told = {"name": name, "dataset": dataset_name, "licence": licence}
        self.told_for_card |= {key: value for key, value in told.items() if value is not None}
        if tags is not None:
            self.told_for_card["further_tags"] = [tags] if isinstance(tags, str) else list(tags)
        if self.is_world_process_zero():
            self.run_folder.write_card(self.output_dir, self._card_facts())

    def _card_facts(self) -> CardFacts:
        args, lora = self.args, self.peft_config
        adapter = {} if lora is None else {"LoRA rank, alpha": f"{lora.r}, {lora.lora_alpha}"}
        steps = args.eval_num_inference_steps or args.num_inference_steps
        sampling: dict[str, Any] = {
            "sampling": self.flow.call_arguments() | {"num_inference_steps": steps},
            "scheduler": self.flow.scheduler_code(renoises=False),
        } | self.card_sampling()
        told: dict[str, Any] = {"name": self._default_name, "licence": self._base_licence} | self.told_for_card
        return CardFacts(
            method=self._name,
            paper=self._paper,
            tags=self._tag_names,
            base_model=self.flow.name,
            loader=self.flow.loader(),
            has_adapter=lora is not None,
            rewards=dict(zip([r.name for r in self.rewards], self.reward_weights.tolist(), strict=True)),
            settings={"updates": self.step_of_weights, "images per update": args.images_per_update}
            | {"learning rate": args.learning_rate, "seed": args.seed}
            | ({"rollout batch": args.rollout_batch_size} if args.rollout_batch_size else {})
            | ({"branches of guidance": "in one call"} if self.flow.guidance_in_one_call else {})
            | adapter
            | ({"compiled": "blocks of the network"} if args.compile_blocks else {})
            | ({"rollouts": "with the adapter merged"} if args.merge_adapter else {})
            | ({"attention": args.attention_backend} if args.attention_backend else {})
            | ({"decoder": args.decoder_dtype} if args.decoder_dtype != "float32" else {})
            | self._card_memory()
            | self.card_settings(),
            repository=self.hub_model_id,
            prompt=self.flow.example_prompt,
            task=self.flow.task,
            **sampling,
            **told,
        )

    def _card_memory(self) -> dict[str, str]:
        """How the run fitted into memory, where it did not take the defaults."""
        args, quantised = self.args, is_quantized(self.flow.transformer)
        bits, gib = args.text_encoder_quantization, args.embedding_memory_gib
        said = {
            "precision": "bfloat16" if args.bf16 else "float16, losses scaled" if args.fp16 else None,
            "base model in training": f"quantised ({args.quantization or 'by the user'})" if quantised else None,
            "text encoders": f"quantised ({bits})" if bits else None,
            "frozen copy": "in the precision of the loaded model" if args.frozen_copy == "as_loaded" else None,
            "embeddings": None if gib is None else f"{gib:g} GiB in memory",
            "network and rewards": "on the device in turn" if args.offload_between_phases else None,
            "network": f"shared by {args.world_size} processes (FSDP2)" if self.model.is_sharded else None,
        }
        return {name: text for name, text in said.items() if text is not None}

    @cached_property
    def _base_licence(self) -> dict[str, str]:
        return licence_of(self.flow.name)

    @property
    def _default_name(self) -> str:
        args = self.args
        return args.hub_model_id.split("/")[-1] if args.hub_model_id else self.output_dir.resolve().name

    def training_state(self) -> TrainingState:
        """What training changes; and the run's identity, rollout, notes, seconds, average and algorithm."""
        values = {
            "identity": self._identity(),
            "buffer": self.buffer.state_dict(),
            "metrics": self.metrics.state_dict(),
            "seconds": self.seconds_so_far(),
            "rollout_reward": self.rollout_reward,
            "average": self.average.state_dict(),
            "algorithm": self.algorithm_state(),
        }
        return TrainingState(self.model.trained_tensors(), values)

    def _identity(self) -> dict[str, Any]:
        """What must be as it was for a resumed run to repeat the uninterrupted one."""
        return identity(
            self.args,
            steps_per_generation=self.args.micro_steps_per_rollout,
            reward_weights=self.reward_weights.tolist(),
            reward_funcs=[reward.name for reward in self.rewards],
            optimizer=self.optimizer_kind,
            **adapter_identity(self.peft_config),
            **{
                "number of processes": self.args.world_size,
                "arguments of the pipeline": self.flow.call_arguments(),
                "guidance_in_one_call": self.flow.guidance_in_one_call or None,
                "columns of the prompts": sorted(self.train_dataset.dataset.column_names),
                "prompts": self._prompts_identity,
                "values of the other columns": self._columns_identity,
                "noise levels": texts_identity(f"{sigma:.6f}" for sigma in self.sigmas.tolist()),
                "base model": self._base_identity,
                "networks beside it": {n: shapes_identity(net) for n, net in self.extra_networks().items()} or None,
                "sharded over the processes": self.model.is_sharded or None,
                "text encoders and decoder": self._frozen_parts_identity,
            },
        )

    @cached_property
    def _prompts_identity(self) -> str:
        return texts_identity(self.train_dataset.dataset["prompt"])

    @cached_property
    def _columns_identity(self) -> str | None:
        others = self.train_dataset.dataset.remove_columns("prompt")
        return values_identity(others) if others.column_names else None

    @cached_property
    def _base_identity(self) -> str:
        frozen = self.model.frozen
        with self.at_work():  # where the base model takes no gradients
            if frozen is not None:
                return weights_identity(frozen)
            return weights_identity(self.model.transformer, self.model.trained_names)

    @cached_property
    def _frozen_parts_identity(self) -> str:
        with self.at_work():
            parts = [*self.flow.text_encoders(), *self.flow.decoders()]
            return texts_identity(weights_identity(part) for part in parts)

    @property
    def optimizer_kind(self) -> str:
        """The class of the optimizer: that of `optim` until another is given or made."""
        if self.optimizer is None:
            return self.get_optimizer_cls_and_kwargs(self.args)[0].__name__
        optimizer = self.optimizer
        return type(optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer).__name__

    def load_training_state(self, values: dict[str, Any] | None, folder: Path, *, resume: bool) -> None:
        """See `CheckpointedTrainer.load_training_state`."""
        if resume and values is not None:
            refuse_another_run(values["identity"], self._identity(), folder)
            self.buffer.load_state_dict(values["buffer"], self.train_dataset.__getitem__)
            self.metrics.load_state_dict(values["metrics"])
            self.seconds.update(values["seconds"])
            self.rollout_reward = values["rollout_reward"]
        if values is not None:
            self.average.load_state_dict(values["average"])
            self.load_algorithm_state(values["algorithm"])
        step = TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step
        self.run_folder.take_up_evaluation(folder, step)


def pipeline_settings(args: FlowRLConfig) -> dict[str, Any]:
    """Those settings of the pipeline that a configuration names."""
    return {name: getattr(args, name) for name in PIPELINE_SETTINGS if getattr(args, name) is not None}


def _computing_dtype(transformer: nn.Module, args: FlowRLConfig) -> torch.dtype:
    """The precision in which the network computes: that of the run, or of the weights that are not in 4 bits."""
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    return next(p.dtype for p in transformer.parameters() if p.is_floating_point())


def _flow_pipeline(model: str | Path | DiffusionPipeline | FlowPipeline, args: FlowRLConfig) -> FlowPipeline:
    settings = pipeline_settings(args)
    if isinstance(model, FlowPipeline):
        # A default that a method has of a setting, as DiffusionNFT of `guidance_scale`, is for other models.
        defaults = {field.name: field.default for field in fields(args)}
        changed = [name for name, value in settings.items() if value != defaults[name]]
        if changed:
            raise ValueError(
                f"`{changed[0]}` is set in `args`, but `model` is a `FlowPipeline` with settings of its "
                "own: set it there."
            )
        return model
    if isinstance(model, (str, Path)):
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        bits = {"quantization": args.quantization, "text_encoder_quantization": args.text_encoder_quantization}
        return FlowPipeline.from_pretrained(model, dtype=dtype, **bits, **settings)
    return FlowPipeline.from_pipeline(model, **settings)
