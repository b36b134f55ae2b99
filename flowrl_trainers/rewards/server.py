"""Serves a reward over HTTP to `RemoteReward`. Needs starlette (the extra `rewards`).

    GET /health   {"name": "hps", "ready": true} once the reward is loaded
    POST /score   {"images": ["<base64 of a PNG>", ...], "prompts": ["...", ...], "columns": {"answer": [...], ...}}
                  {"scores": [0.31, null, "nan", ...]}

The answer to a wrong request, and to one on which the reward fails, is a 4xx or 5xx with {"error": "one sentence"}.
With a token, every request needs the header "Authorization: Bearer <token>".
"""

import asyncio
import base64
import hmac
import inspect
import io
import json
import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from .base import Reward
from .scores import WrongScores, checked_scores

logger = logging.getLogger(__name__)

KEYS = ("images", "prompts", "columns")
# The keywords with which a reward is called, and the first argument of its methods: no column may bear such a name.
OWN = ("images", "prompts", "trainer_state", "log_extra", "log_metric", "self")
CLOSED = 499  # nginx's status for a request whose sender has gone; nobody reads the answer
MAX_DEPTH = 32  # of lists and objects in a column: far below the depth at which Python's recursion ends
MAX_DIGITS = 309  # of an integer: those of the largest float
Score = float | str | None


@dataclass(frozen=True)
class Limits:
    """The largest request that a server accepts, and its time: pixels of a picture, pictures, bytes of the body,
    seconds in which the body must arrive, and seconds from the head of the request to the answer.

    One request takes memory of at most three times `max_bytes`, for body, JSON and PNG, and 25 bytes for each of
    `max_batch * max_pixels` pixels, for Pillow's picture, its copy in 8 bits and its copy in float32.
    """

    max_pixels: int = 2048 * 2048
    max_batch: int = 32
    max_bytes: int = 72 * 2**20
    max_upload_seconds: float = 60.0
    max_seconds: float = 600.0

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_batch", "max_bytes"):
            value = vars(self)[name]
            if value < 1:
                raise ValueError(f"`{name}` ({value}) must be at least 1.")
        for name in ("max_upload_seconds", "max_seconds"):
            value = vars(self)[name]
            if not value > 0:
                raise ValueError(f"`{name}` ({value:g}) must be above 0.")
        if self.max_upload_seconds > self.max_seconds:
            raise ValueError(
                f"`max_upload_seconds` ({self.max_upload_seconds:g}) must not exceed `max_seconds` "
                f"({self.max_seconds:g}), which include them."
            )


@dataclass(frozen=True)
class Batch:
    """A request. The headers of its pictures have been read, their pixels have not been decoded."""

    images: list[Image.Image]
    prompts: list[str]
    columns: dict[str, list[Any]]


def reward_app(reward: Reward, limits: Limits, device: torch.device, token: str | None = None) -> Starlette:
    """The ASGI application that serves a reward, one request at a time.

    The reward gets float32 images (B, 3, H, W) in multiples of 1/255, and prompts and columns as from a trainer.
    `trainer_state` is None, and calls of `log_metric` and `log_extra` have no effect.

    Args:
        reward: The reward to serve.
        limits: The largest request to accept, and its time.
        device: The device on which the reward computes.
        token: The bearer token that a request must carry; None for a server that asks for none.
    """
    reward.to(device)
    one_at_a_time = asyncio.Lock()

    def computed(work: asyncio.Task[Response]) -> None:
        one_at_a_time.release()
        if not work.cancelled():
            work.exception()  # asyncio logs an exception that nobody has looked at

    async def health(request: Request) -> Response:
        if not _bears(request, token):
            raise _unauthorized()
        return JSONResponse({"name": reward.name, "ready": True})

    async def scored(request: Request, body: bytes) -> Response:
        if await request.is_disconnected():  # its sender gave up waiting, and may have sent it again
            return Response(status_code=CLOSED)
        return JSONResponse({"scores": await run_in_threadpool(_answer, body, reward, limits, device)})

    async def score(request: Request) -> Response:
        clock = asyncio.get_running_loop().time
        deadline = clock() + limits.max_seconds
        body = await _body(request, limits, _bears(request, token))
        try:
            async with asyncio.timeout_at(deadline):
                await one_at_a_time.acquire()
        except TimeoutError as error:
            raise HTTPException(
                503,
                f"The request waited for its turn until `max_seconds` ({limits.max_seconds:g}) were over: send fewer "
                "requests at a time.",
            ) from error
        # A task of its own: a thread cannot be stopped, so the turn ends with the reward and not with the request.
        work = asyncio.create_task(scored(request, body))
        work.add_done_callback(computed)
        await asyncio.wait([work], timeout=deadline - clock())
        if not work.done():
            raise HTTPException(
                500,
                f"Reward {reward.name!r} has not returned within `max_seconds` ({limits.max_seconds:g}): send fewer "
                "pictures at a time, or allow more seconds.",
            )
        return work.result()

    return Starlette(
        routes=[Route("/health", health, methods=["GET"]), Route("/score", score, methods=["POST"])],
        exception_handlers={HTTPException: _refusal, ClientDisconnect: _gone},
    )


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = error.detail.encode(errors="backslashreplace").decode()  # half a surrogate pair cannot be sent
    return JSONResponse({"error": sentence}, error.status_code, error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLOSED)


