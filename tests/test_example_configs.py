"""Every YAML file of `examples/configs/` and `examples/recipes/`, started by its script of `examples/scripts/`, with
tiny random weights in place of the published ones.
"""

import re
import runpy
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from flowrl_trainers.cli.arguments import TRAINERS, parse
from flowrl_trainers.rewards.named import NAMED_REWARDS
from flowrl_trainers.sit import SiTPipeline

from .tiny import tiny_sd3
from .tiny_families import tiny
from .tiny_sit import CLASSES, original_checkpoint, tiny_sit

EXAMPLES = Path(__file__).parent.parent / "examples"
CONFIGS, RECIPES, SCRIPTS = EXAMPLES / "configs", EXAMPLES / "recipes", EXAMPLES / "scripts"
HEADER = re.compile(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$")  # as PEP 723 reads it
SMALL = [
    "--max_steps", "1", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1",
    "--num_generations", "2", "--eval_strategy", "no", "--log_images", "2", "--use_cpu", "true", "--bf16", "false",
    "--report_to", "none", "--disable_tqdm", "true",
]  # fmt: skip
PICTURE = ["--height", "32", "--width", "32", "--max_sequence_length"]
FAMILIES = {
    "stable_diffusion_3_5_medium": [*PICTURE, "8"],
    "flux_2_klein_4b": [*PICTURE, "64"],
    "sit_xl_2": [],
}
RUNS = [(method, family) for method in TRAINERS for family in FAMILIES]
FAST = {  # every trainer, every family
    ("adjoint_matching", "stable_diffusion_3_5_medium"), ("vgg_flow", "flux_2_klein_4b"),
    ("ac_flow", "sit_xl_2"), ("tafs_grpo", "stable_diffusion_3_5_medium"),
    ("diffusion_nft", "sit_xl_2"),
}  # fmt: skip

RECIPES_OF: dict[str, tuple[str, Callable[[], Any], list[str]]] = {  # the method, tiny weights, and their settings
    "16_gb_stable_diffusion_3_5_medium": ("ac_flow", tiny_sd3, FAMILIES["stable_diffusion_3_5_medium"]),
    "24_gb_flux_1_dev": ("ac_flow", lambda: tiny("flux"), [*PICTURE, "64"]),
    "48_gb_qwen_image": ("diffusion_nft", lambda: tiny("qwen image"), [*PICTURE, "64"]),
    "80_gb_flux_2_dev": ("diffusion_nft", lambda: tiny("flux 2"), [*PICTURE, "64"]),
}


def names_of_classes() -> list[str]:
    return [name for file in ("classes", "held_out_classes") for name in lines(f"{file}.txt")]


def lines(file: str) -> list[str]:
    return (CONFIGS / file).read_text().splitlines()


def tiny_sit_of_classes(folder: Path) -> SiTPipeline:
    """A SiT that knows the classes of the examples by their names."""
    checkpoint, names = original_checkpoint(), names_of_classes()
    table = checkpoint["y_embedder.embedding_table.weight"]
    checkpoint["y_embedder.embedding_table.weight"] = table[torch.arange(len(names) + 1) % (CLASSES + 1)]
    torch.save(checkpoint, folder / "original.pt")
    return tiny_sit(folder / "original.pt", names)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The tiny pipelines as folders, as a published one lies on a disk."""
    folder = tmp_path_factory.mktemp("models")
    pipelines = (tiny_sd3, lambda: tiny("flux 2 klein distilled"), lambda: tiny_sit_of_classes(folder))
    for family, make in zip(FAMILIES, pipelines, strict=True):
        make().save_pretrained(folder / family)
    return {family: folder / family for family in FAMILIES}


@pytest.fixture
def start(tmp_path, monkeypatch, make_reward):
    """Run a script with arguments in this process, with tiny rewards under the names of the published ones."""
    monkeypatch.chdir(tmp_path)
    for module, name in (("quiet", "hush"), ("memory", "keep_freed_memory")):  # settings of the whole process
        monkeypatch.setattr(f"flowrl_trainers.cli.{module}.{name}", lambda: None)
    for name, make in make_reward.items():
        monkeypatch.setitem(NAMED_REWARDS, name, lambda make=make: make(torch.float32))

    def run(method: str, *arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", [f"{method}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPTS / f"{method}.py"), run_name="__main__")
        assert ended.value.code == 0

    return run


@pytest.mark.parametrize(
    ("method", "family"),
    [run if run in FAST else pytest.param(*run, marks=pytest.mark.slow) for run in RUNS],
)
def test_a_config_trains_with_tiny_weights_of_its_family(tmp_path, start, folders, method, family):
    file = CONFIGS / f"{method}_{family}.yaml"
    start(
        method, "--config", file, "--model", folders[family], "--output_dir", tmp_path / "out", *SMALL, *FAMILIES[family]
    )  # fmt: skip
    rows = yaml.safe_load((tmp_path / "out" / "metrics.json").read_text())
    written = yaml.safe_load(file.read_text())
    for row in ("base", "tuned"):
        assert {f"reward/{name}" for name in written["reward_funcs"] + written["eval_reward_funcs"]} <= set(rows[row])
    assert rows["base"] != rows["tuned"]
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


def test_a_reward_in_the_script_is_named_by_main(tmp_path, start):
    code = "def brightness(images, prompts, **columns):\n    return images.mean(dim=(1, 2, 3))\n\n\n"
    script = tmp_path / "ac_flow.py"
    script.write_text((SCRIPTS / "ac_flow.py").read_text().replace("if __name__", f"{code}if __name__"))
    assert code in script.read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "SCRIPTS", tmp_path)
        start(
            "ac_flow", "--model", "shapes", "--dataset", "shapes", "--reward_funcs", "__main__.brightness",
            "--output_dir", tmp_path / "out", "--num_inference_steps", "2",
            "--guidance_scale", "1", "--max_sequence_length", "8", *SMALL,
        )  # fmt: skip
    assert "__main__.brightness" in (tmp_path / "out" / "config.yaml").read_text()


@pytest.mark.parametrize("name", RECIPES_OF)
@pytest.mark.slow
def test_a_recipe_trains_with_tiny_weights_of_its_family(tmp_path, start, name):
    """But in 8 bits where it asks for 4, which a GPU alone has."""
    method, make, settings = RECIPES_OF[name]
    make().save_pretrained(tmp_path / "model")
    file = RECIPES / f"{name}.yaml"
    written = yaml.safe_load(file.read_text())
    bits = [f"--{setting}=int8" for setting, value in written.items() if value == "nf4"]
    start(
        method, "--config", file, "--model", tmp_path / "model", "--output_dir", tmp_path / "out", *SMALL, *bits,
        *settings,
    )  # fmt: skip
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    rows = yaml.safe_load((tmp_path / "out" / "metrics.json").read_text())
    assert {f"reward/{reward}" for reward in written["reward_funcs"] + written["eval_reward_funcs"]} <= set(
        rows["base"]
    )


def test_recipes_say_what_they_are_for_and_that_no_gpu_has_run_them():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(RECIPES_OF)
    for name, (method, _, _) in RECIPES_OF.items():
        first, second = (RECIPES / f"{name}.yaml").read_text().splitlines()[:2]
        assert first.startswith(f"# flowrl {method} --config examples/recipes/{name}.yaml")
        assert f"of {name.split('_')[0]} GB" in second
        assert second.endswith("written from `flowrl estimate`, not run on a GPU.")


def test_there_is_a_config_for_every_trainer_and_family():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {f"{method}_{family}" for method, family in RUNS}


@pytest.mark.parametrize(("method", "family"), RUNS)
def test_a_config_says_how_it_is_started_and_is_understood_as_it_stands(tmp_path, method, family):
    file = CONFIGS / f"{method}_{family}.yaml"
    first = file.read_text().splitlines()[0]
    assert first == f"# flowrl {method} --config examples/configs/{file.name}"
    args, config = parse(
        method,
        TRAINERS[method].config_class,
        ["--config", str(file), "--use_cpu", "true", "--output_dir", str(tmp_path)],
        {},
    )
    assert set(args.reward_funcs) | set(args.eval_reward_funcs) <= set(NAMED_REWARDS) - {"shapes", "checker"}
    assert not set(args.reward_funcs) & set(args.eval_reward_funcs)  # a judge that training never sees
    if method in ("adjoint_matching", "vgg_flow"):
        assert all(NAMED_REWARDS[name].differentiable for name in args.reward_funcs)
    assert Path(args.dataset).is_file()
    assert Path(str(args.eval_dataset)).is_file()
    assert config.images_per_update % config.num_generations == 0


def test_held_out_prompts_are_no_training_prompts():
    for kind in ("prompts", "classes"):
        training, held_out = lines(f"{kind}.txt"), lines(f"held_out_{kind}.txt")
        assert not set(training) & set(held_out)
        assert len(set(training)) == len(training)
        assert len(held_out) >= 8


@pytest.mark.parametrize("method", TRAINERS)
def test_a_script_carries_metadata_that_uv_and_hf_jobs_read(method):
    script = (SCRIPTS / f"{method}.py").read_text()
    (header,) = HEADER.finditer(script)
    content = "\n".join(line.removeprefix("#").removeprefix(" ") for line in header["content"].splitlines())
    metadata = SimpleNamespace(**{name.replace("-", "_"): value for name, value in tomllib.loads(content).items()})
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]
    assert metadata.requires_python == project["requires-python"]
    assert metadata.dependencies == [f"{project['name']} @ git+{project['urls']['Repository']}"]
    assert set(metadata.tool["hf-jobs"]) == {"flavor", "timeout", "secrets"}
    assert f'main(["{method}", ' in script
    assert f"uv run examples/scripts/{method}.py" in script
