"""A row that a reward could not score is refused before anything is drawn, wherever in the data set it stands."""

import re

import pytest
from datasets import Dataset
from PIL import Image

from flowrl_trainers.cli import main
from flowrl_trainers.rewards import GenEvalJudge, VLMJudge, differentiable
from flowrl_trainers.shapes import prompts

from .helpers import make_trainer

SENTENCE = "'a dog' is not a caption of this world: write 'a COLOUR SHAPE' once or twice"
CAPTIONS = list(prompts("train")["prompt"][:8])
WITH_A_DOG = [*CAPTIONS[:4], "a dog", *CAPTIONS[4:]]


@differentiable
def redness(images, prompts, **columns):
    return images[:, 0].mean(dim=(1, 2))


@pytest.fixture
def nothing_drawn(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("flowrl_trainers.cli.evaluate.load_model", fail)
    monkeypatch.setattr("flowrl_trainers.cli.run.load_model", fail)
    monkeypatch.setattr("flowrl_trainers.cli.score._scores", fail)
    for module, name in (("quiet", "hush"), ("memory", "keep_freed_memory")):  # settings of the whole process
        monkeypatch.setattr(f"flowrl_trainers.cli.{module}.{name}", lambda: None)


@pytest.mark.parametrize("where", ["dataset", "eval_dataset"])
def test_a_trainer_refuses_a_prompt_that_the_checker_cannot_read(tmp_path, where):
    rows = {name: Dataset.from_dict({"prompt": CAPTIONS}) for name in ("dataset", "eval_dataset")}
    rows[where] = Dataset.from_dict({"prompt": WITH_A_DOG})
    with pytest.raises(ValueError, match=SENTENCE):
        make_trainer("ACFlowTrainer", tmp_path, reward="checker", **rows)


def test_a_reward_that_is_not_chosen_for_a_row_does_not_mind_it(tmp_path):
    chosen = [["redness"] if prompt == "a dog" else None for prompt in WITH_A_DOG]
    rows = Dataset.from_dict({"prompt": WITH_A_DOG, "tasks": chosen})
    make_trainer("ACFlowTrainer", tmp_path, reward=["checker", redness], dataset=rows, rewards_column="tasks")
    rows = Dataset.from_dict({"prompt": WITH_A_DOG, "tasks": [None] * len(chosen)})
    with pytest.raises(ValueError, match=SENTENCE):
        make_trainer("ACFlowTrainer", tmp_path, reward=["checker", redness], dataset=rows, rewards_column="tasks")


@pytest.mark.parametrize(
    "command",
    [
        ["ac_flow", "--model", "shapes", "--reward_funcs", "checker", "--output_dir", "out", "--use_cpu", "true"],
        ["evaluate", "--model", "shapes", "--adapter", "none", "--rewards", "checker", "--trained", "checker"],
    ],
    ids=["ac_flow", "evaluate"],
)
def test_a_command_refuses_it(tmp_path, monkeypatch, capsys, nothing_drawn, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join([*WITH_A_DOG, *CAPTIONS * 3]))
    assert main([*command, "--dataset", "prompts.txt"]) == 2
    assert SENTENCE in " ".join(capsys.readouterr().err.split())


def test_pictures_of_such_a_prompt_are_refused_before_any_is_scored(tmp_path, monkeypatch, capsys, nothing_drawn):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "prompts.txt").write_text(f"{CAPTIONS[0]}\na dog\n")
    assert main(["score", "pictures", "--rewards", "checker", "--prompts", "prompts.txt"]) == 2
    assert SENTENCE in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("include", "sentence"), [
    ([{"class": None}], "holds {'class': None}, which has no 'class': name the object"),
    ('[{"class": "cow"}]', "make it a list of objects such as {'class': 'cow', 'count': 2}"),
    (None, "holds None: make it a list"),
    (["cow"], r"holds ['cow']: make it a list"),
    ([{"class": "cow", "count": 0}], "the count 0 of 'cow': make it 1 or more"),
    ([{"class": "cow", "count": "2"}], "the count '2' of 'cow': make it 1 or more"),
    ([{"class": "cow", "color": 3}], "the color 3 of 'cow': make it a word"),
    ([{"class": "cow", "position": ["left of"]}], "the position ['left of']: name a relation and the number of an"),
    ([{"class": "cow", "position": ["left of", "it"]}], "the position ['left of', 'it']: name a relation"),
    ([{"class": "cow", "position": ["left of", "1"]}], "the position ['left of', '1'] for 1 objects: number them"),
])  # fmt: skip
def test_a_judge_refuses_what_is_no_list_of_objects(include, sentence):
    judge = GenEvalJudge("http://127.0.0.1:9", "some-vlm")
    right = [{"class": "cow", "count": 1, "position": ["left of", "0"]}]
    judge.check_rows(Dataset.from_dict({"prompt": ["a cow"], "include": [right]}))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        judge.check_rows(Dataset.from_dict({"prompt": ["a"], "include": [include]}))


def test_a_judge_refuses_a_row_that_its_question_cannot_hold():
    judge = VLMJudge("http://127.0.0.1:9", "some-vlm", "How far is {prompt} from {place[city]}?")
    rows = {"prompt": ["a cow", "a dog"], "place": [{"city": "Rome"}, {"city": "Bern"}]}
    judge.check_rows(Dataset.from_dict(rows))
    with pytest.raises(
        ValueError, match=r"cannot be filled in for the prompt 'a cow' \(.*\): mend what stands in its"
    ):
        judge.check_rows(Dataset.from_dict(rows | {"place": ["Rome", "Bern"]}))
