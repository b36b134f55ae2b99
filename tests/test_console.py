"""What a run says on a terminal and in a file, and what it leaves in `metrics.jsonl`."""

import fcntl
import io
import json
import logging
import os
import pty
import re
import struct
import termios
import threading
import warnings

import pytest
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState
from trl import RichProgressCallback

from flowrl_trainers.rewards import differentiable
from flowrl_trainers.sampling.progress import WIDTH, MessageHandler
from flowrl_trainers.trainers.console import Console, table

from .helpers import CAPTIONS, adjoint_matching, make_trainer

HELD_OUT = Dataset.from_dict({"prompt": CAPTIONS})
LONG = "word " * 40


@differentiable
def loud(images, prompts, trainer_state, **columns):
    """Warns in the middle of each rollout and evaluation."""
    if trainer_state.global_step:
        logging.getLogger("flowrl_trainers").warning("careful, %s", LONG)
        warnings.warn(f"odd at {trainer_state.global_step}", stacklevel=1)
    return images.mean(dim=(1, 2, 3))


def a_run(folder, stdout, stderr, resume=False, **settings) -> list[dict]:
    """What a script shows that configures no logging; returns the whole logs."""
    root = logging.getLogger()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(root, "handlers", [])
        patch.setattr("sys.stdout", stdout)
        patch.setattr("sys.stderr", stderr)
        t = make_trainer(
            "AdjointMatchingTrainer", folder, reward=loud, eval_dataset=HELD_OUT, disable_tqdm=False, max_steps=3,
            eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, **settings,
        )  # fmt: skip
        t.train(resume_from_checkpoint=resume)
        assert root.handlers == []
    return t.state.log_history


@pytest.fixture(scope="module")
def in_a_file(tmp_path_factory):
    """Standard output and error of a run into files, its logs, and its folder."""
    folder, stdout, stderr = tmp_path_factory.mktemp("file"), io.StringIO(), io.StringIO()
    logs = a_run(folder, stdout, stderr)
    return stdout.getvalue(), stderr.getvalue(), logs, folder


