"""The rewards `ocr` and `ocr_strict`: which texts a prompt asks for, how readings are compared with them, and what
RapidOCR's real models read in drawn pictures.
"""
# ruff: noqa: RUF001  the marks of other scripts are what this file is about

import asyncio
import builtins
import math
from itertools import combinations
from time import process_time

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rapidocr import RapidOCR

from flowrl_trainers.metrics import paired_change, signs_of_over_optimisation
from flowrl_trainers.metrics.image_statistics import colour_entropy, edge_density
from flowrl_trainers.rewards import OCRReward, StrictOCRReward
from flowrl_trainers.rewards.quoted_texts import quoted_texts
from flowrl_trainers.rewards.text_matching import best_run, folded, reading_order, text_score, unasked_words

from .reward_servers import scores_of
from .text_pictures import PROMPTS, draw_text, picture_of, to_tensor


@pytest.mark.parametrize(("prompt", "texts"), [
    ('a watch displaying "Step Goal Achieved" at dusk', ["Step Goal Achieved"]),
    ('a mug "Best Dad" beside a sign "Open"', ["Best Dad", "Open"]),
    ('a sign "Open", and again "Open"', ["Open"]),
    ('a towel with "Life\'s a Beach 2024"', ["Life's a Beach 2024"]),
    ("a towel with 'Life's a Beach'", ["Life's a Beach"]),
    ("a towel with ‘Life’s a Beach’", ["Life’s a Beach"]),
    ("ein Schild „Geöffnet“, ein Schild „Zu”", ["Geöffnet", "Zu"]),
    ("un café «Chez Léa» et « Ouvert »", ["Chez Léa", "Ouvert"]),
    ("ein Buch »Faust«, ein Heft ‹Notiz›", ["Faust", "Notiz"]),
    ("“curly” and ＂wide＂", ["curly", "wide"]),
    ("en skylt ”Öppet” på en 12” skärm och ”Stängt”", ["Öppet", "Stängt"]),
    ("kyltti »Avoinna» ja toinen »Kiinni»", ["Avoinna", "Kiinni"]),
    ("「営業中」と『準備中』", ["営業中", "準備中"]),
    ('写着"你好"的牌子', ["你好"]),
    ('a poster “the so-called "news"”', ['the so-called "news"']),
    # no text is asked for
    ("a dog's bowl and the dogs' beds", []),
    ("a 12\" screen beside a 15\" one, 5'10\" tall", []),
    ('a 12" screen showing "Hello"', ["Hello"]),
    ("rock 'n' roll of the '90s, the kids' toys", []),
    ("an empty \"\" and a blank ' '", []),
    ("a red circle", []),
])  # fmt: skip
def test_a_prompt_asks_for_what_stands_between_quotation_marks(prompt, texts):
    assert quoted_texts(prompt) == texts


def test_each_real_prompt_asks_for_one_text():
    assert [len(quoted_texts(prompt)) for prompt in PROMPTS] == [1] * 200


def edit_distance(a: str, b: str) -> int:
    """By its definition, letter by letter from the end."""
    if not a or not b:
        return len(a) + len(b)
    if a[-1] == b[-1]:
        return edit_distance(a[:-1], b[:-1])
    return 1 + min(edit_distance(a[:-1], b), edit_distance(a, b[:-1]), edit_distance(a[:-1], b[:-1]))


@given(st.text("ab", min_size=1, max_size=5), st.lists(st.text("abc", min_size=1, max_size=3), max_size=4))
@example("ab", ["ca", "b"])  # of three runs of distance 1 the longest has more letters than the text
@settings(max_examples=60, deadline=None)
def test_the_best_run_is_the_best_of_all_runs(asked, read):
    """Against the recursive definition of the edit distance on every run; ties go to the run of most letters."""
    run = best_run(asked, read)
    runs = {(i, j): "".join(read[i:j]) for i, j in combinations(range(len(read) + 1), 2)}
    distances = {key: edit_distance(asked, text) for key, text in runs.items()}
    assert run.distance == min([len(asked), *distances.values()])
    if run.distance < len(asked):
        assert distances[run.start, run.stop] == run.distance
        equal = [len(runs[key]) for key, distance in distances.items() if distance == run.distance]
        assert len(runs[run.start, run.stop]) == max(equal)


