"""How well a picture shows the text that its prompt asks for, read by RapidOCR."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from .base import Reward
from .quoted_texts import quoted_texts
from .text_matching import folded, reading_order, text_score, unasked_words


class OCRReward(Reward):
    """The share of the asked text that the picture shows, from 0 to 1. Not differentiable.

    score = max(0, 1 - edit distance / length)

    Case, spaces and quotation marks do not count. The distance is that of the neighbouring texts which come closest,
    so a picture may show other text too; the distances and the lengths of several asked texts are summed. A picture
    without text scores 0. The texts are those of the column `text`, a string or a list of them per picture, where the
    data set has one with a value; else those between quotation marks in the prompt. An empty string or list, and a
    prompt without quotation marks, ask for no text: None.

    Fooled by the text on an empty page, by the text written many times, which `ocr_strict` sees, and by letters that
    a network can read and people cannot. Evaluations keep what was read in `samples/` as `read_by_ocr`;
    `ocr_unasked_words` is the number of words per picture that nobody asked for.

    The models are PP-OCRv6 (small), which ship with the package rapidocr; they read Chinese, Japanese and Latin
    letters. A call is asynchronous: pictures are read in threads, one each, while a trainer decodes the next ones.

    Args:
        threads: How many pictures are read at a time, each on one core.

    Raises:
        ValueError: If `threads` is out of its range.
        RuntimeError: If rapidocr or onnxruntime is not installed.
    """

    name = "ocr"
    differentiable = False
    strict = False

    def __init__(self, threads: int = 4) -> None:
        if threads < 1:
            raise ValueError(f"`threads` ({threads}) must be at least 1.")
        self.threads = threads
        self._reader = _make_reader(self.name)

    def __call__(
        self,
        /,
        images: Tensor,
        prompts: list[str],
        text: Sequence[str | list[str] | None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> Awaitable[list[float | None]]:
        given = [None] * len(prompts) if text is None else text
        asked = [self._asked(value, prompt) for value, prompt in zip(given, prompts, strict=True)]
        # The coroutine runs later: a copy in it would wait for all that the trainer has asked of the device by then.
        return self._scores(images.cpu(), asked, log_metric, log_extra)

    def check_rows(self, rows: Dataset) -> None:
        if "text" in rows.column_names:
            for value, prompt in zip(rows["text"], rows["prompt"], strict=True):
                self._asked(value, prompt)

    async def _scores(
        self,
        images: Tensor,
        asked: list[list[str]],
        log_metric: Callable[[str, float], None] | None,
        log_extra: Callable[[str, list[Any]], None] | None,
    ) -> list[float | None]:
        loop = asyncio.get_running_loop()
        # Threads of one call: those of a pool that outlives it would be missing in a forked process.
        with ThreadPoolExecutor(self.threads) as pool:
            reading = [
                loop.run_in_executor(pool, self.read, image if texts else None)
                for image, texts in zip(images, asked, strict=True)
            ]
            read = await asyncio.gather(*reading)
        if log_extra is not None:
            log_extra(f"read_by_{self.name}", read)
        words = [unasked_words(a, r) for a, r in zip(asked, read, strict=True) if a and r is not None]
        if log_metric is not None and words:
            log_metric(f"{self.name}_unasked_words", sum(words) / len(words))
        return [self._score(texts, seen) for texts, seen in zip(asked, read, strict=True)]

    def _asked(self, value: Any, prompt: str) -> list[str]:
        texts = quoted_texts(prompt) if value is None else [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"Reward {self.name!r} found {value!r} in the column 'text': make it a string, a list of strings or "
                "None."
            )
        return [text for text in texts if folded(text)]

    def _score(self, asked: list[str], read: list[str] | None) -> float | None:
        if not asked:
            return None
        return math.nan if read is None else text_score(asked, read, self.strict)

    def read(self, image: Tensor | None) -> list[str] | None:
        """The texts of a picture (3, H, W) in reading order; None for no picture and for one that is not finite."""
        if image is None or not image.isfinite().all():
            return None
        pixels = (image.permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8)
        found = self._reader(np.ascontiguousarray(pixels.flip(-1).numpy()))  # blue comes first, as in OpenCV
        return [] if found.txts is None else [found.txts[i] for i in reading_order(found.boxes)]


class StrictOCRReward(OCRReward):
    """As `OCRReward`, but each letter of text that nobody asked for counts as an error too.

    score = max(0, 1 - (edit distance + unasked letters) / length)

    So the text written twice scores 0, and a signature in the corner costs as many letters as it has. Fooled by the
    text on an empty page.
    """

    name = "ocr_strict"
    strict = True


def _make_reader(name: str) -> Any:
    try:
        import onnxruntime  # noqa: F401  rapidocr itself would miss it only at the first picture
        from rapidocr import RapidOCR
    except ModuleNotFoundError as error:
        raise RuntimeError(f"Reward {name!r} needs {error.name}: install the package with its extra `ocr`.") from error
    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    # rapidocr would warn of each picture without text.
    return RapidOCR(params={"Global.log_level": "critical", **threads})
