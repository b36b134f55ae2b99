"""`flowrl score` and `flowrl check_reward`: what they say of rewards whose properties are known."""

import json
import math
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage

from flowrl_trainers.cli import score as score_command
from flowrl_trainers.cli.check_reward import check_reward
from flowrl_trainers.cli.picture_files import find_pictures
from flowrl_trainers.cli.reward_report import warnings_of
from flowrl_trainers.metrics.reward_check import check_gradient, distortions, hacked, spread_of
from flowrl_trainers.rewards import differentiable
from flowrl_trainers.sampling.reward_trial import try_reward

from .reward_servers import examples, noise

CONTEXT = {"trainer_state": None, "log_metric": lambda name, value: None, "log_extra": lambda name, values: None}


# ---- the measures ---------------------------------------------------------------------------------------------------


def test_the_spread_within_and_between_prompts():
    """Two prompts of scores 0 ± 1 and 4 ± 3: within, the root of (1 + 9) / 2; between, half the distance. A None counts
    for nothing, and one prompt of three is level.
    """
    spread = spread_of(torch.tensor([[-1.0, 1.0], [1.0, 7.0]]))
    assert (spread.within, spread.between, spread.level) == pytest.approx((5**0.5, 2, 0))
    spread = spread_of(torch.tensor([[-1.0, 1.0, math.nan], [1.0, 7.0, math.nan], [2.0, math.nan, 2.0]]))
    assert spread.within == pytest.approx((10 / 3) ** 0.5)
    assert spread.level == pytest.approx(1 / 3)
    assert math.isnan(spread_of(torch.full((2, 2), math.nan)).within)


def test_distortions_change_what_they_say_and_no_more():
    """A flat picture is left as it is by all but brightness; blur spreads a point as the normal density."""
    flat = torch.full((1, 3, 32, 48), 0.6)
    for name, changed in distortions(flat).items():
        torch.testing.assert_close(changed, 0.9 * flat if name == "brightness" else flat, atol=1e-6, rtol=0)
    point = torch.zeros(1, 3, 512, 512)
    point[..., 256, 256] = 1
    blurred = distortions(point)["blur"][0, 0]
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-5)
    row = blurred[256]
    assert float(row[258] / row[256]) == pytest.approx(math.exp(-0.5), abs=1e-5)  # sigma is 2 pixels
    assert all((changed - noise(1, 64)).abs().max() > 0.05 for changed in distortions(noise(1, 64)).values())


def test_the_gradient_of_a_linear_reward_is_its_weights():
    """r = w · x: predicted and measured changes agree, and the norm is that of w. With a gradient of twice that, the
    measured change is half of the predicted one.
    """
    w = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))

    def linear(x):
        return (x * w).sum(dim=(1, 2, 3))

    check = check_gradient(linear, noise(2, 8))
    assert check.norm == pytest.approx(float(w.norm()))
    assert check.disagreement < 1e-2
    assert check_gradient(lambda x: 2 * linear(x) - linear(x.detach()), noise(2, 8)).disagreement == pytest.approx(
        0.5, abs=1e-2
    )


def test_gradient_ascent_finds_the_hack():
    """The mean brightness is highest for white: 50 steps of 0.02 reach 1 from anywhere."""
    torch.testing.assert_close(hacked(lambda x: x.mean(dim=(1, 2, 3)), noise(2, 8)), torch.ones(2, 3, 8, 8))


# ---- the report -----------------------------------------------------------------------------------------------------


def brightness(images, prompts, **columns):
    return images.mean(dim=(1, 2, 3))


def trial_of(function, images=None):
    reward = differentiable(function)
    images = noise(4) if images is None else images
    asked = examples(["a circle", "a circle", "a square", "a square"])
    return warnings_of(try_reward(reward, images, asked, 2, noise(2), CONTEXT)[0])


def test_what_spoils_a_run_is_said():
    calls = []

    def drifts(images, prompts, **columns):
        calls.append(1)
        return brightness(images, prompts) + len(calls)

    def broken(images, prompts, **columns):
        rows = torch.arange(len(images))
        return torch.where(rows == 1, torch.inf, brightness(images, prompts))

    def doubled(images, prompts, **columns):  # the gradient, but not the score
        return 2 * brightness(images, prompts) - brightness(images.detach(), prompts)

    def says(function, sentence, images=None):
        found = [s for s in trial_of(function, images) if s.startswith(sentence)]
        assert len(found) == 1, (sentence, trial_of(function, images))

    says(drifts, "The same pictures score up to 3 apart when asked again")
    says(broken, "1 of 4 scores are NaN or infinite: mend the reward.")
    says(lambda images, prompts, **columns: 0 * brightness(images, prompts), "For 100% of the prompts all pictures")
    says(lambda images, prompts, **columns: 0 * brightness(images, prompts), "The gradient is zero")
    says(brightness, "Brightness moves the scores by more than pictures of one prompt differ")
    says(brightness, "Noise scores 1 after 50 steps of gradient ascent, more than the model's pictures (0.")
    says(doubled, "The gradient is 50% apart from a finite difference: check that nothing is")
    black_and_white = torch.stack([torch.full((3, 16, 16), float(i % 2)) for i in range(4)])
    assert not [s for s in trial_of(brightness, black_and_white) if not s.startswith("Noise scores")]


