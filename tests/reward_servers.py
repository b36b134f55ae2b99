"""Servers of rewards for tests: one in a process of its own, one on a uvicorn of this process, and one that misbehaves
as planned.
"""

import base64
import io
import json
import os
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import httpx2
import numpy as np
import torch
import uvicorn
from PIL import Image as PILImage

from flowrl_trainers.cli.serve_reward import serve_reward
from flowrl_trainers.rewards.connections import TimedConnection
from flowrl_trainers.rewards.server import Limits, reward_app
from flowrl_trainers.sampling.prompt_groups import Example, ImageKey
from flowrl_trainers.sampling.scoring import call_rewards

from . import forked

ROOT = Path(__file__).parent.parent


# What the server's own process imports. The first prompt says what is wanted.
SERVED = """
def redness(images, prompts, **columns):
    red, green, blue = images.unbind(dim=1)
    return (red - (green + blue) / 2).mean(dim=(1, 2))

def by_prompt(images, prompts, trainer_state, log_metric, log_extra, **columns):
    async def later():
        return [4.0] * len(images)

    log_metric("calls", 1.0)
    match prompts[0]:
        case "raise":
            raise ArithmeticError("the judge is tired")
        case "half a pair":
            raise ArithmeticError("\\ud800")
        case "exit":
            raise SystemExit(3)
        case "short":
            return [1.0] * (len(images) - 1)
        case "text":
            return "1" * len(images)
        case "mapping":
            return dict.fromkeys(range(len(images)), 1.0)
        case "rows":
            return images.new_ones(len(images), 1)
        case "none":
            return [None if prompt == "none" else 1.0 for prompt in prompts]
        case "not finite":
            return [float("nan"), float("-inf")]
        case "column":
            return [float(answer) for answer in columns["answer"]]
        case "later":
            return later()
    return redness(images, prompts)
"""


def start(folder: Path, name: str, port: int, *flags: str, log: Path = Path(os.devnull)) -> BaseProcess:
    """A server in a process of its own, which ends with the tests; its output goes to `log`."""
    (folder / "served.py").write_text(SERVED)
    process = forked.FORKS.Process(target=_serve, args=(folder, log, name, "--port", str(port), *flags), daemon=True)
    process.start()
    return process


def _serve(folder: Path, log: Path, *arguments: str) -> None:
    with log.open("w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    serve_reward(list(arguments))


def wait_for(process: BaseProcess, address: str) -> None:
    for _ in range(2400):
        assert process.is_alive(), "the server ended by itself"
        try:
            httpx2.get(f"{address}/health")
            return
        except httpx2.TransportError:
            time.sleep(0.05)
    raise AssertionError("the server did not come up")


def stop(process: BaseProcess) -> None:
    process.kill()
    process.join()


@contextmanager
def serving(reward, limits: Limits = Limits(), port: int = 0):  # noqa: B008
    """The address of a reward on a uvicorn of this process; port 0 is any free one."""
    app = reward_app(reward, limits, torch.device("cpu"))
    uvicorn_server = uvicorn.Server(
        uvicorn.Config(app, port=port, log_level="error", http=TimedConnection, ws="none", timeout_keep_alive=60)
    )
    thread = threading.Thread(target=uvicorn_server.run, daemon=True)
    thread.start()
    while not uvicorn_server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{uvicorn_server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        uvicorn_server.should_exit = True
        thread.join()


@contextmanager
def fake(*plan):
    """A server that follows a plan, a word per request, and afterwards answers: `address`, and what it got, `bodies`,
    `times`, `headers`.

    A number is a status, "slow" answers too late, "drop" closes the connection, a function writes to the connection
    what it likes and sees in `headers` what it got, anything else is the body of an answer of status 200.
    """
    got, over = SimpleNamespace(bodies=[], times=[], headers=[]), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.bodies.append(body)
            got.times.append(time.monotonic())
            got.headers.append(self.headers)
            step = plan[len(got.bodies) - 1] if len(got.bodies) <= len(plan) else None
            if step == "slow":
                over.wait(3)
            if callable(step):
                with suppress(OSError):  # the client may have gone
                    step(self.wfile, self.headers)
            if step in ("slow", "drop") or callable(step):
                self.close_connection = True
                return
            if step is None:
                step = json.dumps({"scores": [1.0] * len(body.get("images", []))})
            content = step.encode() if isinstance(step, str) else json.dumps({"error": "out of order"}).encode()
            self.send_response(200 if isinstance(step, str) else step)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    got.address = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield got
    finally:
        over.set()
        http.shutdown()
        http.server_close()
        thread.join()


def noise(count: int, size: int = 16) -> torch.Tensor:
    """Noise in multiples of 1/255, which survives a PNG."""
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(5)) / 255


def examples(prompts: list[str], **columns) -> list[Example]:
    return [
        Example(ImageKey(i, 0, 0), p, {name: values[i] for name, values in columns.items()})
        for i, p in enumerate(prompts)
    ]


def scores_of(reward, images: torch.Tensor, prompts: list[str] | None = None, **columns) -> torch.Tensor:
    """As a trainer asks for them."""
    asked = examples(prompts or ["a circle"] * len(images), **columns)
    context = {"log_metric": lambda name, value: None, "log_extra": lambda name, values: None}
    return call_rewards([reward], images, asked, trainer_state=None, **context)[:, 0]


def decoded(png: str) -> torch.Tensor:
    return torch.from_numpy(np.array(PILImage.open(io.BytesIO(base64.b64decode(png))))).permute(2, 0, 1) / 255


def png(size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    PILImage.new(mode, size).save(file, "PNG")
    return file.getvalue()


def asked(*images: bytes | str, **changes) -> dict:
    encoded = [i if isinstance(i, str) else base64.b64encode(i).decode() for i in images]
    return {"images": encoded, "prompts": ["a circle"] * len(images)} | changes