@pytest.mark.parametrize(("asked", "read", "score", "strict"), [
    (["Open Now"], ["open", "NOW"], 1, 1),
    (["Open Now"], ["OpenNow"], 1, 1),
    (["Open Now"], [], 0, 0),
    (["Open"], ["Opened"], 1 - 2 / 4, 1 - 2 / 4),  # no exemption for a text within another
    (["Open"], ["Cafe", "Open"], 1, 0),
    (["Open Now"], ["Open", "Now", "Joe"], 1, 1 - 3 / 7),
    (["Open Now"], ["Open", "Joe", "Now"], 1 - 2 / 7, 1 - 5 / 7),  # "OpenJoe" comes closest
    (["Open"], ["Open"] * 10, 1, 0),
    (["Open", "Milk"], ["Milk", "Open"], 1, 1),
    (["Open", "Milk"], ["Open"], 1 / 2, 1 / 2),
    (["Open", "Milk"], ["Open", "Silk"], 7 / 8, 7 / 8),
    (["World's 1st"], ["“World’s", "１st”"], 1, 1),
    (["a"], ["wholly different"], 0, 0),
])  # fmt: skip
def test_scores_are_the_share_of_right_letters(asked, read, score, strict):
    assert text_score(asked, read, strict=False) == pytest.approx(score)
    assert text_score(asked, read, strict=True) == pytest.approx(strict)


def test_unasked_words_are_those_outside_of_the_runs():
    assert unasked_words(["Open Now"], ["Joe's cafe", "Open", "Now", "since 1990 or so"]) == 6
    assert unasked_words(["Open"], ["Open"]) == 0
    assert folded(" « É ’s ＡＢ» ") == "é'sab"


def test_lines_are_read_from_left_to_right_whatever_their_height():
    """The lower letters of "now" begin 20 pixels below the capital beside them, where RapidOCR sees another line."""
    corners = {"Gas": (300, 100, 380, 150), "now": (10, 121, 250, 150), "below": (10, 180, 200, 220)}
    boxes = np.array([[(x0, y0), (x1, y0), (x1, y1), (x0, y1)] for x0, y0, x1, y1 in corners.values()])
    assert [list(corners)[i] for i in reading_order(boxes)] == ["now", "Gas", "below"]


@pytest.fixture(scope="module")
def ocr():
    return OCRReward(threads=2)


def test_it_reads_what_rapidocr_reads_when_called_by_hand(ocr):
    """Real models on a busy and a plain picture: the same texts, and all but one letter right, as the font draws
    capital I and small l alike.
    """
    prompts = [PROMPTS[i] for i in (1, 12)]
    pictures = [picture_of(i, quoted_texts(PROMPTS[i])[0]) for i in (1, 12)]
    by_hand = RapidOCR(params={"Global.log_level": "critical", "EngineConfig.onnxruntime.intra_op_num_threads": 1})
    texts = [list(by_hand(picture).txts) for picture in pictures]
    noted: dict = {}
    images = torch.stack([to_tensor(picture) for picture in pictures])
    scores = asyncio.run(ocr(images, prompts, log_metric=noted.__setitem__, log_extra=noted.__setitem__))
    assert noted == {"read_by_ocr": texts, "ocr_unasked_words": 0}
    assert scores == [1, 1 - 1 / 14]
    assert texts == [["Step Goal Achieved"], ["Al Training Zone"]]
    assert scores_of(ocr, images, prompts).tolist() == pytest.approx(scores)  # as trainers ask, in threads


