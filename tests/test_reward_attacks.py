"""What slow, broken and hostile clients do to a reward server, over real connections: each gets one sentence, or its
connection closed, and the server neither hangs nor logs a traceback nor shows its token.
"""

import asyncio
import json
import re
import socket
import struct
import threading
import time
import zlib
from types import SimpleNamespace

import httpx2
import pytest
import uvicorn

from flowrl_trainers.cli import serve_reward as command
from flowrl_trainers.rewards import FunctionReward, RemoteReward, bearer, connections
from flowrl_trainers.rewards.server import Limits

from .reward_servers import ROOT, asked, noise, png, scores_of, serving, start, stop, wait_for
from .runs import free_port

TOKEN = "a-token.of+24/characters"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
# A PNG with an empty colour profile behind its pixels, on which Pillow raises IndexError.
WITHOUT_PROFILE = png()[:-12] + b"\0\0\0\0iCCP" + struct.pack(">I", zlib.crc32(b"iCCP")) + png()[-12:]
PATIENCE = 30.0  # seconds after which a test gives up


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with a token in a process of its own; its log must be free of tracebacks and of the token."""
    folder, port = tmp_path_factory.mktemp("guarded"), free_port()
    (folder / "token").write_text(f"{TOKEN}\n")
    flags = ("--token_file", "token", "--max_upload_seconds", "1", "--max_bytes", "300000", "--device", "cpu")
    process = start(folder, "served.by_prompt", port, *flags, log=folder / "log")
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(process, address)
        yield SimpleNamespace(address=address, port=port, log=folder / "log")
        assert process.is_alive(), "the server did not live through the tests"
    finally:
        stop(process)
    log = (folder / "log").read_text()
    assert "Uvicorn running on" in log
    assert "Traceback" not in log
    # What libraries say while they are imported, before the server starts, is not the server's.
    _, started, said = log.partition("Started server process")
    assert started
    assert "rror" not in said.replace("uvicorn.error", "")
    assert TOKEN not in log


def connected(port: int, text: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    connection.sendall(text.encode())
    return connection


def dripped(connection: socket.socket) -> str:
    """Send a byte every 50 ms until the server closes the connection, and return what it said."""
    said, end = b"", time.monotonic() + PATIENCE
    connection.settimeout(0.05)
    while time.monotonic() < end:
        try:
            connection.sendall(b"x")
            part = connection.recv(4096)
            if not part:
                break
            said += part
        except TimeoutError:
            continue
        except ConnectionError:
            break
    else:
        raise AssertionError("the server did not close the connection")
    connection.close()
    return said.decode()


def works(guarded) -> bool:
    response = httpx2.post(f"{guarded.address}/score", json=asked(png()), headers=BEARER, timeout=PATIENCE)
    return response.json() == {"scores": [0.0]}


@pytest.mark.parametrize("authorization", [f"Authorization: Bearer {TOKEN}\r\n", ""])
def test_a_body_of_a_byte_now_and_then_is_refused_in_time(guarded, authorization):
    begun = time.monotonic()
    said = dripped(
        connected(guarded.port, f"POST /score HTTP/1.1\r\nHost: x\r\n{authorization}Content-Length: 9999\r\n\r\n")
    )
    assert time.monotonic() - begun < 10
    assert said.startswith("HTTP/1.1 408 ")
    assert "did not arrive within `max_upload_seconds` (1): send fewer pictures at a time" in said
    assert works(guarded)


@pytest.mark.parametrize("sent", ["GET /he", "", "GET /score HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n"])
def test_a_head_of_a_byte_now_and_then_and_an_answered_body_close_the_connection(monkeypatch, sent):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    with serving(FunctionReward(lambda images, prompts, **columns: [0.0])) as address:
        begun = time.monotonic()
        dripped(connected(int(address.rsplit(":", 1)[1]), sent))
        assert 0.4 < time.monotonic() - begun < 10


def test_a_silent_connection_is_closed(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    with serving(FunctionReward(lambda images, prompts, **columns: [0.0])) as address:
        assert connected(int(address.rsplit(":", 1)[1]), "").recv(1) == b""


def test_a_connection_in_use_outlives_the_time_of_a_head(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)

    def slow(images, prompts, **columns):
        time.sleep(0.6)
        return [1.0]

    with serving(FunctionReward(slow)) as address, httpx2.Client(timeout=PATIENCE) as client:
        for _ in range(2):
            assert client.post(f"{address}/score", json=asked(png())).json() == {"scores": [1.0]}


@pytest.mark.parametrize("authorization", [f"Authorization: Bearer {TOKEN}\r\n", ""])
def test_a_client_that_leaves_within_its_body_leaves_no_traceback(guarded, authorization):
    head = f"POST /score HTTP/1.1\r\nHost: x\r\n{authorization}Content-Length: 9999\r\n\r\n"
    connected(guarded.port, head + "half").close()
    assert works(guarded)
    assert "Traceback" not in guarded.log.read_text()


def nested(depth: int) -> bytes:
    body = json.dumps(asked(png(), columns={"answer": ["HERE"]}))
    return body.replace('"HERE"', "[" * depth + "]" * depth).encode()


def column(value: str) -> bytes:
    return json.dumps(asked(png(), columns={"answer": ["HERE"]})).replace('"HERE"', value).encode()


@pytest.mark.parametrize(("body", "sentence"), [
    (json.dumps(asked(png(), columns={"self": [1]})).encode(), "No column may be called 'self': rename it."),
    (json.dumps(asked(png(), columns={"images": [1]})).encode(), "No column may be called 'images': rename it."),
    (json.dumps(asked(png(), columns={"prompts": [1]})).encode(), "No column may be called 'prompts': rename it."),
    (column("NaN"), "The request has the number NaN, which JSON does not have: send null or a string."),
    (column("-Infinity"), "The request has the number -Infinity, which JSON does not have"),
    (column("1e400"), "The request has the number 1e400, beyond the range of a float."),
    (column("-" + "9" * 309), "The request has an integer of 309 digits, beyond the range of a float."),
    (column("9" * 100_000), "The request has an integer of 100000 digits, beyond the range of a float."),
    (nested(33), "The request has lists or objects nested deeper than 32: flatten the columns."),
    (nested(50_000), "The request has lists or objects nested deeper than 32: flatten the columns."),
    (column('{"a":' * 33 + "1" + "}" * 33), "The request has lists or objects nested deeper than 32"),
    (column(r'"\ud800"'), r"The text '\ud800' has half a surrogate pair, no character."),
    (column(r'{"\ud800": 1}'), r"The text '\ud800' has half a surrogate pair, no character."),
    (json.dumps(asked(WITHOUT_PROFILE)).encode(), "Picture 0 is a broken PNG"),
    (json.dumps(asked(png(), prompts=["\ud800"])).encode(), r"The text '\ud800' has half a surrogate pair"),
])  # fmt: skip
def test_what_no_reward_could_read_is_refused_in_a_sentence(guarded, body, sentence):
    response = httpx2.post(f"{guarded.address}/score", content=body, headers=BEARER, timeout=PATIENCE)
    assert response.status_code == 422
    assert sentence in response.json()["error"]
    assert works(guarded)


@pytest.mark.parametrize("value", ["[" * 32 + "]" * 32, "9" * 308, "1e308", r'"\ud83d\ude00"'])
def test_what_a_reward_can_read_passes(guarded, value):
    response = httpx2.post(f"{guarded.address}/score", content=column(value), headers=BEARER, timeout=PATIENCE)
    assert response.json() == {"scores": [0.0]}


@pytest.mark.parametrize("authorization", [
    None, "", "Bearer", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Bearer {TOKEN.upper()}", TOKEN, "Bearer \xff",
])  # fmt: skip
@pytest.mark.parametrize("content", [b"no JSON", b" " * 5_000_000])
def test_a_request_without_the_token_is_refused_unread(guarded, authorization, content):
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    for response in (
        httpx2.get(f"{guarded.address}/health", headers=headers),
        httpx2.post(f"{guarded.address}/score", content=content, headers=headers, timeout=PATIENCE),
    ):
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert "does not carry the token of this server" in response.json()["error"]


def test_the_token_opens_the_server(guarded):
    assert httpx2.get(f"{guarded.address}/health", headers=BEARER).json() == {"name": "by_prompt", "ready": True}
    assert scores_of(RemoteReward(guarded.address, token=TOKEN), noise(1)).isfinite().all()
    with pytest.raises(
        ValueError, match=f"{guarded.address}/score refuses the request with 401: .*token of this server"
    ):
        scores_of(RemoteReward(guarded.address, token="another-token-of-its-own"), noise(1))


def test_a_reward_that_hangs_holds_no_request_longer_than_max_seconds():
    """The first hangs in the reward, the second in the queue; when the reward returns, the third is served."""
    go = threading.Event()

    def hangs(images, prompts, **columns):
        go.wait(PATIENCE)
        return [1.0]

    with serving(FunctionReward(hangs), Limits(max_upload_seconds=1, max_seconds=1)) as address:
        answers = [httpx2.post(f"{address}/score", json=asked(png()), timeout=PATIENCE) for _ in range(2)]
        go.set()
        last = httpx2.post(f"{address}/score", json=asked(png()), timeout=PATIENCE)
    assert [answer.status_code for answer in answers] == [500, 503]
    assert "Reward 'hangs' has not returned within `max_seconds` (1)" in answers[0].json()["error"]
    assert "The request waited for its turn until `max_seconds` (1) were over" in answers[1].json()["error"]
    assert last.json() == {"scores": [1.0]}


@pytest.mark.parametrize("token", ["", "short", "with a blank " * 3, "x" * 1025, "ümlaut-" * 5])
def test_a_weak_token_is_refused_and_not_quoted(tmp_path, monkeypatch, token):
    (tmp_path / "token").write_text(token, encoding="utf-8")
    with pytest.raises(ValueError, match=r"The text of `token_file` .* must have 16 to 1024 characters") as refusal:
        command.serve_reward(["checker", "--token_file", str(tmp_path / "token")])
    assert not token or token not in str(refusal.value)
    monkeypatch.setenv(bearer.TOKEN_VARIABLE, token)
    with pytest.raises(ValueError, match="The environment variable FLOWRL_REWARD_TOKEN must have 16 to 1024"):
        command.serve_reward(["checker"])
    with pytest.raises(ValueError, match="`token` must have 16 to 1024 characters"):
        RemoteReward("http://127.0.0.1:1", token=token)


@pytest.mark.parametrize("source", ["file", "environment"])
def test_the_command_takes_the_token_from_a_file_or_the_environment(tmp_path, monkeypatch, capsys, source):
    """The file counts before the environment; the warning of an address that others reach does not show the token."""
    (tmp_path / "token").write_text(f" {TOKEN}\n")
    monkeypatch.setenv(bearer.TOKEN_VARIABLE, "another-token-of-its-own" if source == "file" else TOKEN)
    flags = ["--token_file", str(tmp_path / "token")] if source == "file" else []
    apps = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **settings: apps.append(app))
    command.serve_reward(["checker", "--host", "0.0.0.0", *flags])

    async def statuses() -> list[int]:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(apps[0]), base_url="http://x") as client:
            return [(await client.get("/health", headers=h)).status_code for h in ({}, BEARER)]

    assert asyncio.run(statuses()) == [401, 200]
    warning = capsys.readouterr().err
    assert "whoever listens on the network reads requests and token, as nothing is encrypted" in warning
    assert TOKEN not in warning


def test_the_tests_that_the_docs_name_exist():
    """Each row of the tables of attacks names a test in the file that its letter stands for."""
    names = {
        "A": "test_reward_attacks",
        "S": "test_reward_server",
        "F": "test_remote_failures",
        "R": "test_remote_rewards",
    }
    section = (ROOT / "docs" / "remote_rewards.md").read_text().split("## Attacks")[1].split("What does not hold")[0]
    rows = re.findall(r"^\|.*\| ([ASFR]) `(test_\w+)`(?:, `(test_\w+)`)? \|$", section, flags=re.M)
    assert len(rows) == section.count("\n| ") - 2  # two rows are heads
    for letter, *tests in rows:
        text = (ROOT / "tests" / f"{names[letter]}.py").read_text()
        assert all(f"def {test}(" in text for test in tests if test)
