"""What a run writes about itself: a card that nothing breaks, valid JSON, a base model that others can load."""

import ast
import hashlib
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open

from flowrl_trainers.pipelines import FlowPipeline
from flowrl_trainers.rewards import differentiable
from flowrl_trainers.run_folder import CardFacts, RunFolder, model_card
from flowrl_trainers.sampling.pictures import Pictures

from .helpers import TRAINERS, adjoint_matching, check_card, code_block, make_trainer
from .tiny import tiny_sd3

NASTY = {
    "pipe": "a|b",
    "escaped pipe": "a\\|b\\",
    "backtick": "a `code` ``more`` ```python",
    "newline": "two\nlines\n\n# heading",
    "quotes": 'say "hi" it\'s """triple""" \'\'\'too\'\'\' \\',
    "HTML": "<script>alert(1)</script> <b>bold</b> &amp; <!-- no",
    "rule": "---\nname: x\n---",
    "hash": "# Not a heading #",
    "marks": "*bold* _it_ __both__ ~~gone~~ [link](http://x) ![image](y) $x$",
    "colon": "yes: - {a: 1} # comment",
    "script": "猫 🚀 \u2028 \x00 \x1b \udc80",
    "braces": "{facts} %s {{x}}",
}


class Seen(HTMLParser):
    """The text of every element, by its tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = defaultdict(list)
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.texts[tag].append("")
        if tag not in ("img", "hr", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in self.open:
            self.texts[tag][-1] += data


def rendered(card: str) -> dict[str, list[str]]:
    body = ModelCard(card, ignore_metadata_errors=False).text
    return Seen(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body)).texts


def facts(**changes) -> CardFacts:
    values = dict(
        name="red", method="Adjoint Matching", paper={"title": "A paper", "id": "2605.06583"},
        tags=["adjoint-matching"], base_model="somebody/model", has_adapter=True,
        rewards={"redness": 1.0}, settings={"updates": 3}, sampling={"guidance_scale": 4.5, "num_inference_steps": 20},
        rows={"base": {"reward/redness": 0.1}, "tuned": {"reward/redness": 0.4}},
    )  # fmt: skip
    return CardFacts(**(values | changes))


def flat(text: str) -> str:
    """As a browser shows it in one line; Markdown has no NUL, and UTF-8 no half of a pair."""
    return " ".join(text.split()).replace("\0", "\ufffd").replace("\udc80", "\\udc80")


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_no_name_prompt_or_value_breaks_the_card(text):
    """Rendered, every text is what it was, in the place where it belongs, and nothing else is there."""
    card = model_card(facts(
        name=text, method=text, paper={"title": text, "id": "2605.06583"}, tags=[text], further_tags=[text],
        base_model=text, rewards={text: 1.0, "other": -0.5}, settings={text: text}, repository=text, dataset=text,
        sampling={"negative_prompt": text, "sigmas": [1.0, 0.5]}, prompt=text, license=text,
        rows={text: {text: 0.25}, "tuned": {text: 0.5}},
    ))  # fmt: skip
    card.encode()
    seen = rendered(card)
    shown = flat(text)
    assert seen["h1"] == [shown]
    assert seen["h2"] == ["What it brought", "Use", "How it was trained"]
    assert [cell.strip() for cell in seen["th"]] == ["", shown, "setting", "value"]
    assert [cell.strip() for cell in seen["td"]] == [shown, "0.250", "tuned", "0.500", shown, shown]
    assert seen["a"] == [shown]
    assert len(seen["p"]) == 4
    assert (
        seen["p"][0]
        == f"A LoRA for {shown}, tuned by {shown} to raise {shown} and to lower other (weight 0.5) with flowrl-trainers."
    )
    assert not set(seen) - {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "pre", "a"}
    head = ModelCard(card).data
    assert head.library_name == "diffusers"
    if "\udc80" not in text:
        assert text in head.tags
        assert (head.license, head.datasets, head.base_model) == (text, [text], text)


@pytest.mark.parametrize("has_adapter", [True, False])
@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_the_code_of_the_card_compiles_and_holds_the_prompt(text, has_adapter):
    sampling = {"negative_prompt": text, "guidance_scale": 4.5, "sigmas": [1.0, 0.5]}
    card = model_card(facts(prompt=text, base_model=text, repository=text, sampling=sampling, has_adapter=has_adapter))
    code = code_block(card)
    compile(code, "card", "exec")
    constants = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert constants.count(text) == 4  # base model, repository, prompt and negative prompt


def test_ordinary_names_stand_as_they_are():
    card = model_card(facts(name="sd35_red-v2.1", sampling={"negative_prompt": "it's", "num_inference_steps": 4}))
    assert "# sd35_red-v2.1\n" in card
    assert "| | reward/redness |" in card
    assert 'pipe(prompt="your prompt", negative_prompt="it\'s", num_inference_steps=4)' in card


def test_a_number_that_is_missing_or_not_finite_is_a_dash():
    rows = {"base": {"a": math.nan, "b": -math.inf}, "tuned": {"a": 0.5, "b": None, "c": 1.0}}
    card = model_card(facts(rows=rows))
    assert "| base | — | — | — |" in card
    assert "| tuned | 0.500 | — | 1.000 |" in card


@pytest.mark.parametrize("name", TRAINERS)
def test_the_code_of_the_card_draws_what_the_trainer_draws(tmp_path, name):
    """Of Stable Diffusion 3; the tests of the other families run theirs after an update."""
    t = make_trainer(name, tmp_path, max_steps=1, learning_rate=0.05)
    t.train()
    t.save_model()
    check_card(t, tiny_sd3())


# ---- JSON -----------------------------------------------------------------------------------------------------------


def strictly(path: Path):
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_files_of_a_run_are_json_whatever_its_numbers_are_and_are_read_back(tmp_path):
    pictures = Pictures(
        ["a\ncat"], [1], torch.rand(1, 3, 16, 16), {"r": [math.nan], "s": [None]}, {"x": [(math.inf, {1: -math.inf})]}
    )
    folder = RunFolder(tmp_path, FlowPipeline.from_pipeline(tiny_sd3()), True)
    folder.write_sheet(pictures, pictures, 3)
    samples = strictly(tmp_path / "samples" / "step-000003.json")
    assert samples["base"] == {"r": [None], "s": [None]}
    assert samples["extra"] == {"x": [[None, {"1": None}]]}
    folder.rows = {"base": {"r": math.nan, "s": 0.5}, "tuned": {"r": math.inf}}
    folder.write_facts(tmp_path, {}, {"training": 1.04}, facts())
    assert strictly(tmp_path / "metrics.json") == {
        "base": {"r": None, "s": 0.5}, "tuned": {"r": None}, "seconds": {"training": 1.0}
    }  # fmt: skip
    again = RunFolder(tmp_path, folder.flow, True)
    again.take_up_evaluation(tmp_path, 3)
    assert math.isnan(again.rows["base"]["r"])
    assert again.rows["base"]["s"] == 0.5
    before = (tmp_path / "metrics.json").read_text(), (tmp_path / "README.md").read_text()
    again.write_facts(tmp_path, {}, {"training": 1.04}, facts())
    assert (before[0], before[1]) == ((tmp_path / "metrics.json").read_text(), (tmp_path / "README.md").read_text())
    assert "| base | — | 0.500 |" in before[1]


def test_a_run_whose_judge_gives_nothing_leaves_json_and_goes_on_from_its_checkpoint(tmp_path):
    @differentiable
    def mean(images, log_metric, **columns):
        log_metric("broken", math.nan)
        return images.mean(dim=(1, 2, 3))

    def run(**settings):
        return adjoint_matching(
            tmp_path, tiny_sd3(), reward=mean, eval_dataset=Dataset.from_dict({"prompt": ["a cat"]}),
            save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, **settings,
        )  # fmt: skip

    run(max_steps=1).train()
    assert strictly(tmp_path / "checkpoint-1" / "metrics.json")["tuned"]["broken"] is None
    again = run(max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert "| tuned |" in (tmp_path / "checkpoint-2" / "README.md").read_text()
    for file in [*tmp_path.glob("samples/*.json"), *tmp_path.glob("checkpoint-*/metrics.json")]:
        strictly(file)


# ---- the base model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stabilityai/stable-diffusion-3.5-medium", "model", "flowrl_trainers.shapes"])
def test_a_hub_id_names_the_base_model(name):
    pipeline = tiny_sd3()
    pipeline.register_to_config(_name_or_path=name)
    assert FlowPipeline.from_pipeline(pipeline).name == name


@pytest.mark.parametrize(
    "name",
    ["/models/sd3", "./sd3", "../sd3", "~/sd3", "C:\\models\\sd3", "models\\sd3", "a/b/c", "models/sd3/", "a b/c", ".",
     "models/sd3.git", "", None],
)  # fmt: skip
def test_a_path_never_names_the_base_model(name):
    pipeline = tiny_sd3()
    pipeline.register_to_config(_name_or_path=name)
    flow = FlowPipeline.from_pipeline(pipeline)
    assert flow.name is None
    assert flow.advice(20) == []


def test_a_folder_loaded_elsewhere_stays_a_folder(tmp_path, monkeypatch):
    """Wrapped where it was found, or, by the path that its transformer notes, wrapped where it is no longer found."""
    monkeypatch.chdir(tmp_path)
    tiny_sd3().save_pretrained("models/mine")
    pipeline = StableDiffusion3Pipeline.from_pretrained("models/mine")
    before = FlowPipeline.from_pipeline(pipeline)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert before.name is None
    assert FlowPipeline.from_pipeline(pipeline).name is None
    other = tiny_sd3()
    other.register_to_config(_name_or_path="models/mine")
    monkeypatch.chdir(tmp_path)
    found = FlowPipeline.from_pipeline(other)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert found.name is None


# ---- the adapter's bytes --------------------------------------------------------------------------------------------


def adapted_flow() -> FlowPipeline:
    """A tiny pipeline with an adapter of fixed weights, whose configuration holds sets and non-ASCII text."""
    flow = FlowPipeline.from_pipeline(tiny_sd3())
    layers = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj"]
    torch.manual_seed(1)
    flow.transformer.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=layers, revision="rouge-é"))
    for name, parameter in flow.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return flow


def hashes_of_adapters(folder: Path, count: int) -> set[str]:
    flow = adapted_flow()
    for i in range(count):
        flow.save_lora(folder / str(i))
    files = folder.glob("*/pytorch_lora_weights.safetensors")
    return {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_adapters_of_the_same_weights_are_the_same_bytes_in_every_process(tmp_path):
    """Eight saves, two orders of hashing; safetensors alone shuffles two keys, so a miss would be one in 128."""
    found = set()
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        script = (
            "from pathlib import Path; from tests.test_card import hashes_of_adapters; "
            f"print(*hashes_of_adapters(Path({str(tmp_path / seed)!r}), 4))"
        )
        environment = os.environ | {"PYTHONHASHSEED": seed}
        root = Path(__file__).parents[1]
        run = subprocess.run([sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        found |= set(run.stdout.split())
    assert len(found) == 1


def test_the_stock_loader_reads_the_adapter_with_its_metadata(tmp_path):
    flow = adapted_flow()
    flow.save_lora(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        assert metadata["format"] == "pt"
        described = json.loads(metadata["lora_adapter_metadata"])
        assert described["transformer.lora_alpha"] == 8
        assert described["transformer.revision"] == "rouge-é"
    assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 8 == 0
    stock = tiny_sd3()
    stock.load_lora_weights(tmp_path)
    ours = get_peft_model_state_dict(flow.transformer, adapter_name="default")
    theirs = get_peft_model_state_dict(stock.transformer, adapter_name="default_0")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert stock.transformer.peft_config["default_0"].lora_alpha == 8