def test_what_is_asked_for_comes_from_the_column_or_the_quotes(ocr):
    blank = torch.ones(3, 64, 64)
    open_sign = to_tensor(draw_text(["Open"], 64).resize((256, 256)))
    images = torch.stack([open_sign, open_sign, open_sign, open_sign, torch.full_like(open_sign, math.nan)])
    columns = {"text": ["Open", ["Milk"], "", None, None]}
    scores = scores_of(ocr, images, ['a sign "Closed"', "a sign", 'a "Open"', 'a "OPEN"', 'a "Open"'], **columns)
    assert scores[:2].tolist() == [1, 0]
    assert scores[2].isnan()  # None: no text is asked for
    assert scores[3] == 1
    assert scores[4].isinf()  # a fault
    assert scores_of(ocr, blank[None], ['a sign "Open"']).tolist() == [0]
    assert scores_of(ocr, blank[None], ["a sign"]).isnan().all()
    with pytest.raises(ValueError, match=r"^Reward 'ocr' found 3 in the column 'text': make it a string, a list of"):
        scores_of(ocr, blank[None], text=[3])
    ocr.check_rows(Dataset.from_dict({"prompt": ["a", "b"], "text": [["A"], None]}))
    with pytest.raises(ValueError, match=r"^Reward 'ocr' found 3 in the column 'text'"):
        ocr.check_rows(Dataset.from_dict({"prompt": ["a", "b"], "text": [3, None]}))
    with pytest.raises(ValueError, match=r"^`threads` \(0\) must be at least 1\."):
        OCRReward(threads=0)


def test_a_hack_is_seen_by_the_strict_reward_and_by_the_evaluation(ocr):
    """The text five times on a blank page, where the base model drew half of it once, on a busy picture."""
    asked = ["Open Now", "Fresh Milk"]
    prompts = [f'a sign "{text}"' for text in asked]
    base = torch.stack([to_tensor(draw_text([text[: len(text) // 2]], busy=i)) for i, text in enumerate(asked)])
    hacked = torch.stack([to_tensor(draw_text([text] * 5, 40, top=40)) for text in asked])
    ocr_strict = StrictOCRReward(threads=2)
    scores = {
        reward.name: (scores_of(reward, base, prompts), scores_of(reward, hacked, prompts))
        for reward in (ocr, ocr_strict)
    }
    assert scores["ocr"][1].tolist() == [1, 1]
    assert scores["ocr_strict"][1].tolist() == [0, 0]
    rows = []
    for which, images in enumerate((base, hacked)):
        measured = {"edge_density": edge_density(images).mean(), "colour_entropy": colour_entropy(images).mean()}
        means = {f"reward/{name}": pair[which].mean() for name, pair in scores.items()}
        rows.append({name: float(value) for name, value in (measured | means).items()})
    changes = {name: paired_change(*pair) for name, pair in scores.items()}
    signs = "; ".join(signs_of_over_optimisation(*rows, {"ocr": 1.0}, ["ocr_strict"], changes))
    assert "ocr_strict, which training never saw, fell from" in signs
    assert "colour entropy went from" in signs


def test_without_the_extra_the_mend_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RuntimeError, match=r"^Reward 'ocr_strict' needs onnxruntime: install .* its extra `ocr`"):
        StrictOCRReward()


@pytest.mark.slow
def test_it_reads_95_percent_of_200_real_texts(ocr, capsys):
    """The misses and the speed are those of docs/rewards.md."""
    pictures = [picture_of(i, quoted_texts(prompt)[0]) for i, prompt in enumerate(PROMPTS)]
    noted: dict = {}
    start = process_time()
    scores = asyncio.run(ocr(torch.stack([to_tensor(p) for p in pictures]), PROMPTS, log_extra=noted.__setitem__))
    speed = len(PROMPTS) / (process_time() - start)
    misses = [(quoted_texts(p)[0], r) for p, r, s in zip(PROMPTS, noted["read_by_ocr"], scores, strict=True) if s < 1]
    with capsys.disabled():
        print(f"\n{speed:.1f} pictures per second and core; misses: {misses}")
    assert len(misses) <= 0.05 * len(PROMPTS)
