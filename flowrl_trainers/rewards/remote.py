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
# The answers of a proxy while the server behind it restarts, of a server with too many connections, and of a service
# that is asked too often.
AWAY = (429, 502, 503, 504)
NOT_FINITE = ("nan", "inf", "-inf")  # strings, because JSON has no such numbers


class RemoteReward(Reward):
    """The scores of a server such as `flowrl serve_reward NAME`. Not differentiable.

    A call is asynchronous, so a trainer waits for several servers at the same time. Pictures travel as PNG of 8 bits
    per channel: values in [0, 1] are rounded to multiples of 1/255, an error of at most 1/510. A picture with a value
    that is not finite is not sent; its score is NaN.

    If the server cannot be reached or dies during a request, the reward waits for it; if the server answers late or
    with an error, the reward repeats the request. The delays grow from half a second to 15 seconds.

    Of several servers, each computes one request at a time, and the next request goes to the first that is free. A
    request that fails on one is repeated on the next at once, and waits only after all have failed; a server that
    failed is asked last for 15 seconds. So the loss of one costs no step, and one that comes back is found.

    A call raises `ValueError` if the server refuses the request (a 4xx but 429), or if its answer has no scores or
    more than a megabyte, and `RuntimeError` when `retries` or `patience` are used up.

    Args:
        url: The server's address, such as "http://127.0.0.1:8000", or a list of the addresses of servers that give the
            same scores; pictures go to `url/score`.
        name: The name of the reward in logs.
        columns: The columns of the data set to send beside pictures and prompts; JSON must be able to carry their
            values.
        batch_size: Pictures per request; the requests to one server follow one another.
        timeout: Seconds that one try of a request may take, from connecting to the last byte of the answer.
        retries: How often to repeat a request that timed out or got a 5xx answer, on each server.
        patience: Seconds, from a request's first failure on, to wait for servers that cannot be reached or answer
            429, 502, 503 or 504.
        token: The bearer token of the servers, from a file or an environment variable; None for servers that ask for
            none. No log, error or file of a run shows it.

    Raises:
        ValueError: If an argument is out of its range.
    """

    differentiable = False

    def __init__(
        self,
        url: str | Sequence[str],
        name: str = "remote",
        columns: Sequence[str] = (),
        batch_size: int = 16,
        timeout: float = 60.0,
        retries: int = 3,
        patience: float = 600.0,
        token: str | None = None,
    ) -> None:
        urls = [url] if isinstance(url, str) or not isinstance(url, Sequence) else list(url)
        if not urls or len(set(urls)) < len(urls):
            raise ValueError(f"`url` ({url!r}) must hold at least one address, and none of them twice.")
        for address in urls:
            check_address(address)
        if isinstance(columns, str):
            raise ValueError(f"`columns` ({columns!r}) is a string: pass the list [{columns!r}].")
        lower_bounds = (("batch_size", batch_size, 1), ("retries", retries, 0), ("patience", patience, 0))
        for argument, value, least in lower_bounds:
            if not value >= least:
                raise ValueError(f"`{argument}` ({value}) must be at least {least}.")
        if not timeout > 0:
            raise ValueError(f"`timeout` ({timeout}) must be above 0.")
        self.servers, self.name = Servers([f"{address.rstrip('/')}/score" for address in urls]), name
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

    def needed_columns(self) -> list[str]:
        """Those that it sends."""
        return list(self.columns)

    async def _ask(self, images: Tensor, prompts: list[str], columns: dict[str, list[Any]]) -> list[float | None]:
        scores: list[float | None] = [math.nan] * len(images)
        finite = images.isfinite().flatten(1).all(dim=1).nonzero().flatten().tolist()
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        batches = iter([finite[start : start + self.batch_size] for start in range(0, len(finite), self.batch_size)])

        async def work(client: httpx2.AsyncClient, servers: Servers) -> None:
            for rows in batches:  # those that no other worker has taken
                body = {
                    "images": await asyncio.to_thread(_encoded, images[rows]),
                    "prompts": [prompts[i] for i in rows],
                    "columns": {name: [values[i] for i in rows] for name, values in columns.items()},
                }
                response = await post(client, servers, body, f"Reward {self.name!r}", self.retries, self.patience)
                for i, score in zip(rows, self._scores(response, len(rows)), strict=True):
                    scores[i] = score

        # A client belongs to one event loop, and every call has a new loop.
        async with httpx2.AsyncClient(timeout=limits(self.timeout), headers=headers) as client:
            workers = [asyncio.create_task(work(client, s)) for s in self.servers.each_first()]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
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
                f"Reward {self.name!r}: {response.url} did not answer with one score for each of {count} pictures but "
                f"{quoted(response.text, self._token)[:200]!r}: does `url` name a reward server?"
            )
        return [None if s is None else float(s) for s in scores]