def _bears(request: Request, token: str | None) -> bool:
    """Whether a request carries the token; in a time that does not depend on where a wrong one differs."""
    if token is None:
        return True
    return hmac.compare_digest(request.headers.get("Authorization", "").encode(), f"Bearer {token}".encode())


def _unauthorized() -> HTTPException:
    return HTTPException(
        401,
        "The request does not carry the token of this server: pass it as `RemoteReward(..., token=...)`.",
        {"WWW-Authenticate": "Bearer"},
    )


async def _body(request: Request, limits: Limits, authorized: bool) -> bytes:
    """The whole body of a request.

    The body of a request that is refused is read to its end without being kept: senders listen for the answer only
    after sending.

    Args:
        request: The request.
        limits: Its largest size and longest time.
        authorized: Whether it carries the token.

    Raises:
        HTTPException: 401 without the token, 408 if the body takes too long, and 413 if it is too large.
    """
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.max_upload_seconds):
            async for part in request.stream():
                size += len(part)
                if authorized and size <= limits.max_bytes:
                    parts.append(part)
                else:
                    parts.clear()
    except TimeoutError as error:
        raise HTTPException(
            408,
            f"The body of the request did not arrive within `max_upload_seconds` ({limits.max_upload_seconds:g}): "
            "send fewer pictures at a time (`batch_size`).",
            {"Connection": "close"},  # else the rest of the body would hold the connection
        ) from error
    if not authorized:
        raise _unauthorized()
    if size > limits.max_bytes:
        raise HTTPException(
            413,
            f"The request has {size} bytes, more than `max_bytes` ({limits.max_bytes}) allows: send fewer pictures at "
            "a time (`batch_size`).",
        )
    return b"".join(parts)


def _answer(body: bytes, reward: Reward, limits: Limits, device: torch.device) -> list[Score]:
    batch = read_batch(body, limits)
    return scores_of(reward, decode(batch.images).to(device), batch)


# ---- the request ----------------------------------------------------------------------------------------------------


def read_batch(body: bytes, limits: Limits) -> Batch:
    """Read a request and check all that does not need decoded pixels; raises `HTTPException` with a sentence."""
    try:
        request = json.loads(body, parse_int=_integer, parse_float=_float, parse_constant=_no_number)
    except ValueError as error:
        raise HTTPException(400, f"The body is no JSON: {error}.") from error
    except RecursionError as error:
        raise _too_deep() from error
    if not isinstance(request, dict) or not {"images", "prompts"} <= request.keys() <= set(KEYS):
        raise HTTPException(
            422, "The body must be an object with 'images', 'prompts' and, if need be, 'columns', and nothing else."
        )
    encoded, prompts, columns = request["images"], request["prompts"], request.get("columns", {})
    for name, values in (("images", encoded), ("prompts", prompts)):
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise HTTPException(422, f"'{name}' must be a list of strings.")
    if not encoded:
        raise HTTPException(422, "'images' is empty: send at least one picture.")
    if len(encoded) > limits.max_batch:
        raise HTTPException(
            413,
            f"The request has {len(encoded)} pictures, more than `max_batch` ({limits.max_batch}) allows: make "
            "`batch_size` smaller.",
        )
    if len(prompts) != len(encoded):
        raise HTTPException(
            422, f"The request has {len(encoded)} pictures but {len(prompts)} prompts: send one prompt per picture."
        )
    _check_columns(columns, len(encoded))
    _check_values(prompts, columns)
    images = [open_picture(i, picture, limits.max_pixels) for i, picture in enumerate(encoded)]
    if len({image.size for image in images}) > 1:
        raise HTTPException(422, "The pictures differ in size: send those of one size together.")
    return Batch(images, prompts, columns)