@pytest.fixture(scope="module")
def on_a_terminal(tmp_path_factory):
    """All that a run writes to a pseudo-terminal of 150 columns."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    written: list[bytes] = []

    def read():
        while not (written and written[-1].endswith(b"\x04")):
            written.append(os.read(main, 4096))

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(side, "w") as terminal:
        a_run(tmp_path_factory.mktemp("terminal"), terminal, terminal)
        terminal.write("\x04")
        terminal.flush()
        reader.join()
    os.close(main)
    return b"".join(written).decode()[:-1]


def screen(text: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[\d;]*\w|\r|\n|[^\x1b\r\n]+", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part.startswith("\x1b"):
            row -= part == "\x1b[A"
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


TABLE = re.compile(
    r"Held-out prompts after 2 updates +base +tuned +change\n"
    r"reward/loud +\d\.\d{4} +\d\.\d{4} +[+-]\d\.\d{4}\n(?:\w+ [ \d.+-]+\n)*velocity_distance +\d\.\d{4}\b"
)


def test_a_terminal_has_one_live_line_that_nothing_breaks(on_a_terminal):
    frames = re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;]*\w", "", on_a_terminal))
    assert max(map(len, frames)) <= WIDTH
    assert not any(frame.startswith("{") for frame in frames)
    seen = [frame for frame in frames if frame.startswith("3/3 ")]
    assert re.search(r"3/3 █+ 00:00 left · loud 0\.\d+, held-out 0\.\d+ · [\d.]+ images/s · \w+ [\d.]+ s", seen[-1])
    assert any(frame.startswith("Drawing with the tuned model: 0 of 1") for frame in frames)
    shown = screen(on_a_terminal)
    text = "\n".join(shown)
    assert TABLE.search(text)
    assert "3 updates in 00:0" in text
    assert "left" not in text  # the live line is gone
    assert "Drawing" not in text
    warned = [line for line in shown if "careful" in line]
    assert len(warned) >= 3
    assert all(line.startswith("Warning: careful, word") for line in warned)
    assert "\x1b[1;33mWarning: careful" in on_a_terminal
    assert "UserWarning: odd at 2" in text


def test_a_file_has_a_short_line_per_log(in_a_file):
    out, err, _, _ = in_a_file
    lines = out.splitlines()
    assert max(map(len, [*lines, *err.splitlines()])) <= WIDTH
    assert "\x1b" not in out + err
    assert "\r" not in out + err
    assert [line[:4] for line in lines if " left · loud " in line] == ["1/3 ", "2/3 ", "3/3 "]
    assert "held-out" not in lines[0]
    assert "held-out" in next(line for line in lines if line.startswith("3/3"))
    assert TABLE.search(out)
    assert not any(line.startswith("{") for line in lines)
    assert "Warning: careful, word" in err


def test_the_whole_log_is_in_a_file_and_not_repeated_by_a_resumed_run(in_a_file):
    _, _, logs, folder = in_a_file
    path = folder / "metrics.jsonl"

    def rows():
        return [json.loads(line) for line in path.read_text().splitlines()]

    assert rows() == logs
    assert {"loss", "reward/loud", "seconds/rollout", "step"} <= set(rows()[0])
    again = a_run(folder, io.StringIO(), io.StringIO(), resume=str(folder / "checkpoint-2"))
    assert rows() == again
    assert [row["step"] for row in rows() if "loss" in row] == [1, 2, 3]


# ---- without a run --------------------------------------------------------------------------------------------------


def said(capsys, folder, main: bool = True, **settings) -> str:
    """What the console prints of one log."""
    t = make_trainer("AdjointMatchingTrainer", folder, **settings)
    state = TrainerState(global_step=1, max_steps=4, is_world_process_zero=main)
    (console,) = (c for c in t.callback_handler.callbacks if isinstance(c, Console))
    capsys.readouterr()
    console.on_log(t.args, state, TrainerControl(), {"loss": 0.123456, "reward/redness": 0.5, "adjoint_rms": 2.0})
    return capsys.readouterr().out


def test_log_level_says_how_much_the_console_gets(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.utils.logging.set_verbosity", lambda level: None)  # of the whole process
    assert "adjoint_rms" not in said(capsys, tmp_path)
    assert "'adjoint_rms': '2'" in said(capsys, tmp_path, log_level="debug")
    assert said(capsys, tmp_path, log_level="error") == ""
    assert said(capsys, tmp_path, main=False) == ""


@pytest.mark.parametrize("given", [ProgressCallback, PrinterCallback(), RichProgressCallback])
@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_a_progress_callback_of_the_user_takes_the_place_of_ours(tmp_path, tiny_pipeline, given, disable_tqdm):
    from flowrl_trainers import ACFlowConfig, ACFlowTrainer

    config = ACFlowConfig(output_dir=str(tmp_path), disable_tqdm=disable_tqdm, use_cpu=True, max_steps=1)
    t = ACFlowTrainer(tiny_pipeline, "jpeg_compressibility", config, CAPTIONS, callbacks=[given])
    kinds = (ProgressCallback, PrinterCallback, RichProgressCallback, Console)
    kept = [c for c in t.callback_handler.callbacks if isinstance(c, kinds)]
    assert [type(c) for c in kept] == [given if isinstance(given, type) else type(given)]


def test_the_line_leaves_out_what_it_has_no_room_for(tmp_path):
    t = make_trainer("AdjointMatchingTrainer", tmp_path)
    logs = {f"reward/{'long name ' * 9}{n}": 1 / 3 for n in range(3)} | {"seconds/short": 1.0, "seconds/longer": 2.0}
    line = t.console.line(TrainerState(max_steps=1), logs, WIDTH)
    assert len(line) <= WIDTH
    assert re.fullmatch(r"00:00 left · (long name ){6} 0.3333", line)
    few = t.console.line(TrainerState(max_steps=1), {"seconds/short": 1.0, "seconds/longer": 2.0}, WIDTH)
    assert few.endswith("longer 2 s · short 1 s")


def test_a_table_has_a_line_for_every_sampler_and_no_number_twice():
    rows = {
        "base": {"reward/a": 0.5, "reward/checker": 0.25, "checker_accuracy": 0.25},
        "tuned": {"reward/a": 21000.0, "reward/checker": 0.5, "checker_accuracy": 0.5, "velocity_distance": 0.1},
        "base_ode": {"reward/a": 0.5},
        "tuned_ode": {"reward/a": 0.25},
    }
    assert table(rows, 1).splitlines() == [
        "Held-out prompts after 1 update    base    tuned    change",
        "reward/a                         0.5000  2.1e+04  +2.1e+04",
        "checker_accuracy                 0.2500   0.5000   +0.2500",
        "velocity_distance                         0.1000          ",
        "ode reward/a                     0.5000   0.2500   -0.2500",
    ]


def test_an_error_leaves_terminal_and_handlers_as_they_were(tmp_path, tiny_pipeline, monkeypatch):
    @differentiable
    def fails(images, prompts, trainer_state, **columns):
        if trainer_state.global_step:
            raise RuntimeError("broken")
        return images.mean(dim=(1, 2, 3))

    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    t = make_trainer("AdjointMatchingTrainer", tmp_path, pipeline=tiny_pipeline, reward=fails)
    with pytest.raises(RuntimeError, match="broken"):
        t.train()
    assert logging.getLogger().handlers == []


def test_a_message_is_whole_and_its_level_first(monkeypatch, capsys):
    logger = logging.getLogger("a command")
    monkeypatch.setattr(logger, "handlers", [MessageHandler()])
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.info("Said.")
    logger.error("%send", LONG)
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "Said."
    assert " ".join(line.strip() for line in rest) == f"Error: {LONG}end"


def test_a_log_that_cannot_be_written_is_no_end_of_the_run(tmp_path, caplog):
    t = make_trainer("AdjointMatchingTrainer", tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    t.log({"loss": 1.0})
    assert "metrics.jsonl lacks a log, as it cannot be written: Is a directory." in caplog.text


def test_an_evaluation_before_training_stays_in_the_log(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline, max_steps=1)
    t.evaluate(["a red circle"])
    t.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "eval_reward/redness" in rows[0]
    assert any("loss" in row for row in rows[1:])


def test_what_an_evaluation_wrote_is_no_earlier_run(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path / "run", tiny_pipeline, max_steps=1, overwrite_output_dir=True, log_images=1)
    t.evaluate(["a red circle"])
    t.train()
    t.save_model()
    assert not list(tmp_path.glob("run.before-*"))
    assert list((tmp_path / "run" / "samples").glob("step-*.png"))
    assert (tmp_path / "run" / "README.md").is_file()
