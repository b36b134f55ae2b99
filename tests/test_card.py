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
from huggingface_hub import ModelCard, constants
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open

from flowrl_trainers.cli import main
from flowrl_trainers.pipelines import FlowPipeline
from flowrl_trainers.rewards import differentiable
from flowrl_trainers.run_folder import CardFacts, RunFolder, model_card
from flowrl_trainers.run_folder.card import write_card
from flowrl_trainers.run_folder.curve import draw_reward_curve
from flowrl_trainers.run_folder.licence import licence_of
from flowrl_trainers.sampling.pictures import Pictures

from .helpers import FORMS, adjoint_matching, check_card, code_block, make_trainer
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
        sampling={"negative_prompt": text, "sigmas": [1.0, 0.5]}, prompt=text, licence={"license": text},
        rows={text: {text: 0.25}, "tuned": {text: 0.5}}, gallery=[{"prompt": text, "seed": 3, "picture": "p.png"}],
    ), text)  # fmt: skip
    card.encode()
    seen = rendered(card)
    shown = flat(text)
    assert seen["h1"] == [shown]
    assert seen["h2"] == ["What it brought", "Use", "How it was trained", "Cite"]
    assert [cell.strip() for cell in seen["th"]] == ["", shown, "tuned", "tuned - base", "setting", "value"]
    assert [cell.strip() for cell in seen["td"]] == [shown, "0.250", "0.500", "—", shown, shown]
    assert seen["a"] == [shown]
    assert len(seen["p"]) == 5
    assert len(seen["pre"]) == 3
    assert f"  title = {{{shown}}}" in seen["pre"][-1]
    assert (
        seen["p"][0]
        == f"A LoRA for {shown}, tuned by {shown} to raise {shown} and to lower other (weight 0.5) with flowrl-trainers."
    )
    assert not set(seen) - {
        "h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "pre", "a", "gallery", "details",
        "summary",
    }  # fmt: skip
    head = ModelCard(card).data
    assert head.library_name == "diffusers"
    if "\udc80" not in text:
        assert text in head.tags
        assert (head.license, head.datasets, head.base_model) == (text, [text], text)
        assert head["widget"] == [{"text": text, "output": {"url": "p.png"}}]
        assert f"reward-model:{text}" in head.tags


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
    assert "| reward/redness |" in card
    assert 'pipe(prompt="your prompt", negative_prompt="it\'s", num_inference_steps=4)' in card


def test_a_number_that_is_missing_or_not_finite_is_a_dash():
    rows = {"base": {"a": math.nan, "b": -math.inf}, "tuned": {"a": 0.5, "b": None, "c": 1.0}}
    card = model_card(facts(rows=rows))
    assert "| a | — | 0.500 | — |" in card
    assert "| b | — | — | — |" in card
    assert "| c | — | 1.000 | — |" in card
    (a, c) = ModelCard(card, ignore_metadata_errors=False).data.eval_results
    assert (a.metric_type, a.metric_value, c.metric_type, c.metric_value) == ("a", 0.5, "c", 1.0)


@pytest.mark.parametrize("name", FORMS)
def test_the_code_of_the_card_draws_what_the_trainer_draws(tmp_path, name):
    """Of Stable Diffusion 3; the tests of the other families run theirs after an update."""
    t = make_trainer(name, tmp_path, max_steps=1, learning_rate=0.05)
    t.train()
    t.save_model()
    check_card(t, tiny_sd3())


OTHER = {"license": "other", "license_name": "a-licence", "license_link": "https://huggingface.co/a/b/blob/main/L"}


@pytest.mark.parametrize("licence", [{}, {"license": "apache-2.0"}, OTHER])
def test_the_metadata_is_what_the_hub_reads(licence):
    """Parsed by the Hub's own classes, which raise for a model-index that they do not know."""
    gallery = [{"prompt": "a red circle", "seed": 7, "picture": "samples/tuned-000003-0.png"}]
    text = model_card(facts(licence=licence, gallery=gallery, dataset="somebody/prompts"))
    card = ModelCard(text, ignore_metadata_errors=False)
    data = card.data
    assert {name: data.get(name) for name in ("license", "license_name", "license_link") if data.get(name)} == licence
    assert ("## Licence" in text) == ("--license" in text) == (not licence)
    (result,) = data.eval_results
    assert (result.task_type, result.dataset_type, result.dataset_name) == (
        "text-to-image", "somebody/prompts", "held-out prompts",
    )  # fmt: skip
    assert (data.model_name, result.metric_type, result.metric_value) == ("red", "reward/redness", 0.4)
    assert (data.base_model, data["base_model_relation"]) == ("somebody/model", "adapter")
    assert data["widget"] == [{"text": "a red circle", "output": {"url": "samples/tuned-000003-0.png"}}]
    assert "<Gallery />" in card.text
    assert 'prompt="a red circle"' in card.text
    assert "generator=torch.Generator().manual_seed(7)" in card.text
    assert "eprint = {2605.06583}" in card.text


