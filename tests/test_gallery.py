"""The captions of a sheet of pictures: readable in any script, within their tiles, and of bounded height."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.ttLib import TTFont
from PIL import features

from flowrl_trainers.run_folder import before_after, captions
from flowrl_trainers.run_folder.captions import MOST_LINES, Caption
from flowrl_trainers.run_folder.gallery import GAP, LINE

PROMPTS = {
    "English": "a small red circle above a blue square",
    "Chinese": "一只红色的猫坐在蓝色的椅子上，看着窗外的雨，旁边有一本打开的书。",  # noqa: RUF001
    "Japanese": "青い椅子に座っている赤い猫、窓の外の雨を見ている。「静かな午後」",
    "Korean": "파란 의자에 앉아 창밖의 비를 바라보는 빨간 고양이",
    "Arabic": "قطة حمراء تجلس على كرسي أزرق وتنظر إلى المطر خارج النافذة",
    "one word": "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "empty": "",
    "lines": "a cat\n\non a\tmat\n",
    "emoji": "a 🚀 over 😀 and ❤️ 👩‍🚀",
    "long": "a very long prompt " * 106,
    "long word": "x" * 2000,
    "long Chinese": "猫" * 2000,
    "control": "a\x00cat \x1b[31m\udc80\u202e of \ufdd0",
}
WIDTH = 160


@pytest.fixture(autouse=True)
def _chosen_afresh():
    yield captions._typeface_for.cache_clear()
    captions._typeface_for.cache_clear()


@pytest.fixture(params=["bundled", "installed"])
def fonts(request, monkeypatch):
    """The fonts that come with Pillow and matplotlib, and whatever this machine has."""
    bundled = captions._installed()[:1]
    if request.param == "bundled":
        monkeypatch.setattr(captions, "_installed", lambda: bundled)
    return captions._installed()


def letters_of(file: Path | io.BytesIO) -> set[str]:
    return {chr(code) for code in TTFont(file, fontNumber=0).getBestCmap()}


def letters_of_the_font_of(caption: Caption) -> set[str]:
    font = caption.font
    return letters_of(io.BytesIO(font.font_bytes) if isinstance(font.path, io.BytesIO) else Path(font.path))


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_a_caption_has_only_letters_of_its_font_in_few_lines_within_its_width(fonts, prompt):
    caption = Caption.of(prompt, WIDTH)
    assert set("".join(caption.lines)) <= letters_of_the_font_of(caption) | set("\u200c\u200d")
    assert "\x00" not in "".join(caption.lines)
    assert 1 <= len(caption.lines) <= MOST_LINES
    assert max(caption.font.getlength(line) for line in caption.lines) <= WIDTH
    assert all(line and line == line.strip() for line in caption.lines)


@pytest.mark.parametrize("language", ["Chinese", "Japanese", "Korean"])
def test_letters_are_drawn_where_a_font_has_them_and_written_out_where_none_has(fonts, language):
    prompt = PROMPTS[language]
    text = "".join(Caption.of(prompt, 10_000).lines)
    known = any(set(prompt) <= letters_of(path) for path in fonts if path.suffix in (".ttf", ".ttc", ".otf"))
    escaped = "".join(c if c.isascii() else c.encode("unicode_escape").decode() for c in prompt)
    assert text == (prompt if known else escaped)


def test_symbols_that_no_font_has_are_named(monkeypatch):
    monkeypatch.setattr(captions, "_installed", lambda: [])
    assert Caption.of("a🚀over 2 ☃\ufe0f", 1000).lines == ["a [rocket] over 2 [snowman]"]


@pytest.mark.skipif(not features.check("raqm"), reason="this Pillow has no raqm")
def test_arabic_stands_at_the_right_edge_in_its_own_letters():
    caption = Caption.of(PROMPTS["Arabic"], WIDTH)  # in matplotlib's font at least
    assert caption.to_the_left
    assert " ".join(caption.lines) == PROMPTS["Arabic"]
    white = torch.ones(1, 3, 32, WIDTH)
    sheet, boxes = before_after(["قطة"], {"base": white})
    ((left, _, right, bottom),) = boxes["base"]
    inked = np.asarray(sheet.convert("L"))[bottom + 4 :, left:].min(axis=0) < 128
    assert np.flatnonzero(inked).min() > (right - left) / 2
    assert right - left - 4 <= np.flatnonzero(inked).max() < right - left + 2


def test_without_raqm_letters_that_run_to_the_left_are_written_out(monkeypatch):
    monkeypatch.setattr(captions.features, "check", lambda feature: False)
    assert Caption.of("a قط", 1000).lines == ["a \\u0642\\u0637"]


def test_a_line_does_not_start_with_a_closing_mark_and_an_escape_is_not_divided(monkeypatch):
    monkeypatch.setattr(captions, "_installed", lambda: [])
    lines = Caption.of("猫" * 10, WIDTH).lines
    assert set("".join(lines).split("\\")) == {"", "u732b"}
    assert all(line.startswith("\\u") for line in lines)
    assert captions._BREAKABLE.findall("雨。」a cat、猫") == ["雨。」", "a", " ", "cat、", "猫"]
    assert list(captions._units("e\u0301น้ำ")) == ["e\u0301", "น้ำ"]


def test_what_is_cut_ends_in_an_ellipsis_and_what_is_not_is_whole(fonts):
    for prompt in (PROMPTS["long"], PROMPTS["long word"], PROMPTS["long Chinese"]):
        lines = Caption.of(prompt, WIDTH).lines
        assert len(lines) == MOST_LINES
        assert lines[-1].endswith(("...", "…"))
    assert Caption.of(PROMPTS["lines"], WIDTH).lines == ["a cat on a mat"]
    assert Caption.of(" \n ", WIDTH).lines == ["(empty)"]
    assert "".join(Caption.of(PROMPTS["one word"], WIDTH).lines) == PROMPTS["one word"]


def test_no_word_of_a_long_prompt_is_lost_without_an_ellipsis(fonts):
    """Also where the last line is just full, so that the space behind it has no room."""
    for number in range(60):
        words = random.Random(number).choices(["red", "a", "circle", "of", "purple", "and", "triangle", "it"], k=60)
        lines = Caption.of(" ".join(words), WIDTH).lines
        assert " ".join(lines) == " ".join(words) or lines[-1].endswith(("...", "…"))


def test_captions_of_a_sheet_keep_out_of_each_others_tiles_and_pictures(fonts):
    """White pictures: beyond the frames, ink is text; there is none in the gaps, nor on the pictures."""
    prompts = list(PROMPTS.values())
    white = torch.ones(len(prompts), 3, 16, 64)
    sheet, boxes = before_after(prompts, {"base": white, "标签 " + "y" * 300: white})
    pixels = np.asarray(sheet.convert("L"))
    for left, top, right, bottom in boxes["base"]:
        assert pixels[top:bottom, left:right].min() == 255
        assert pixels[:, right + 3 : right + GAP - 3].min() == 255
    heights = [(bottom - top) for _, top, _, bottom in boxes["base"]]
    rows = -(-len(prompts) // 4)
    assert sheet.height <= GAP + rows * (2 * (heights[0] + GAP) + MOST_LINES * LINE + 2 * GAP)
    assert sheet.width < 4 * (boxes["base"][0][2] - boxes["base"][0][0] + GAP) + 300


def test_captions_of_narrow_pictures_have_room():
    _, boxes = before_after(["a red circle above a square"] * 2, {"base": torch.ones(2, 3, 1024, 64)})
    (left, _, _, _), (second, _, _, _) = boxes["base"]
    assert second - left >= 96


def test_a_damaged_font_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    dejavu = captions._installed()[0]
    monkeypatch.setattr(captions, "_installed", lambda: [tmp_path / "broken.ttf", dejavu])
    assert Caption.of("Ўкраїна", 1000).lines == ["Ўкраїна"]
