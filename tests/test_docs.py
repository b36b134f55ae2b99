"""What README and docs show is there, and what they show as code runs or can be built."""

import ast
import re
import runpy
import shlex
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig

from flowrl_trainers import FlowPipeline, trainers
from flowrl_trainers.cli.arguments import TRAINERS, parse

from .forked import flowrl, script
from .tiny_families import FAMILIES, tiny

ROOT = Path(__file__).parent.parent


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.S)


def test_the_script_of_the_readme_runs_as_it_stands(tmp_path):
    code = python_blocks(ROOT / "README.md")[1].replace("max_steps=20", "max_steps=1, log_images=2, use_cpu=True")
    code = code.replace('prompts("held_out")', 'prompts("held_out").select(range(4))')
    assert "max_steps=1," in code
    (tmp_path / "example.py").write_text(code)
    result = script(tmp_path / "example.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^reward/shapes +\S+ +\S+ +[+-]\S+$", result.stdout, flags=re.M)
    assert (tmp_path / "tuned-shapes" / "pytorch_lora_weights.safetensors").exists()


def test_the_reward_of_the_readme_is_one():
    scope: dict = {}
    exec(python_blocks(ROOT / "README.md")[0], scope)
    assert scope["redness"].name == "redness"
    assert scope["redness"].differentiable


def test_the_command_of_the_readme_tunes_for_own_prompts_and_an_own_reward(tmp_path):
    """As it stands, but for its length."""
    text = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"^flowrl adjoint_matching (--model shapes .*?)^```", text, flags=re.S | re.M)
    assert "--max_steps 20" in command
    (tmp_path / "my_rewards.py").write_text(python_blocks(ROOT / "README.md")[0])
    (listed,) = re.findall(r"^```text\n(.*?)^```", text, flags=re.S | re.M)
    for name in ("prompts", "held_out"):
        (tmp_path / f"{name}.txt").write_text(listed * 4)
    arguments = shlex.split(command.replace("\\\n", " ").replace("--max_steps 20", "--max_steps 1"))
    done = flowrl(tmp_path, "adjoint_matching", *arguments, "--use_cpu", "true")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^reward/redness +\S+ +\S+ +[+-]\S+$", done.stdout, flags=re.M)
    assert (tmp_path / "tuned-red" / "pytorch_lora_weights.safetensors").exists()
    assert list((tmp_path / "tuned-red" / "samples").glob("*.png"))
    assert "load_lora_weights" in (tmp_path / "tuned-red" / "README.md").read_text()


def test_the_example_of_a_model_of_ones_own_is_complete():
    scope: dict = {}
    exec(python_blocks(ROOT / "docs" / "custom_model.md")[0], scope)
    model = scope["TwoMoons"](lambda x, sigma: x)
    assert model.initial_latents(2).shape == (2, 2)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_yaml_example_is_understood(tmp_path, name):
    path = ROOT / "examples" / f"{name}.yaml"
    told, config = parse(
        name,
        TRAINERS[name].config_class,
        ["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu", "true"],
        {},
    )
    assert told.model == "shapes"
    assert config.max_steps == yaml.safe_load(path.read_text())["max_steps"]


@pytest.mark.parametrize(
    "name",
    ["RewardGradientConfig", "RenoisingConfig", "FlowRLConfig", *(t.config_class.__name__ for t in TRAINERS.values())],
)
def test_every_setting_stands_in_the_reference(name):
    config = getattr(trainers, name)
    page = runpy.run_path(str(ROOT / "docs" / "settings_tables.py"))["on_page_markdown"](
        (ROOT / "docs/reference/settings.md").read_text()
    )
    for field in fields(config):
        if field.name in config.__annotations__:
            assert (
                f"| `{field.name}` | `{field.default!r}` | {field.metadata['help'].replace('|', '&#124;')} |" in page
            )


def test_the_pages_of_the_navigation_exist():
    pages = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    assert len(pages) >= 8
    assert all((ROOT / "docs" / page).exists() for page in pages)


@pytest.mark.parametrize("method", TRAINERS)
def test_the_quick_start_of_a_method_runs(tmp_path, method, monkeypatch):
    """As it stands, but for sizes: one update of few pictures."""
    monkeypatch.chdir(tmp_path)
    code = python_blocks(ROOT / "docs" / f"{method}.md")[0]
    steps = "" if "num_inference_steps" in code else ", num_inference_steps=7"
    small = {
        r"\bmax_steps=\d+": f"max_steps=1, log_images=2, use_cpu=True, save_strategy='no'{steps}",
        r"per_device_train_batch_size=\d+": "per_device_train_batch_size=2",
        r"num_generations=\d+": "num_generations=2",
        r'prompts\("held_out"\)': 'prompts("held_out").select(range(2))',
    }
    for pattern, instead in small.items():
        code = re.sub(pattern, instead, code)
    assert "max_steps=1," in code
    scope: dict = {}
    exec(code, scope)
    assert {"reward/shapes", "checker_accuracy"} <= scope["trainer"].rows["tuned"].keys()
    assert list(tmp_path.glob("*/pytorch_lora_weights.safetensors"))
    assert list(tmp_path.glob("*/samples/*.png"))


