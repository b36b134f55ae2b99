"""An `Estimate` as text: the phases, the one that holds most, what would lower it, and a bound of the time."""

from dataclasses import dataclass

from .calls import Phase
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

LOWER = {
    ENCODE: "`max_sequence_length` does not help: encode elsewhere, or load the text encoders in a lower precision",
    Phase.ROLLOUT: "`rollout_batch_size` where it is set, or `per_device_train_batch_size` (with more "
    "`gradient_accumulation_steps`)",
    Phase.REWARD: "`decode_batch_size: 1`, which decodes and scores one picture at a time; then "
    "`activation_checkpointing: true`",
    Phase.TARGET: "`rollout_batch_size` where it is set (of products alone: `product_batch_size`), "
    "`per_device_train_batch_size` (with more `gradient_accumulation_steps`), or `activation_checkpointing: true`",
    Phase.UPDATE: "`activation_checkpointing: true`, or `per_device_train_batch_size` (with more "
    "`gradient_accumulation_steps`)",
    Phase.EVALUATION: "`per_device_eval_batch_size`",
}


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
        f"lower it by: {LOWER[estimate.peak_phase]}",
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