def test_a_seed_is_not_shown_where_it_draws_another_picture():
    gallery = [{"prompt": "a red circle", "seed": 7, "picture": "p.png"}]
    assert "manual_seed" not in model_card(facts(gallery=gallery, sampling_note="4 steps of the trained sampler"))


def test_a_card_is_written_again_from_its_folder(tmp_path, monkeypatch, capsys):
    """The same bytes, by a command that asks no Hub; with a licence that was named meanwhile; or it says what lacks."""
    for module, name in (("quiet", "hush"), ("memory", "keep_freed_memory")):  # settings of the whole process
        monkeypatch.setattr(f"flowrl_trainers.cli.{module}.{name}", lambda: None)
    (tmp_path / "config.yaml").write_text("model: somebody/model\nseed: 3\n")
    rows = {"base": {"r": math.nan}, "tuned": {"r": 0.5}}
    write_card(tmp_path, facts(rows=rows, settings={"betas": (0.9, 1e-5)}, command="flowrl ac_flow", versions={
        "flowrl-trainers": "0.0.1",
    }))  # fmt: skip
    written = (tmp_path / "README.md").read_bytes()
    assert b"seed: 3" in written
    assert b"Versions: flowrl-trainers 0.0.1." in written
    assert b"flowrl ac_flow\n" in written
    (tmp_path / "README.md").unlink()
    assert main(["card", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_bytes() == written
    assert (
        main(["card", str(tmp_path), "--license", "mit", "--hub_model_id", "me/red", "--dataset", "me/prompts"]) == 0
    )
    assert main(["card", str(tmp_path)]) == 0  # what was said stays
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.datasets) == ("mit", ["me/prompts"])
    assert 'load_lora_weights("me/red")' in card.text
    assert "## Licence" not in card.text
    assert main(["card", str(tmp_path / "elsewhere")]) == 2
    assert "has no card.json that can be read" in capsys.readouterr().err
    (tmp_path / "card.json").write_text('{"name": "red"}')
    assert main(["card", str(tmp_path)]) == 2
    assert "other facts than this version of flowrl-trainers knows" in capsys.readouterr().err


@pytest.mark.parametrize(("head", "licence"), [
    ("license: apache-2.0", {"license": "apache-2.0"}),
    ("license: other\nlicense_name: a\nlicense_link: LICENSE.md", {
        "license": "other", "license_name": "a", "license_link": "https://huggingface.co/a/base/blob/main/LICENSE.md",
    }),
    ("license: other\nlicense_link: https://x.org/L", {"license": "other", "license_link": "https://x.org/L"}),
    ("license: [mit, apache-2.0]", {}),
    ("tags: [a]", {}),
    ("license: [", {}),
])  # fmt: skip
def test_the_licence_of_a_base_model_is_read_from_the_cache(tmp_path, monkeypatch, head, licence):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--a--base" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--base" / "refs").mkdir()
    (tmp_path / "models--a--base" / "refs" / "main").write_text("0" * 40)
    (snapshot / "README.md").write_text(f"---\n{head}\n---\n# Base\n")
    assert licence_of("a/base") == licence_of("a/base", offline=True) == licence
    assert licence_of("a/other") == licence_of(None) == {}
    assert licence_of("flowrl_trainers.shapes") == {"license": "apache-2.0"}


def test_a_reward_curve_needs_two_points(tmp_path):
    history = [{"step": 1, "loss": 1.0, "reward/r": 0.1}, {"step": 1, "eval_reward/r": 0.2, "eval_base_reward/r": 0.1}]
    assert not draw_reward_curve(tmp_path / "curve.png", history, "r")
    assert draw_reward_curve(tmp_path / "curve.png", [*history, {"step": 2, "reward/r": 0.3}], "r")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


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
    assert "| r | — | — | — |" in before[1]
    assert "| s | 0.500 | — | — |" in before[1]


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


@pytest.mark.slow
def test_adapters_of_the_same_weights_are_the_same_bytes_in_every_process(tmp_path):
    """Eight saves, two orders of hashing; safetensors alone shuffles two keys, so a miss would be one in 128."""
    here, there = tmp_path / "here", tmp_path / "there"
    script = (
        "from pathlib import Path; from tests.test_card import hashes_of_adapters; "
        f"print(*hashes_of_adapters(Path({str(there)!r}), 4))"
    )
    for folder in (here, there):
        folder.mkdir()
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # another than this process's
    environment = os.environ | {"PYTHONHASHSEED": seed}
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(hashes_of_adapters(here, 4) | set(run.stdout.split())) == 1


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