@pytest.mark.parametrize("method", TRAINERS)
def test_a_formula_stands_beside_the_line_that_computes_it(method):
    """The title of a block names a function, and its lines stand there, in their order."""
    page = (ROOT / "docs" / f"{method}.md").read_text()
    found = re.findall(r'```python title="([\w/.]+): ([\w.]+)"\n(.*?)```', page, flags=re.S)
    assert len(found) >= 5
    for file, name, block in found:
        node: ast.AST = ast.parse((ROOT / file).read_text())
        for part in name.split("."):
            node = next(n for n in ast.walk(node) if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part)
        lines = [line.strip() for line in ast.unparse(node).splitlines()]
        for statement in ast.unparse(ast.parse(re.sub(r"\breturn ", "RETURN = ", block))).splitlines():
            statement = statement.replace("RETURN = ", "return ")
            assert statement in lines, (file, name, statement)
            lines = lines[lines.index(statement) :]


@pytest.mark.parametrize("page", ["adjoint_matching", "ac_flow", "tafs_grpo", "papers"])
def test_the_configurations_of_the_docs_are_accepted(tmp_path, page, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [b for b in python_blocks(ROOT / "docs" / f"{page}.md") if "Config(" in b and "Trainer(" not in b]
    assert blocks
    for block in blocks:
        exec(f"from flowrl_trainers import ACFlowConfig, AdjointMatchingConfig, TAFSGRPOConfig\n{block}", {})


def test_the_branch_in_the_guide_for_families_computes_what_the_family_does():
    (code,) = (block for block in python_blocks(ROOT / "docs" / "adding-a-model.md") if "def _branch" in block)
    scope: dict = {"torch": torch}
    exec(textwrap.dedent(code), scope)
    flow = FlowPipeline.from_pipeline(tiny("z image"), **FAMILIES["z image"][1], height=32, width=32)
    latents, sigma = flow.initial_latents(2), torch.tensor([0.7, 0.2])
    conditioning = flow.encode_prompts(["a cat", "a dog in the rain"])
    own = {name: value for name, value in conditioning.items() if not name.startswith("negative_")}
    assert torch.equal(
        scope["_branch"](flow, flow.transformer, latents, sigma, own),
        flow._branch(flow.transformer, latents, sigma, own),
    )


@pytest.mark.parametrize(("page", "folder"), [("guides/publish", "tuned-shapes"), ("tafs_grpo", "quick-tafs-grpo")])
def test_an_adapter_draws_as_the_docs_say(tmp_path, page, folder, shapes_pipeline, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flow = FlowPipeline.from_pipeline(shapes_pipeline)
    flow.transformer.add_adapter(LoraConfig(r=2, target_modules=flow.lora_target_modules, init_lora_weights=False))
    flow.save_lora(tmp_path / folder)
    (code,) = (block for block in python_blocks(ROOT / "docs" / f"{page}.md") if "load_lora_weights" in block)
    scope: dict = {}
    exec(code, scope)
    assert scope["image"].size == (32, 32)


def test_the_example_of_the_start_page_is_that_of_the_readme():
    def calls(code: str) -> list[str]:
        return [re.sub(r"\s*#.*", "", line) for line in code.splitlines()]

    assert calls(python_blocks(ROOT / "docs" / "index.md")[0]) == calls(python_blocks(ROOT / "README.md")[1])


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")], ids=lambda p: p.name
)
def test_what_a_page_links_to_or_includes_exists(path):
    text = path.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), target
    assert "--8 <" not in text  # what a formatter makes of an include in a block of code
    for target in re.findall(r'--8<-- "([^"]+)"', text):
        assert (ROOT / target).exists(), target


def sentences() -> list[str]:
    """The texts of the package, with a star for each value that is put into them."""
    found = []
    for path in (ROOT / "flowrl_trainers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "*" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[\w.]+", "*", node.value))
    return found


def test_the_questions_are_headed_by_sentences_of_the_package():
    headings = re.findall(r"^### `+(.+?)`+$", (ROOT / "docs" / "faq.md").read_text(), flags=re.M)
    assert len(headings) >= 20
    said = sentences()
    for heading in headings:
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in heading.split("…")))
        assert any(pattern.search(sentence) for sentence in said), heading


def test_what_a_run_survives_names_files_of_tests():
    named = set(re.findall(r"`(tests/\w+\.py)`", (ROOT / "docs" / "reliability.md").read_text()))
    assert len(named) >= 10
    assert all((ROOT / file).exists() for file in named)


def test_the_invariants_name_tests_that_exist():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (ROOT / "docs" / "invariants.md").read_text())
    assert len(named) >= 20
    for file, function in named:
        assert re.search(rf"^def {function}\(", (ROOT / file).read_text(), flags=re.M), f"{file}::{function}"