def _check_columns(columns: Any, count: int) -> None:
    if not isinstance(columns, dict):
        raise HTTPException(
            422, "'columns' must be an object that gives the name and the list of values of each column."
        )
    for name, values in columns.items():
        if name in OWN:
            raise HTTPException(422, f"No column may be called {name!r}: rename it.")
        if not isinstance(values, list) or len(values) != count:
            raise HTTPException(422, f"The column {name!r} must be a list of {count} values, one per picture.")


def _check_values(prompts: list[str], columns: dict[str, list[Any]]) -> None:
    """Refuse text that is no Unicode, and values with lists and objects deep within one another."""
    level: list[Any] = [prompts, columns]
    depth = -1  # a column has the depth 0
    while level:
        inner: list[Any] = []
        for value in level:
            if isinstance(value, str):
                _check_text(value)
            elif isinstance(value, (list, dict)):
                if depth > MAX_DEPTH:
                    raise _too_deep()
                inner += value if isinstance(value, list) else [*value.keys(), *value.values()]
        level, depth = inner, depth + 1


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise HTTPException(422, f"The text {text[:100]!r} has half a surrogate pair, no character.") from error


def _too_deep() -> HTTPException:
    return HTTPException(422, f"The request has lists or objects nested deeper than {MAX_DEPTH}: flatten the columns.")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS + 1 or math.isinf(float(digits)):
        raise HTTPException(
            422, f"The request has an integer of {len(digits.lstrip('-'))} digits, beyond the range of a float."
        )
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise HTTPException(422, f"The request has the number {digits[:50]}, beyond the range of a float.")
    return number


def _no_number(name: str) -> float:
    raise HTTPException(422, f"The request has the number {name}, which JSON does not have: send null or a string.")


def open_picture(number: int, encoded: str, max_pixels: int) -> Image.Image:
    """Open a PNG and read only its header, which says how large the decoded picture will be.

    Args:
        number: The place of the picture in its request, for errors.
        encoded: The base64 of the PNG.
        max_pixels: The largest number of pixels.

    Raises:
        HTTPException: If it is no RGB picture in PNG, or too large.
    """
    try:
        image = Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=["PNG"])
    except Image.DecompressionBombError as error:
        raise HTTPException(413, f"Picture {number} is far larger than `max_pixels` ({max_pixels}) allows.") from error
    except Exception as error:  # Pillow raises many, down to an IndexError for an empty colour profile
        raise HTTPException(422, f"Picture {number} is no base64 of a PNG.") from error
    if image.width * image.height > max_pixels:
        raise HTTPException(
            413,
            f"Picture {number} has {image.width} x {image.height} pixels, more than `max_pixels` ({max_pixels}) "
            "allows: send smaller ones.",
        )
    if image.mode != "RGB":
        raise HTTPException(422, f"Picture {number} has the mode {image.mode!r}: send RGB.")
    return image


def decode(images: list[Image.Image]) -> Tensor:
    """Decode the pictures as float32 (B, 3, H, W) in [0, 1]; raises `HTTPException` for a broken PNG."""
    pixels = []
    for number, image in enumerate(images):
        try:
            pixels.append(np.array(image))
        except Exception as error:  # as above
            raise HTTPException(422, f"Picture {number} is a broken PNG: {error}.") from error
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous() / 255


# ---- the answer -----------------------------------------------------------------------------------------------------


def scores_of(reward: Reward, images: Tensor, batch: Batch) -> list[Score]:
    """The scores in the form that JSON can carry: numbers, None, and strings for numbers that are not finite.

    Args:
        reward: The reward.
        images: Pictures (B, 3, H, W) in [0, 1], on the reward's device.
        batch: The request, for its prompts and columns.

    Raises:
        HTTPException: With status 500 if the reward fails or returns anything but a number or None for each picture; a
            failure is logged with its traceback.
    """
    try:
        with torch.no_grad():
            scores = reward(
                images=images,
                prompts=batch.prompts,
                **batch.columns,
                trainer_state=None,
                log_metric=lambda name, value: None,
                log_extra=lambda name, values: None,
            )
            if inspect.isawaitable(scores):
                scores = asyncio.run(_awaited(scores))
        checked = checked_scores(reward.name, scores, len(images))
    except WrongScores as error:
        raise HTTPException(500, str(error)) from error
    except (Exception, SystemExit) as error:  # whatever a reward raises must not end the server
        logger.exception("Reward %r failed.", reward.name)
        raise HTTPException(500, f"Reward {reward.name!r} raised {type(error).__name__}: {error!s:.500}") from error
    numbers = checked.double().tolist() if isinstance(checked, Tensor) else checked
    return [v if v is None or math.isfinite(v) else str(v) for v in numbers]


async def _awaited(scores: Any) -> Any:
    return await scores
