"""A reward behind HTTP: what `RemoteReward` talks to. Needs starlette (the extra `rewards`).

    GET /health   {"name": "hps", "ready": true}, as soon as the reward is loaded
    POST /score   {"images": ["<base64 of a PNG>", ...], "prompts": ["...", ...], "columns": {"answer": [...], ...}}
                  {"scores": [0.31, null, "nan", ...]}

Whatever is wrong is answered by a 4xx or 5xx with {"error": "one sentence"}.
"""

import asyncio
import base64
import inspect
import io
import json
import logging
import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from .base import Reward

logger = logging.getLogger(__name__)

KEYS = ("images", "prompts", "columns")
OWN = (
    "images",
    "prompts",
    "trainer_state",
    "log_extra",
    "log_metric",
)  # keywords of the contract, which no column may bear
CLOSED = 499  # what nginx calls a request whose sender has gone; nobody reads it
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    zlib.error,
    Image.DecompressionBombError,
)  # all that Pillow raises for a PNG
Score = float | str | None


@dataclass(frozen=True)
class Limits:
    """What a server accepts.

    One request takes at most three times `max_bytes`, as body, JSON and PNG, and 25 bytes for each of `max_batch * max_pixels` pixels, as
    Pillow's picture, in 8 bits and in float32.
    """

    max_pixels: int = 2048 * 2048
    max_batch: int = 32
    max_bytes: int = 72 * 2**20

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_batch", "max_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must be at least 1.")


@dataclass(frozen=True)
class Batch:
    """A request whose pictures are open but not decoded."""

    images: list[Image.Image]
    prompts: list[str]
    columns: dict[str, list[Any]]


def reward_app(reward: Reward, limits: Limits, device: torch.device) -> Starlette:
    """The ASGI application that serves a reward, computed on a device, one request at a time.

    The reward gets float32 images (B, 3, H, W) in multiples of 1/255, prompts and columns as a trainer gives them; `trainer_state` is
    None, and what it tells `log_metric` and `log_extra` stays unheard.
    """
    reward.to(device)
    one_at_a_time = asyncio.Lock()

    async def health(request: Request) -> Response:
        return JSONResponse({"name": reward.name, "ready": True})

    async def score(request: Request) -> Response:
        body = await _body(request, limits.max_bytes)
        async with one_at_a_time:
            if await request.is_disconnected():  # gave up while others were served, and may have sent it again
                return Response(status_code=CLOSED)
            return JSONResponse({"scores": await run_in_threadpool(_answer, body, reward, limits, device)})

    return Starlette(
        routes=[Route("/health", health, methods=["GET"]), Route("/score", score, methods=["POST"])],
        exception_handlers={HTTPException: _refusal},
    )


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _body(request: Request, max_bytes: int) -> bytes:
    """All of the body; of one that is too large nothing is kept, but it is read to its end, so that the sender hears the answer."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= max_bytes:
            parts.append(part)
        else:
            parts.clear()
    if size > max_bytes:
        raise HTTPException(
            413,
            f"The request has {size} bytes, more than `max_bytes` ({max_bytes}) allows: send fewer pictures at a time (`batch_size`).",
        )
    return b"".join(parts)


def _answer(body: bytes, reward: Reward, limits: Limits, device: torch.device) -> list[Score]:
    batch = read_batch(body, limits)
    return scores_of(reward, decode(batch.images).to(device), batch)


# ---- what is asked ---------------------------------------------------------------------------------------------------------


def read_batch(body: bytes, limits: Limits) -> Batch:
    """A request, checked in all that can be checked without decoding pixels; raises `HTTPException` with a sentence."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"The body is no JSON: {error}.") from error
    if not isinstance(told, dict) or not {"images", "prompts"} <= told.keys() <= set(KEYS):
        raise HTTPException(
            422, "The body must be an object with 'images', 'prompts' and, if need be, 'columns', and nothing else."
        )
    encoded, prompts, columns = told["images"], told["prompts"], told.get("columns", {})
    for name, values in (("images", encoded), ("prompts", prompts)):
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise HTTPException(422, f"'{name}' must be a list of strings.")
    if not encoded:
        raise HTTPException(422, "'images' is empty: send at least one picture.")
    if len(encoded) > limits.max_batch:
        raise HTTPException(
            413,
            f"The request has {len(encoded)} pictures, more than `max_batch` ({limits.max_batch}) allows: make `batch_size` smaller.",
        )
    if len(prompts) != len(encoded):
        raise HTTPException(
            422, f"The request has {len(encoded)} pictures but {len(prompts)} prompts: send one prompt per picture."
        )
    _check_columns(columns, len(encoded))
    images = [open_picture(i, picture, limits.max_pixels) for i, picture in enumerate(encoded)]
    if len({image.size for image in images}) > 1:
        raise HTTPException(422, "The pictures differ in size: send those of one size together.")
    return Batch(images, prompts, columns)


def _check_columns(columns: Any, count: int) -> None:
    if not isinstance(columns, dict):
        raise HTTPException(422, "'columns' must be an object: of each column its name and the list of its values.")
    for name, values in columns.items():
        if name in OWN:
            raise HTTPException(422, f"No column may be called {name!r}: rename it.")
        if not isinstance(values, list) or len(values) != count:
            raise HTTPException(422, f"The column {name!r} must be a list of {count} values, one per picture.")


def open_picture(number: int, encoded: str, max_pixels: int) -> Image.Image:
    """A PNG of which only the header is read; what it unpacks to is bounded by the size that the header gives."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=["PNG"])
    except Image.DecompressionBombError as error:
        raise HTTPException(413, f"Picture {number} is far larger than `max_pixels` ({max_pixels}) allows.") from error
    except BROKEN as error:
        raise HTTPException(422, f"Picture {number} is no base64 of a PNG.") from error
    if image.width * image.height > max_pixels:
        raise HTTPException(
            413,
            f"Picture {number} has {image.width} x {image.height} pixels, more than `max_pixels` ({max_pixels}) allows: send smaller ones.",
        )
    if image.mode != "RGB":
        raise HTTPException(422, f"Picture {number} has the mode {image.mode!r}: send RGB.")
    return image


def decode(images: list[Image.Image]) -> Tensor:
    """Float32 pictures (B, 3, H, W) in [0, 1]; raises `HTTPException` for one that breaks off."""
    pixels = []
    for number, image in enumerate(images):
        try:
            pixels.append(np.array(image))
        except BROKEN as error:
            raise HTTPException(422, f"Picture {number} is a broken PNG: {error}.") from error
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous() / 255


# ---- what is answered ------------------------------------------------------------------------------------------------------


def scores_of(reward: Reward, images: Tensor, batch: Batch) -> list[Score]:
    """The scores as JSON takes them; raises `HTTPException` (500) if the reward fails, of which the log has the traceback."""
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
        values = scores.tolist() if isinstance(scores, Tensor) else list(scores)
        numbers = [None if v is None else float(v) for v in values]
    except Exception as error:  # whatever a reward raises must not end the server
        logger.exception("Reward %r failed.", reward.name)
        raise HTTPException(500, f"Reward {reward.name!r} raised {type(error).__name__}: {error}") from error
    if len(numbers) != len(images):
        raise HTTPException(
            500,
            f"Reward {reward.name!r} returned {len(numbers)} scores for {len(images)} pictures: it must return one per picture.",
        )
    return [v if v is None or math.isfinite(v) else str(v) for v in numbers]


async def _awaited(scores: Any) -> Any:
    return await scores
