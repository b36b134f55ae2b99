"""A reward that a server computes, over HTTP: `flowrl serve_reward`, or any other server that speaks its JSON."""

import asyncio
import base64
import io
import json
import logging
import math
import sys
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import torch
from PIL import Image
from torch import Tensor

from .base import Reward
from .bearer import checked_token

logger = logging.getLogger(__name__)

FIRST_DELAY, LONGEST_DELAY = 0.5, 15.0  # seconds before the first retry; each later delay doubles, up to the longest
CONNECT_TIMEOUT = 5.0
MAX_ANSWER = 2**20  # bytes; a score takes some twenty
UNREACHABLE = (httpx2.ConnectTimeout, httpx2.NetworkError, httpx2.ProxyError, httpx2.RemoteProtocolError)
# The answers of a proxy while the server behind it restarts, and of a server with too many connections.
AWAY = (502, 503, 504)
NOT_FINITE = ("nan", "inf", "-inf")  # strings, because JSON has no such numbers


class RemoteReward(Reward):
    """The scores of a server such as `flowrl serve_reward NAME`. Not differentiable.

    A call is asynchronous, so a trainer waits for several servers at the same time. Pictures travel as PNG of 8 bits
    per channel: values in [0, 1] are rounded to multiples of 1/255, an error of at most 1/510. A picture with a value
    that is not finite is not sent; its score is NaN.

    If the server cannot be reached or dies during a request, the reward waits for it; if the server answers late or
    with an error, the reward repeats the request. The delays grow from half a second to 15 seconds.

    A call raises `ValueError` if the server refuses the request (4xx), or if its answer has no scores or more than a
    megabyte, and `RuntimeError` when `retries` or `patience` are used up.

    Args:
        url: The server's address, such as "http://127.0.0.1:8000"; pictures go to `url/score`.
        name: The name of the reward in logs.
        columns: The columns of the data set to send beside pictures and prompts; JSON must be able to carry their
            values.
        batch_size: Pictures per request; the requests follow one another.
        timeout: Seconds that one try of a request may take, from connecting to the last byte of the answer.
        retries: How often to repeat a request that timed out or got a 5xx answer.
        patience: Seconds, from a request's first failure on, to wait for a server that cannot be reached or answers
            502, 503 or 504.
        token: The bearer token of the server, from a file or an environment variable; None for a server that asks for
            none. No log, error or file of a run shows it.

    Raises:
        ValueError: If an argument is out of its range.
    """

    differentiable = False

    def __init__(
        self,
        url: str,
        name: str = "remote",
        columns: Sequence[str] = (),
        batch_size: int = 16,
        timeout: float = 60.0,
        retries: int = 3,
        patience: float = 600.0,
        token: str | None = None,
    ) -> None:
        check_address(url)
        if isinstance(columns, str):
            raise ValueError(f"`columns` ({columns!r}) is a string: pass the list [{columns!r}].")
        lower_bounds = (("batch_size", batch_size, 1), ("retries", retries, 0), ("patience", patience, 0))
        for argument, value, least in lower_bounds:
            if not value >= least:
                raise ValueError(f"`{argument}` ({value}) must be at least {least}.")
        if not timeout > 0:
            raise ValueError(f"`timeout` ({timeout}) must be above 0.")
        self.url, self.name = f"{url.rstrip('/')}/score", name
        self.columns, self.batch_size = tuple(columns), batch_size
        self.timeout, self.retries, self.patience = timeout, retries, patience
        self._token = None if token is None else checked_token(token, "`token`")

    def __call__(self, /, images: Tensor, prompts: list[str], **columns: Any) -> Awaitable[list[float | None]]:
        if images.dim() != 4:
            raise ValueError(
                f"Reward {self.name!r} sends pictures (B, 3, H, W), but `images` has the shape {tuple(images.shape)}."
            )
        # The coroutine runs later: a copy in it would wait for all that the trainer has asked of the device by then.
        return self._ask(images.cpu(), prompts, self._columns(columns))

    async def _ask(self, images: Tensor, prompts: list[str], columns: dict[str, list[Any]]) -> list[float | None]:
        scores: list[float | None] = [math.nan] * len(images)
        finite = images.isfinite().flatten(1).all(dim=1).nonzero().flatten().tolist()
        # Half of the time at most, so that a server which cannot be reached differs from one that is slow.
        timeout = httpx2.Timeout(self.timeout, connect=min(CONNECT_TIMEOUT, self.timeout / 2))
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        # A client belongs to one event loop, and every call has a new loop.
        async with httpx2.AsyncClient(timeout=timeout, headers=headers) as client:
            for start in range(0, len(finite), self.batch_size):
                rows = finite[start : start + self.batch_size]
                body = {
                    "images": await asyncio.to_thread(_encoded, images[rows]),
                    "prompts": [prompts[i] for i in rows],
                    "columns": {name: [values[i] for i in rows] for name, values in columns.items()},
                }
                response = await post(client, self.url, body, f"Reward {self.name!r}", self.retries, self.patience)
                for i, score in zip(rows, self._scores(response, len(rows)), strict=True):
                    scores[i] = score
        return scores

    def _columns(self, columns: dict[str, Any]) -> dict[str, list[Any]]:
        for name in self.columns:
            if name not in columns:
                raise ValueError(
                    f"Reward {self.name!r} is to send the column {name!r}, which the data set does not have: correct "
                    "`columns`."
                )
            try:
                json.dumps(columns[name], allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(
                    f"Reward {self.name!r} cannot send the column {name!r} as JSON ({error}): leave it out of "
                    "`columns`, or make it of strings, finite numbers, lists and dictionaries."
                ) from error
        return {name: columns[name] for name in self.columns}

    def _scores(self, response: httpx2.Response, count: int) -> list[float | None]:
        answer = json_of(response)
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != count or not all(_is_score(s) for s in scores):
            raise ValueError(
                f"Reward {self.name!r}: {self.url} did not answer with one score for each of {count} pictures but "
                f"{quoted(response.text, self._token)[:200]!r}: does `url` name a reward server?"
            )
        return [None if s is None else float(s) for s in scores]


def check_address(url: str) -> None:
    """Refuse what is no address, and one with a password, which every error would show."""
    try:
        address = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise ValueError(f"`url` ({url!r}) is no address of a server: {error}.") from error
    if address.userinfo:
        raise ValueError("`url` has a user name or a password, which errors would show: pass `token` instead.")
    if address.scheme not in ("http", "https") or not address.host or not 0 < (address.port or 80) < 65536:
        raise ValueError(f"`url` ({url!r}) is no address of a server: write it as 'http://127.0.0.1:8000'.")


def _is_score(score: Any) -> bool:
    if isinstance(score, int) and not isinstance(score, bool):
        return abs(score) <= sys.float_info.max  # exact, where float() raises for a larger one
    return score is None or isinstance(score, float) or score in NOT_FINITE


def _encoded(images: Tensor) -> list[str]:
    return [png_base64(image) for image in images]


def png_base64(image: Tensor) -> str:
    """The base64 of a picture (3, H, W) in [0, 1], on the CPU, as a PNG; rounded to 8 bits per channel."""
    file = io.BytesIO()
    pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(
        file, "PNG", compress_level=1
    )  # each file is read once, so speed matters more than size
    return base64.b64encode(file.getvalue()).decode()


async def post(
    client: httpx2.AsyncClient, url: str, body: dict[str, Any], sender: str, retries: int = 3, patience: float = 600.0
) -> httpx2.Response:
    """Post a JSON body and return the successful response, after the retries and delays that `RemoteReward` describes.

    Args:
        client: The client that sends the request; its `timeout.read` bounds a whole try, and its headers may hold a
            bearer token.
        url: The address.
        body: The body of the request.
        sender: The subject of log lines and errors.
        retries: How often to repeat after time-outs and 5xx answers.
        patience: Seconds to wait for a server that cannot be reached or answers 502, 503 or 504.

    Raises:
        ValueError: If the answer is a 3xx or 4xx, and the error quotes the server; or if it is larger than
            `MAX_ANSWER`.
        RuntimeError: If `retries` or `patience` are used up.
    """
    first_failure, failed, delay = math.inf, 0, FIRST_DELAY
    while isinstance(outcome := await _attempt(client, url, body, sender), _Failure):
        first_failure = min(first_failure, time.monotonic())
        failed += not outcome.away
        if failed > retries:
            raise RuntimeError(
                f"{sender}: {url} failed {failed} times, more than `retries` ({retries}) allows, at last with "
                f"{outcome.words}"
            )
        if outcome.away and time.monotonic() - first_failure >= patience:
            raise RuntimeError(
                f"{sender}: {url} was away for longer than `patience` ({patience:g} s), at last with {outcome.words}: "
                "start the server and resume from the last checkpoint."
            )
        logger.warning("%s: %s failed with %s; asking again in %g s.", sender, url, outcome.words, delay)
        await asyncio.sleep(delay)
        delay = min(2 * delay, LONGEST_DELAY)
    return outcome


@dataclass(frozen=True)
class _Failure:
    words: str
    away: bool  # no server was there to read the request


async def _attempt(
    client: httpx2.AsyncClient, url: str, body: dict[str, Any], sender: str
) -> httpx2.Response | _Failure:
    try:
        async with asyncio.timeout(client.timeout.read):
            response, complete = await _answer(client, url, body)
    except UNREACHABLE as error:
        return _Failure(f"{type(error).__name__} ({error})", away=True)
    except (httpx2.TimeoutException, TimeoutError):
        return _Failure(f"a time-out after {client.timeout.read:g} s", away=False)
    if response.is_success:
        if not complete:
            raise ValueError(
                f"{sender}: {url} answered with more than {MAX_ANSWER} bytes, which no scores take: does `url` name a "
                "reward server?"
            )
        return response
    words = f"{response.status_code}: {_sentence(response, client)}"
    if response.status_code < 500:
        raise ValueError(f"{sender}: {url} refuses the request with {words}")
    return _Failure(words, away=response.status_code in AWAY)


async def _answer(client: httpx2.AsyncClient, url: str, body: dict[str, Any]) -> tuple[httpx2.Response, bool]:
    """Status and content of an answer, and whether the content is complete: reading stops beyond `MAX_ANSWER`.

    The bytes are taken as they come: compressed ones could unpack to a thousand times their size.
    """
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    request = client.build_request("POST", url, content=json.dumps(body).encode(), headers=headers)
    answer = await client.send(request, stream=True)
    content = bytearray()
    try:
        async for part in answer.aiter_raw():
            content += part
            if len(content) > MAX_ANSWER:
                break
    finally:
        await answer.aclose()
    return httpx2.Response(answer.status_code, content=bytes(content[:MAX_ANSWER])), len(content) <= MAX_ANSWER


def json_of(response: httpx2.Response) -> Any:
    """The JSON of an answer; None if it has none."""
    try:
        return response.json()
    except (ValueError, RecursionError):
        return None


def _sentence(response: httpx2.Response, client: httpx2.AsyncClient) -> str:
    """The reason that the server gives in a refusal, without the token of the client."""
    answer = json_of(response)
    reason = answer.get("error") if isinstance(answer, dict) else None
    token = client.headers.get("Authorization", "").removeprefix("Bearer ")
    return quoted(reason if isinstance(reason, str) else response.text, token)[:500]


def quoted(text: str, token: str | None) -> str:
    """The words of a server for an error: a server may send back the token that it got."""
    return text.replace(token, "<token>") if token else text
