"""Several processes through `accelerate launch`."""

import signal
import subprocess
import sys
from pathlib import Path

# Without these, accelerate reads its configuration file, or asks for one.
DDP = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
FSDP2 = ["--config_file", str(Path(__file__).parent / "fsdp2.yaml"), "--dynamo_backend", "no"]
NAMED = {"ddp": DDP, "fsdp2": FSDP2}


def take_launch_arguments(arguments: list[str]) -> tuple[list[str] | None, list[str]]:
    """Split `--accelerate_config NAME_OR_FILE` and `--num_processes N` off the arguments of a command.

    Returns:
        The arguments of `accelerate launch`, None if neither flag is there; and the other arguments of the command.

    Raises:
        ValueError: If the name is none of `NAMED` and no file, if `--num_processes` comes alone, or if it is no whole
            number from 1 on.
    """
    rest: list[str] = []
    taken: dict[str, str] = {}
    names = iter(arguments)
    for name in names:
        if name in ("--accelerate_config", "--num_processes"):
            taken[name] = next(names, "")
        else:
            rest.append(name)
    if not taken:
        return None, rest
    config = taken.get("--accelerate_config")
    if config is None:
        raise ValueError(
            "`--num_processes` needs `--accelerate_config ddp` or 'fsdp2', or the file that `accelerate config` wrote."
        )
    if config not in NAMED and not Path(config).is_file():
        raise ValueError(
            f"`--accelerate_config` ({config}) is neither 'ddp' nor 'fsdp2' nor a file: write one with "
            "`accelerate config`."
        )
    launcher = NAMED.get(config, ["--config_file", config])
    processes = taken.get("--num_processes")
    if processes is not None and not (processes.isdecimal() and int(processes) >= 1):
        raise ValueError(f"`--num_processes` ({processes!r}) must be a whole number from 1 on.")
    if config == "ddp" and processes is not None and int(processes) == 1:
        return None, rest  # which accelerate refuses, and a script on a machine with one GPU asks for
    return [*launcher, *(["--num_processes", processes] if processes is not None else [])], rest


def launched(launcher: list[str], command: list[str]) -> int:
    """Run a command of `flowrl` in the processes that the launcher starts, and return the exit status."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "-m", "flowrl_trainers.cli", *command]
    process = subprocess.Popen(launch)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # which reaches all processes of the launcher
    try:
        return process.wait()
    except KeyboardInterrupt:  # the terminal sends Ctrl-C to all of them
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