def test_the_embedded_reward_is_checked(tmp_path, capsys):
    check_reward([
        "shapes", "--prompts", "2", "--pictures", "2", "--num_inference_steps", "2", "--out", str(tmp_path),
        "--use_cpu",
    ])  # fmt: skip
    said, report = capsys.readouterr().out, (tmp_path / "check.md").read_text()
    assert report in said
    assert "| the same pictures again | the same scores |" in report
    found = json.loads((tmp_path / "check.json").read_text())
    assert [len(row) for row in found["scores"]] == [2, 2]
    flat = np.array(found["scores"])
    assert f"| range | {flat.min():.4g} to {flat.max():.4g}, mean {flat.mean():.4g} |" in report
    assert found["spread"]["between"] == pytest.approx(flat.mean(axis=1).std(), abs=1e-6)
    gradient = found["gradient"]
    assert gradient["measured"] == pytest.approx(gradient["predicted"], rel=0.05)
    assert np.mean(found["ascent"][1]) > np.mean(found["ascent"][0]) + 0.3
    assert PILImage.open(tmp_path / "pictures.png").height > 3 * 192


# ---- pictures that exist --------------------------------------------------------------------------------------------


def test_pictures_of_two_sizes_are_scored_with_the_prompts_of_their_names(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "drawn" / "more").mkdir(parents=True)
    shades = {"a_dark_room_01.png": 10, "a_dark_room_02.png": 30, "a_bright_day.jpg": 250, "more/7.png": 128}
    for i, (name, shade) in enumerate(shades.items()):
        PILImage.new("RGB", (16 + 8 * (i == 2), 16), (shade,) * 3).save(tmp_path / "drawn" / name)
    (tmp_path / "lamp.py").write_text(
        "def bright(images, prompts, **columns):\n"
        "    return [None if 'dark' in p and x.mean() > 0.1 else x.mean() for x, p in zip(images, prompts)]\n"
    )
    score_command.score(["drawn", "--rewards", "lamp.bright", "--batch_size", "2", "--device", "cpu"])
    rows = json.loads((tmp_path / "flowrl-scores" / "table.json").read_text())
    assert [(row["picture"], row["prompt"]) for row in rows] == [
        ("a_bright_day.jpg", "a bright day"), ("a_dark_room_01.png", "a dark room"),
        ("a_dark_room_02.png", "a dark room"), ("more/7.png", "7"),
    ]  # fmt: skip
    assert [row["bright"] for row in rows] == pytest.approx([250 / 255, 10 / 255, None, 128 / 255], abs=1e-6)
    table = (tmp_path / "flowrl-scores" / "table.md").read_text()
    assert "| bright | 3 | 1 | 0 | 0.5072 | 0.3843 | 0.03922 | 0.502 | 0.9804 |" in table
    assert "| a_dark_room_02.png |  | a dark room |" in table
    assert table.split("\n\n")[0] in capsys.readouterr().out
    assert PILImage.open(tmp_path / "flowrl-scores" / "pictures.png").height > 2 * 192
    assert PILImage.open(tmp_path / "flowrl-scores" / "histogram.png").width > 400


def test_prompts_and_columns_come_from_a_file_or_a_data_set(tmp_path):
    folder = tmp_path / "drawn"
    folder.mkdir()
    for name in ("b.png", "a.png"):
        PILImage.new("RGB", (8, 8)).save(folder / name)
    rows = [
        {"file_name": "b.png", "prompt": "second", "text": "B"},
        {"file_name": "a.png", "prompt": "first", "text": "A"},
    ]
    (tmp_path / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "lines.txt").write_text("first\nsecond\n")
    (tmp_path / "one.txt").write_text("first\n")
    (tmp_path / "other.jsonl").write_text('{"file_name": "c.png", "prompt": "third"}\n')

    def found(prompts):
        pictures = find_pictures(str(folder), None if prompts is None else str(tmp_path / prompts), "prompt", "train")
        return [(p.name, p.example.prompt, p.example.columns) for p in pictures]

    assert found(None) == [("a.png", "a", {}), ("b.png", "b", {})]
    assert found("lines.txt") == [("a.png", "first", {}), ("b.png", "second", {})]
    assert found("named.jsonl") == [("a.png", "first", {"text": "A"}), ("b.png", "second", {"text": "B"})]
    with pytest.raises(ValueError, match="has 1 rows for 2 pictures: write one per picture"):
        found("one.txt")
    with pytest.raises(ValueError, match=r"has no row whose 'file_name' is 'a.png', and 2 such pictures in all"):
        found("other.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no pictures: it needs files with \.png, \.jpg"):
        find_pictures(str(tmp_path / "empty"), None, "prompt", "train")
    (folder / "c.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"^The picture 'c.png' cannot be read"):
        find_pictures(str(folder), None, "prompt", "train")[2].load()
    images = Dataset.from_dict({"image": [str(folder / "a.png")], "caption": ["first"]}).cast_column("image", Image())
    images.to_parquet(tmp_path / "pictures" / "train.parquet")
    (only,) = find_pictures(str(tmp_path / "pictures" / "train.parquet"), None, "caption", "train")
    assert only.example.prompt == "first"
    assert only.load().size == (8, 8)


@pytest.mark.parametrize(("rows", "sentence"), [
    ('{"file_name": "a.png", "prompt": 2020}\n', "has a prompt that is no string in row 0 (2020)"),
    ('{"file_name": "a.png", "prompt": "a", "images": "b"}\n', "`prompts` has a column 'images', which is what rewards"),
    ('{"file_name": "a.png", "prompt": "a"}\n{"file_name": "a.png", "prompt": "b"}\n', "has two rows whose 'file_name' is 'a.png'"),
], ids=["a number", "a name that is taken", "a name twice"])  # fmt: skip
def test_rows_of_pictures_are_checked_as_those_of_a_run(tmp_path, rows, sentence):
    PILImage.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        find_pictures(str(tmp_path), str(tmp_path / "rows.jsonl"), "prompt", "train")


def test_rows_beside_those_of_the_pictures_are_counted(tmp_path, capsys):
    PILImage.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"file_name": "{name}.png", "prompt": "{name}"}}\n' for name in "abc"))
    assert len(find_pictures(str(tmp_path), str(rows), "prompt", "train")) == 1
    assert capsys.readouterr().err == f"flowrl: 2 of the rows of {str(rows)!r} name no picture here.\n"


