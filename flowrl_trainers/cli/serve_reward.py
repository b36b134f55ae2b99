"""`flowrl serve_reward NAME`: serve a reward over HTTP, for `RemoteReward`."""

import argparse
import ipaddress
import os
import sys

import torch

from ..rewards import as_rewards
from ..rewards.bearer import TOKEN_VARIABLE, checked_token
from ..rewards.named import refuse_all_but_pictures
from .device import device_of
from .named_reward import named_reward

KEEP_ALIVE = 5  # seconds that a connection may idle
MAX_CONNECTIONS = 64  # uvicorn answers 503 to further ones, and RemoteReward tries again


def serve_reward(arguments: list[str]) -> None:
    """Load a reward and serve it until interrupted.

    Raises:
        ValueError: If an argument is wrong.
        RuntimeError: If starlette or uvicorn is not installed.
    """
    try:
        import uvicorn

        from ..rewards.connections import TimedConnection
        from ..rewards.server import Limits, reward_app
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"`flowrl serve_reward` needs {error.name}: install the package with its extra `rewards`."
        ) from error
    defaults = Limits()
    parser = argparse.ArgumentParser("flowrl serve_reward", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "NAME",
        help="A known reward such as 'shapes', or a function as 'module.function', looked up in this folder too.",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="The address to listen on. Nothing is encrypted: keep it on loopback.",
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="The port to listen on; 0 takes a free one. Default: 8000."
    )
    parser.add_argument(
        "--max_pixels",
        type=int,
        default=defaults.max_pixels,
        help="The most pixels of a picture. Default: 2048 x 2048.",
    )
    parser.add_argument(
        "--max_batch", type=int, default=defaults.max_batch, help="The most pictures of a request. Default: 32."
    )
    parser.add_argument(
        "--max_bytes", type=int, default=defaults.max_bytes, help="The most bytes of a request. Default: 72 MiB."
    )
    parser.add_argument(
        "--max_upload_seconds",
        type=float,
        default=defaults.max_upload_seconds,
        help="The most seconds in which the body of a request must arrive. Default: 60.",
    )
    parser.add_argument(
        "--max_seconds",
        type=float,
        default=defaults.max_seconds,
        help="The most seconds from the head of a request to its answer. Default: 600.",
    )
    parser.add_argument(
        "--token_file",
        help=f"A file with the token that every request must carry. Default: the environment variable "
        f"{TOKEN_VARIABLE}, if it is set; else no token.",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Where the reward computes."
    )
    args = parser.parse_args(arguments)
    limits = Limits(args.max_pixels, args.max_batch, args.max_bytes, args.max_upload_seconds, args.max_seconds)
    token, device = _token(args.token_file), device_of(args.device)
    if not 0 <= args.port <= 65535:
        raise ValueError(f"`port` ({args.port}) must be between 0 and 65535.")
    if not _is_loopback(args.host):
        risk = (
            "whoever reaches it may use the reward, as there is no authentication"
            if token is None
            else "whoever listens on the network reads requests and token, as nothing is encrypted"
        )
        print(
            f"flowrl: {args.host} is not loopback, and {risk}: let only a trusted network reach it, or stay on "
            "127.0.0.1 and tunnel by ssh.",
            file=sys.stderr,
        )
    (reward,) = as_rewards(named_reward(args.NAME), "NAME")
    refuse_all_but_pictures([reward], "NAME")
    uvicorn.run(
        reward_app(reward, limits, device, token),
        host=args.host,
        port=args.port,
        http=TimedConnection,
        ws="none",
        access_log=False,  # it would be a line per request; the line that names the address stays
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=KEEP_ALIVE,
    )


def _token(path: str | None) -> str | None:
    """The token of a file or of the environment; on the command line, every user of the machine could read it."""
    if path is None:
        token = os.environ.get(TOKEN_VARIABLE)
        return None if token is None else checked_token(token, f"The environment variable {TOKEN_VARIABLE}")
    try:
        with open(path, encoding="utf-8") as file:
            token = file.read(2048)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`token_file` ({path!r}) cannot be read as text: {error}.") from error
    return checked_token(token.strip(), f"The text of `token_file` ({path!r})")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
