"""Prompts from files, lists and formatted data sets: as they stand there, or one sentence."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict

from flowrl_trainers.cli import main
from flowrl_trainers.cli.arguments import TRAINERS, parse
from flowrl_trainers.cli.run import load_prompts, make_trainer
from flowrl_trainers.sampling.prompt_sources import read_prompt_file
from flowrl_trainers.trainers.input_checks import check_dataset

from .helpers import CAPTIONS, adjoint_matching, first_examples
from .runs import assert_same
from .tiny import tiny_sd3

DATA = Dataset.from_dict({"prompt": ["a", "b"], "answer": [1, 2], "share": [0.5, 1.0]})


def rows(source) -> list[dict]:
    return list(check_dataset(source, "train_dataset"))


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("a.txt", b"a\nb", ["a", "b"]),
    ("a.txt", b"\xef\xbb\xbfa\r\n b \r\n", ["a", " b "]),
    ("a.TXT", "\u7ea2\u8272\u2028\u5706\n".encode(), ["\u7ea2\u8272\u2028\u5706"]),
    ("a[1]*.txt", b"a\n", ["a"]),
    ("a.csv", b"\xef\xbb\xbfprompt\n2024\n\"a, b\nc\"\n", ["2024", "a, b\nc"]),
    ("a.tsv", b"n\tprompt\n1\ta, b\n", ["a, b"]),
    ("a.jsonl", b"\xef\xbb\xbf{\"prompt\": \"a\"}\n{\"prompt\": \"b\"}\n", ["a", "b"]),
    ("a.json", b"[{\"prompt\": \"a\"},\n {\"prompt\": \"b\"}]", ["a", "b"]),
])  # fmt: skip
def test_a_file_is_read_as_it_stands(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert [row["prompt"] for row in rows(tmp_path / name)] == expected
    assert [row["prompt"] for row in rows(str(tmp_path / name))] == expected


def test_other_columns_stay_for_the_rewards(tmp_path):
    include = [{"class": "clock", "count": 2}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "two clocks", "include": include}) + "\n")
    assert rows(tmp_path / "a.jsonl") == [{"prompt": "two clocks", "include": include}]
    DATA.to_parquet(str(tmp_path / "a.parquet"))
    assert rows(tmp_path / "a.parquet") == list(DATA)


def test_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a\n")
    before = path.stat()
    assert rows(path) == [{"prompt": "a"}]
    path.write_text("b\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p` and archives leave it
    assert rows(path) == [{"prompt": "b"}]


@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("a.txt", b"a\n \nb\n", r"The prompt in line 2 of .*a.txt' is missing or blank: fill it in, or delete it."),
    ("a.txt", b"a\nb\n\n", "The prompt in line 3 of"),
    ("a.csv", b"prompt,n\na,1\n,2\n", "The prompt in row 2 of"),
    ("a.csv", b"prompt\na\n\nb\n", "The prompt in row 2 of"),
    ("a.csv", b"prompt\na circle, red\n", "put a prompt that holds a separator into double quotes"),
    ("a.csv", b"prompt,n\na,1\na circle, red,2\n", "put a prompt that holds a separator into double quotes"),
    ("a.csv", b"caption,n\na,1\n", r"`train_dataset` \('.*a.csv'\) has 'caption' and 'n' but no 'prompt': rename"),
    ("a.txt", "a\ncaf\xe9\n".encode("latin-1"), "are not encoded as UTF-8 in line 2: save the file as UTF-8"),
    ("a.txt", "a".encode("utf-16"), "are not encoded as UTF-8 in line 1"),
    ("a.txt", b"", "are empty: write at least one"),
    ("a.jsonl", b"{\"prompt\": \"a\"}\nrubbish\n", r"cannot be read as .jsonl \(JSON parse error"),
    ("a.jsonl", b"{\"prompt\": 3}\n", r"has a prompt that is no string in row 0 \(3\)"),
    ("a.parquet", b"PAR1", "cannot be read as .parquet"),
    ("a.docx", b"PK", "have an unknown suffix: save them as .txt, .csv, .tsv, .json, .jsonl or .parquet"),
])  # fmt: skip
def test_a_file_that_holds_no_prompts_is_answered_in_a_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        rows(tmp_path / name)


@pytest.mark.parametrize(("source", "sentence"), [
    ("none.txt", r"There is no file 'none.txt' with prompts, seen from '/.*': give its path."),
    ("user/prompts", r"`train_dataset` \('user/prompts'\) is no file of prompts: .* `datasets.load_dataset` returns"),
    ([], "`train_dataset` is empty"),
    (["a", 3], r"`train_dataset` is a list whose element 1 \(3\) is no string"),
    (["a", ""], r"`train_dataset` is a list whose element 1 \(''\) is blank"),
    (DATA.to_iterable_dataset(), "`train_dataset` is an IterableDataset, whose rows cannot be asked for by number"),
    (DatasetDict(train=DATA, test=DATA), r"is a DatasetDict of several data sets \('train', 'test'\): pass one"),
    (DATA.with_transform(lambda batch: batch), r"has a transform \(`set_transform`\).*: apply it once with"),
    (DATA.add_column("self", [1, 2]), "`train_dataset` has a column 'self'"),
    (DATA.to_pandas(), "`train_dataset` is a DataFrame: pass a `datasets.Dataset`"),
])  # fmt: skip
def test_another_object_is_answered_in_a_sentence(source, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_dataset(source, "train_dataset")


def test_a_list_of_strings_is_a_data_set():
    assert rows(["a", "b"]) == [{"prompt": "a"}, {"prompt": "b"}]


@pytest.mark.parametrize("columns", [None, ["answer"], ["prompt"]])
@pytest.mark.parametrize("kind", [None, "pandas", "arrow", "numpy", "torch"])
def test_prompts_are_strings_in_every_format(kind, columns):
    found = check_dataset(DATA.with_format(kind, columns), "train_dataset")
    assert [type(row["prompt"]) for row in found] == [str, str]
    assert [dict(row) for row in found] == list(DATA)
    assert isinstance(found[0]["answer"], torch.Tensor) == (kind == "torch" and columns != ["prompt"])


def test_a_trainer_takes_paths_lists_and_formats_as_it_takes_a_data_set(tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(CAPTIONS))
    plain = Dataset.from_dict({"prompt": CAPTIONS})
    examples = []
    for source in (plain, CAPTIONS, str(tmp_path / "train.txt"), plain.with_format("pandas")):
        t = adjoint_matching(tmp_path / "run", tiny_sd3(), dataset=source, eval_dataset=CAPTIONS[:1], max_steps=1)
        examples.append([vars(e) for e in first_examples(t)])
    assert_same(examples[1:], [examples[0]] * 3)
    assert list(t.eval_dataset) == [{"prompt": CAPTIONS[0]}]
    assert "eval_reward/redness" in t.evaluate(tmp_path / "train.txt")


# ---- on the command line --------------------------------------------------------------------------------------------


def settings(folder: Path, *arguments: str, **keys):
    (folder / "run.yaml").write_text(yaml.safe_dump({"model": "shapes", "reward_funcs": "checker"} | keys))
    flags = ["--config", str(folder / "run.yaml"), "--output_dir", "out", "--use_cpu", "true", *arguments]
    return parse("ac_flow", TRAINERS["ac_flow"].config_class, flags, {})


def test_a_prompt_file_is_looked_up_here_and_then_beside_the_yaml_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "prompts.txt").write_text("beside\n")
    args, _ = settings(Path("runs"), dataset="prompts.txt", eval_dataset="prompts.txt")
    assert (args.dataset, args.eval_dataset) == ("runs/prompts.txt", "runs/prompts.txt")
    (tmp_path / "prompts.txt").write_text("here\n")
    args, _ = settings(Path("runs"), dataset="prompts.txt")
    assert args.dataset == "prompts.txt"
    args, _ = settings(Path("runs"), dataset="user/prompts")
    assert args.dataset == "user/prompts"


def test_a_column_of_a_file_becomes_the_prompts(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,caption\n1,2024\n")
    assert list(load_prompts(str(tmp_path / "a.csv"), None, "train", "caption")) == [{"prompt": "2024"}]
    assert list(read_prompt_file(tmp_path / "a.csv")) == [{"prompt": "1", "caption": 2024}]


def test_a_run_of_prompt_files_names_no_data_set_on_its_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "held.csv").write_text("prompt,n\na green cross,1\n")
    args, config = settings(
        tmp_path, dataset="prompts.txt", eval_dataset="held.csv", num_generations=4, per_device_train_batch_size=4
    )
    t = make_trainer("ac_flow", args, config)
    assert list(t.train_dataset.dataset["prompt"]) == ["a red circle", "a blue square"]
    assert list(t.eval_dataset) == [{"prompt": "a green cross", "n": 1}]
    t.create_model_card()
    assert "datasets:" not in (tmp_path / "out" / "README.md").read_text()
    assert "prompts.txt" not in (tmp_path / "out" / "README.md").read_text()
    assert (t.settings["dataset"], t.settings["eval_dataset"]) == ("prompts.txt", "held.csv")


def test_evaluate_takes_a_whole_file(tmp_path, monkeypatch):
    """The prompts reach the measurement; the drawing itself is tested with `flowrl evaluate`."""
    monkeypatch.chdir(tmp_path)
    for module, name in (("quiet", "hush"), ("memory", "keep_freed_memory")):  # settings of the whole process
        monkeypatch.setattr(f"flowrl_trainers.cli.{module}.{name}", lambda: None)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    seen = []

    def measured(args, labels, rewards, prompts):
        seen.extend(prompts["prompt"])
        raise ValueError("enough")

    monkeypatch.setattr("flowrl_trainers.cli.evaluate._rows", measured)
    with pytest.raises(ValueError, match="enough"):
        main(["evaluate", "--model", "shapes", "--adapter", "a", "--rewards", "checker", "--dataset", "prompts.txt"])
    assert seen == ["a red circle", "a blue square"]