class Servers:
    """The addresses of servers that give the same answers, and when each of them failed last.

    Args:
        urls: The addresses, in the order in which they are asked.
        failed_at: The times of the last failures, by `time.monotonic`.
    """

    def __init__(self, urls: Sequence[str], failed_at: dict[str, float] | None = None) -> None:
        self.urls, self.failed_at = list(urls), {} if failed_at is None else failed_at

    def each_first(self) -> list["Servers"]:
        """For every server, all of them in an order that begins with it; what fails for one order fails for all."""
        return [Servers(self.urls[i:] + self.urls[:i], self.failed_at) for i in range(len(self.urls))]

    def in_turn(self) -> list[str]:
        """The addresses, those that failed a short while ago last."""
        long_ago = time.monotonic() - LONGEST_DELAY
        return sorted(self.urls, key=lambda url: self.failed_at.get(url, -math.inf) > long_ago)


def limits(timeout: float) -> httpx2.Timeout:
    """Of one try, in seconds: half of the time at most to connect, so that a server which cannot be reached differs
    from one that is slow.
    """
    return httpx2.Timeout(timeout, connect=min(CONNECT_TIMEOUT, timeout / 2))


def check_address(url: str) -> None:
    """Refuse what is no address, and one with a password, which every error would show."""
    if "@" in str(url).partition("://")[2]:  # also where what is before it does not look like a password to `URL`
        raise ValueError("`url` has a user name or a password, which errors would show: pass `token` instead.")
    try:
        address = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise ValueError(f"`url` ({url!r}) is no address of a server: {error}.") from error
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
    client: httpx2.AsyncClient,
    servers: str | Servers,
    body: dict[str, Any],
    sender: str,
    retries: int = 3,
    patience: float = 600.0,
) -> httpx2.Response:
    """Post a JSON body and return the successful response, after the retries and delays that `RemoteReward` describes.

    Args:
        client: The client that sends the request; its `timeout.read` bounds a whole try, and its headers may hold a
            bearer token.
        servers: The address, or several.
        body: The body of the request.
        sender: The subject of log lines and errors.
        retries: How often to repeat after time-outs and 5xx answers, on each server.
        patience: Seconds to wait for servers that cannot be reached or answer 429, 502, 503 or 504.

    Raises:
        ValueError: If the answer is a 3xx or another 4xx, and the error quotes the server; or if it is larger than
            `MAX_ANSWER`.
        RuntimeError: If `retries` or `patience` are used up.
    """
    servers = Servers([servers]) if isinstance(servers, str) else servers
    first_failure, failed, delay = math.inf, 0, FIRST_DELAY
    while True:
        for url in (urls := servers.in_turn()):
            outcome = await _attempt(client, url, body, sender)
            if not isinstance(outcome, _Failure):
                return outcome
            failure = outcome
            servers.failed_at[url] = time.monotonic()
            first_failure = min(first_failure, time.monotonic())
            failed += not failure.away
            if url != urls[-1]:
                logger.warning("%s: %s failed with %s; asking another server.", sender, url, failure.words)
        if failed > retries * len(urls):
            raise RuntimeError(
                f"{sender}: {url} failed {failed} times, more than `retries` ({retries}) allows, at last with "
                f"{failure.words}"
            )
        if failure.away and time.monotonic() - first_failure >= patience:
            raise RuntimeError(
                f"{sender}: {url} was away for longer than `patience` ({patience:g} s), at last with {failure.words}: "
                "start the server and resume from the last checkpoint."
            )
        logger.warning("%s: %s failed with %s; asking again in %g s.", sender, url, failure.words, delay)
        await asyncio.sleep(delay)
        delay = min(2 * delay, LONGEST_DELAY)


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
    if response.status_code < 500 and response.status_code not in AWAY:
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
    complete = len(content) <= MAX_ANSWER
    return httpx2.Response(answer.status_code, content=bytes(content[:MAX_ANSWER]), request=request), complete


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