def test_a_column_of_paths_is_no_column_of_pictures(tmp_path):
    (tmp_path / "pictures.csv").write_text("image,prompt\na.png,a red circle\n")
    with pytest.raises(ValueError, match=r"holds 'a.png' in row 0, which is no picture: name the folder of the"):
        find_pictures(str(tmp_path / "pictures.csv"), None, "prompt", "train")


def test_pictures_are_read_as_viewers_show_them_or_refused(tmp_path):
    def loaded(picture: PILImage.Image, **settings) -> PILImage.Image:
        picture.save(tmp_path / "p.png", **settings)
        return find_pictures(str(tmp_path), None, "prompt", "train")[0].load()

    lying = PILImage.Exif()
    lying[0x0112] = 6  # turned by a quarter
    assert loaded(PILImage.new("RGB", (8, 4)), exif=lying).size == (4, 8)
    assert loaded(PILImage.new("RGBA", (8, 4), (9, 8, 7, 255))).getpixel((0, 0)) == (9, 8, 7)
    with pytest.raises(
        ValueError, match=r"^The picture 'p.png' has transparent pixels, .*: save it on a background\.$"
    ):
        loaded(PILImage.new("RGBA", (8, 4), (9, 8, 7, 254)))
    with pytest.raises(ValueError, match=r"has pixels of the mode 'I;16': save it with 8 bits per colour\.$"):
        loaded(PILImage.new("I;16", (8, 4)))


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["drawn", "--split", "test"], "`split` ('test') has no effect, as 'drawn' is a folder with pictures: leave it out"),
    (["drawn", "--prompt_column", "text"], "`prompt_column` ('text') has no effect without `prompts`: leave it out"),
    (["nowhere", "--prompts", "a.txt"], "`prompts` ('a.txt') has no effect, as 'nowhere' is no folder: leave it out"),
    (["nowhere"], "'nowhere' is no folder with pictures, and as a data set: The prompts 'nowhere', split 'train', cannot"),
    (["drawn", "--out", "taken"], "`out` (taken) cannot be written to (File exists): choose another folder"),
    (["drawn", "--device", "gpu"], "`device` ('gpu') cannot be used (Expected one of cpu, cuda"),
    (["drawn", "--device", "meta:x"], "`device` ('meta:x') cannot be used"),
])  # fmt: skip
def test_arguments_are_refused_before_a_picture_is_scored(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(score_command, "_scores", lambda *arguments: pytest.fail("pictures are scored"))
    (tmp_path / "drawn").mkdir()
    PILImage.new("RGB", (32, 32)).save(tmp_path / "drawn" / "a_red_circle.png")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ValueError, match=re.escape(sentence)):
        score_command.score([*arguments, "--rewards", "jpeg_compressibility"])


def test_a_picture_that_cannot_be_read_costs_no_scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(score_command, "_scores", lambda *arguments: pytest.fail("pictures are scored"))
    PILImage.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"^The picture 'b.png' cannot be read"):
        score_command.score([".", "--rewards", "jpeg_compressibility", "--device", "cpu"])


def test_the_sheets_of_an_earlier_call_are_no_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PILImage.new("RGB", (32, 32)).save(tmp_path / "a_red_circle.png")
    for _ in range(2):
        score_command.score([".", "--rewards", "jpeg_compressibility", "--device", "cpu"])
        assert len(json.loads((tmp_path / "flowrl-scores" / "table.json").read_text())) == 1
