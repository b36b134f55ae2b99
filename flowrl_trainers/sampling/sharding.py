"""A network whose parameters are spread over the processes (FSDP2, through accelerate), and those parameters whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    fsdp2_prepare_model,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(network: nn.Module) -> bool:
    """Whether each process holds a part of the network alone, so that all of them must call it together."""
    return isinstance(network, FSDPModule)


def asks_for_sharding() -> bool:
    """Whether the launcher wants the network spread over the processes."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def refuse_other_sharding(
    *,
    compile_blocks: bool = False,
    merge_adapter: bool = False,
    cache_base_pictures: bool = False,
    quantization: str | None = None,
) -> None:
    """Check that the launcher wants the network whole, or sharded in the one way that works here.

    Args:
        compile_blocks: The setting of the run, which goes with a whole network alone.
        merge_adapter: Likewise.
        cache_base_pictures: Likewise.
        quantization: That of the run; torchao's weights cannot be split.

    Raises:
        ValueError: For DeepSpeed, FSDP1, and what FSDP2 cannot do here, with what to take instead.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "DeepSpeed is not supported: take `--accelerate_config fsdp2`, which shards the network as ZeRO-3 does, "
            "or 'ddp', which keeps it whole."
        )
    if not asks_for_sharding():
        return
    plugin, state = FullyShardedDataParallelPlugin(), PartialState()
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP1 is not supported (`fsdp_version` is {plugin.fsdp_version}): set `fsdp_version: 2` in the "
            "accelerate file, or take `--accelerate_config fsdp2`."
        )
    refused = {
        "fsdp_cpu_ram_efficient_loading": (
            plugin.cpu_ram_efficient_loading,
            "text encoders would be loaded on the first process alone",
        ),
        "fsdp_offload_params": (
            isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "rollouts would fetch the network from the host at every step",
        ),
        "fsdp_activation_checkpointing": (
            plugin.activation_checkpointing,
            "`activation_checkpointing` of the run's settings does that",
        ),
    }
    for name, (is_set, reason) in refused.items():
        if is_set:
            raise ValueError(f"`{name}` of the accelerate file is true, but {reason}: set it to false.")
    if not plugin.reshard_after_forward:
        raise ValueError(
            "`fsdp_reshard_after_forward` of the accelerate file is false, which keeps the network whole between "
            "calls, with weights that may have changed since: set it to true."
        )
    needs_whole = {
        "compile_blocks": (
            compile_blocks,
            "the blocks are sharded, and what gathers their weights before each call is no part of a graph",
        ),
        "merge_adapter": (
            merge_adapter,
            "the weights are spread over the processes, and nothing can be added to them",
        ),
        "cache_base_pictures": (
            cache_base_pictures,
            "all processes must call a sharded network together, and one that finds its file would not",
        ),
    }
    for name, (is_set, reason) in needs_whole.items():
        if is_set:
            raise ValueError(f"`{name}` is True, but {reason}: leave it out, or take `--accelerate_config ddp`.")
    if quantization in ("int8", "float8"):
        raise ValueError(
            f"`quantization` is {quantization!r}, but FSDP2 cannot split the weights of torchao: take 'nf4', whose "
            "weights stay whole on every process, or take `--accelerate_config ddp`."
        )
    if state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ValueError(
            f"FSDP2 is asked for, but there are {state.num_processes} process(es) on '{state.device.type}', where "
            "accelerate would leave the network whole in silence: start one process for each of several GPUs, or take "
            "`--accelerate_config ddp`."
        )


def shard(accelerator: Accelerator, network: nn.Module, blocks: list[nn.Module]) -> None:
    """Spread a network over the processes in place, by accelerate: each block by itself, then what is left.

    Nothing is cast: autocast decides what is computed in which precision, as for a whole network. FSDP's own casts
    would round latents and noise levels.

    Args:
        accelerator: In an FSDP2 run.
        network: Whole, and the same on all processes. It is moved to the device.
        blocks: The repeated blocks of the network; the accelerate file may name other classes.
    """
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = None
    if plugin.auto_wrap_policy == transformer_auto_wrap_policy and plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in blocks})
    fsdp2_prepare_model(accelerator, network)
    assert isinstance(network, FSDPModule)
    # Of the root too, which FSDP leaves whole otherwise: what averages, exchanges or saves parameters finds the
    # sharded ones, and the next call gathers what it left there.
    network.set_reshard_after_forward(True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it would be without sharding; of a sharded one, all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_whole(tensor: Tensor, values: Tensor) -> None:
    """Set a tensor, which may be sharded, to whole values that every process has."""
    if isinstance(tensor, DTensor):
        tensor.copy_(distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements))
    else:
        tensor.copy_(values)


@contextmanager
def whole_parameters(network: nn.Module, kept: bool) -> Iterator[None]:
    """Inside, the trained parameters of a sharded network stand in it whole, in the memory of the host.

    All processes enter; the network cannot be called inside.

    Args:
        network: Sharded or not; one that is whole already is left as it is.
        kept: Whether this process wants them; others take part, and keep nothing.
    """
    sharded = [
        (module, name, parameter)
        for module in network.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, DTensor) and parameter.requires_grad
    ]
    gathered = []
    for module, name, parameter in sharded:
        value = whole(parameter.detach())
        if kept:
            gathered.append((module, name, nn.Parameter(value.cpu())))
    try:
        for module, name, value in gathered:
            module.register_parameter(name, value)
        yield
    finally:
        if kept:
            for module, name, parameter in sharded:
                module.register_parameter(name, parameter)


def own_parts(state: dict[str, Any]) -> dict[str, Any]:
    """The `state_dict` of an optimizer with what this process holds of sharded tensors."""
    state["state"] = {
        number: {name: own_part(v) if isinstance(v, Tensor) else v for name, v in values.items()}
        for number, values in state["state"].items()
    }
    return state


def load_own_parts(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `own_parts` returned on as many processes; tensors of a parameter's shape are parts of such ones."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        values = state["state"].get(number, {})
        for name, value in values.items():
            if (
                isinstance(parameter, DTensor)
                and isinstance(value, Tensor)
                and value.shape == own_part(parameter).shape
            ):
                values[name] = DTensor.from_local(
                    value.to(parameter.device),
                    parameter.device_mesh,
                    parameter.placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
    optimizer.load_state_dict(state)
