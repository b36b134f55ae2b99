"""What the state of an optimizer takes."""

# Bytes for each trained number, as torch and bitsandbytes keep moments: in float32, or in 8 bits.
MOMENT, MOMENT_IN_8_BITS = 4, 1
ADAMW_BYTES = 2 * MOMENT
STATES: dict[str, int] = {
    "adamw_torch": ADAMW_BYTES,
    "adamw_torch_fused": ADAMW_BYTES,
    "adafactor": 0,  # a row and a column of each matrix
    "sgd": 0,
    "adagrad": MOMENT,
    "rmsprop": MOMENT,
    "adamw_8bit": 2 * MOMENT_IN_8_BITS,
    "adamw_bnb_8bit": 2 * MOMENT_IN_8_BITS,
    "paged_adamw_32bit": ADAMW_BYTES,
    "paged_adamw_8bit": 2 * MOMENT_IN_8_BITS,
    "lion_32bit": MOMENT,
    "lion_8bit": MOMENT_IN_8_BITS,
    "paged_lion_32bit": MOMENT,
    "paged_lion_8bit": MOMENT_IN_8_BITS,
    "ademamix": 3 * MOMENT,
    "ademamix_8bit": 3 * MOMENT_IN_8_BITS,
    "paged_ademamix_32bit": 3 * MOMENT,
    "paged_ademamix_8bit": 3 * MOMENT_IN_8_BITS,
}


def state_bytes(optim: str, optim_args: str | None) -> int:
    """The bytes that an optimizer keeps for each trained number; paged ones as if they stayed on the device.

    Args:
        optim: Its name in `optim`.
        optim_args: Its further arguments, written `name=value,name=value`.
    """
    given = dict(part.split("=", 1) for part in (optim_args or "").replace(" ", "").split(",") if part)
    buffers = (float(given.get("momentum", 0)) > 0) + (given.get("centered", "false").lower() == "true")
    return STATES[optim] + MOMENT * buffers
