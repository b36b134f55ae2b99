"""An `Estimate` as text: the phases, the one that holds most, what would lower it, and a bound of the time."""

from dataclasses import dataclass

from .calls import Kind, Phase
from .estimate import ENCODE, Estimate


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet.

    Attributes:
        gib: Its memory, in GiB.
        tflops: Dense operations per second with 16-bit inputs, in units of 10^12.
    """

    gib: float
    tflops: float


GPUS = {
    "t4": Device(15, 65),
    "l4": Device(22.5, 121),
    "rtx4090": Device(24, 165),
    "a100": Device(80, 312),
    "h100": Device(80, 989),
    "h200": Device(141, 989),
}

GRADIENTS = {str(Kind.REWARD_GRADIENT), str(Kind.OWN_REWARD_GRADIENT)}
# What is written to lower a peak, by the name of the setting, and which of them lower which phase's.
WRITTEN = {
    "quantization": "`quantization: nf4`",
    "frozen_copy": "`frozen_copy: as_loaded`",
    "text_encoder_quantization": "`text_encoder_quantization: nf4`",
    "activation_checkpointing": "`activation_checkpointing: true`",
    "offload_between_phases": "`offload_between_phases: true`",
    "decoder_dtype": "`decoder_dtype: bfloat16`",
    "decode_batch_size": "`decode_batch_size: 1`, which decodes and scores one picture at a time",
    "rollout_batch_size": "`rollout_batch_size`",
    "per_device_train_batch_size": "`per_device_train_batch_size` (with more `gradient_accumulation_steps`)",
    "per_device_eval_batch_size": "`per_device_eval_batch_size`",
}
OF_CALLS = {
    ENCODE: ("text_encoder_quantization", "offload_between_phases"),
    Phase.ROLLOUT: ("rollout_batch_size", "per_device_train_batch_size"),
    Phase.REWARD: ("decode_batch_size", "activation_checkpointing", "decoder_dtype", "offload_between_phases"),
    Phase.TARGET: ("rollout_batch_size", "per_device_train_batch_size", "activation_checkpointing"),
    Phase.UPDATE: ("activation_checkpointing", "per_device_train_batch_size"),
    Phase.EVALUATION: ("per_device_eval_batch_size",),
}
OF_WEIGHTS = ("quantization", "frozen_copy")  # where these are more than half of a peak


def lower(estimate: Estimate) -> str:
    """The settings that would lower the peak and are not taken yet, the one that does most first."""
    phase = estimate.phases[estimate.peak_phase]
    names = OF_CALLS[estimate.peak_phase]
    if 2 * phase.parts.get("weights", 0) > phase.peak:
        names = OF_WEIGHTS + names
    without_use = set(estimate.taken)
    if estimate.peak_phase == ENCODE and "weights" not in phase.parts:
        without_use.add("offload_between_phases")  # the network is not there yet
    if GRADIENTS & estimate.calls.keys():
        without_use.add("decoder_dtype")  # which must be float32 where rewards are differentiated
    elif estimate.peak_phase == Phase.REWARD:
        without_use.add("activation_checkpointing")
    left = [WRITTEN[name] for name in names if name not in without_use]
    return ", or ".join(left) or "a smaller picture or model, or more GPUs with `--accelerate_config fsdp2`"


def table(estimate: Estimate, gpu: str | None, not_counted: list[str]) -> str:
    """What `flowrl estimate` prints.

    Args:
        estimate: Of one process.
        gpu: A key of `GPUS`; None to compare with none.
        not_counted: The names of rewards whose cost is not known.
    """
    lines = [f"{'phase':<18}{'peak, GiB':>10}{'TFLOP per update':>18}   largest call"]
    for name, cost in estimate.phases.items():
        peak, flop = cost.peak / 2**30, cost.flop / estimate.updates / 1e12
        shown = "" if name in (ENCODE, Phase.EVALUATION) else f"{flop:.4g}"
        lines.append(f"{name:<18}{peak:>10.2f}{shown:>18}   {cost.largest}")
    parts = estimate.phases[estimate.peak_phase].parts
    held = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in parts.items() if size)
    calls, once = (
        ", ".join(f"{count:g} {kind}" for kind, count in found.items()) for found in (estimate.calls, estimate.once)
    )
    lines += [
        "",
        f"peak: {estimate.peak_gib:.1f} GiB, {estimate.peak_phase} ({held})",
        f"lower it by: {lower(estimate)}",
        f"operations: {estimate.tflop_per_update:.4g} TFLOP per update",
        f"calls per update: {calls}",
    ]
    if once:
        lines.append(f"calls once in a run: {once}")
    if not_counted:
        lines.append(f"not counted: {', '.join(not_counted)}, of which nothing is known without loading it")
    if gpu is not None:
        device = GPUS[gpu]
        fits = "fits" if estimate.peak_gib < device.gib else "does not fit"
        seconds = estimate.tflop_per_update / device.tflops
        lines += [
            f"{gpu}: {fits} into {device.gib:g} GiB; an update takes at least {seconds:.2g} s, all of its "
            f"{device.tflops:g} TFLOP per second in use"
        ]
    return "\n".join(lines)
