"""`flowrl export_comfyui`: the names that ComfyUI's loader takes, and the strength that was trained."""

import re

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from flowrl_trainers.cli import main
from flowrl_trainers.cli.export_comfyui import export_comfyui
from flowrl_trainers.pipelines import FlowPipeline
from flowrl_trainers.run_folder.comfyui import comfyui_adapter

from .tiny import tiny_sd3
from .tiny_families import FAMILIES, tiny

# The layers for which ComfyUI takes `transformer.<diffusers' name>.lora_A.weight`, `.lora_B.weight` and `.alpha`, by the
# maps of its `comfy/utils.py` (`mmdit_to_diffusers`, `flux_to_diffusers`, ...) as they were in April 2026; for
# Qwen-Image these are its own names of layers.
JOINT = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
BLOCKS = rf"transformer_blocks\.\d+\.{JOINT}"
FLUX = rf"{BLOCKS}|single_transformer_blocks\.\d+\.attn\.to_[qkv]"
FLUX_2 = rf"{BLOCKS}|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
READ_BY_COMFYUI = {
    "flux": FLUX,
    "flux schnell": FLUX,
    "flux 2": FLUX_2,
    "flux 2 klein": FLUX_2,
    "flux 2 klein distilled": FLUX_2,
    "qwen image": BLOCKS,
    "z image": r"(layers|noise_refiner|context_refiner)\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)",
    "sana": None,
    "lumina 2": None,
    "aura flow": rf"joint_{BLOCKS}|single_transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0)",
    "cogview 4": None,
    "chroma": FLUX,
}


def flow_with_adapter(pipeline, **config) -> FlowPipeline:
    flow = FlowPipeline.from_pipeline(pipeline)
    torch.manual_seed(0)
    flow.transformer.add_adapter(LoraConfig(**{
        "r": 4, "lora_alpha": 12, "target_modules": flow.lora_target_modules, "init_lora_weights": False,
        "exclude_modules": list(flow.lora_exclude_modules) or None,
    } | config))  # fmt: skip
    return flow


def test_a_layer_gets_the_change_that_was_trained(tmp_path, monkeypatch, capsys):
    """ComfyUI adds alpha / rank times B A; ranks and alphas differ between layers here."""
    for module, name in (("quiet", "hush"), ("memory", "keep_freed_memory")):  # settings of the whole process
        monkeypatch.setattr(f"flowrl_trainers.cli.{module}.{name}", lambda: None)
    for rslora in (False, True):
        flow = flow_with_adapter(
            tiny_sd3(), use_rslora=rslora, rank_pattern={"attn.to_q": 2}, alpha_pattern={"attn.to_k": 5}
        )
        flow.save_lora(tmp_path)
        assert main(["export_comfyui", str(tmp_path)]) == 0
        tensors = load_file(tmp_path / "comfyui_lora.safetensors")
        layers = {name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")}
        assert len(tensors) == 3 * len(layers)
        for layer in layers:
            assert re.fullmatch(BLOCKS, layer.removeprefix("transformer."))
            a, b = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
            change = tensors[f"{layer}.alpha"] / len(a) * b @ a
            trained = flow.transformer.get_submodule(layer.removeprefix("transformer.")).get_delta_weight("default")
            torch.testing.assert_close(change, trained)
    assert main(["export_comfyui", str(tmp_path / "nothing")]) == 2
    assert "is no adapter of a run" in capsys.readouterr().err
    adapter = tmp_path / "pytorch_lora_weights.safetensors"
    before = adapter.read_bytes()
    assert main(["export_comfyui", str(tmp_path), str(adapter)]) == 2
    assert "is the adapter itself, which would be lost: name another file." in capsys.readouterr().err
    assert adapter.read_bytes() == before


@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_knows_the_layers_of_a_family_or_the_export_is_refused(tmp_path, family):
    flow = flow_with_adapter(tiny(family))
    flow.save_lora(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    known = READ_BY_COMFYUI[family]
    if known is None:
        with pytest.raises(ValueError, match="which ComfyUI does not know under that name"):
            comfyui_adapter(file)
        return
    layers = {re.sub(r"\.(lora_[AB]\.weight|alpha)$", "", name) for name in comfyui_adapter(file)}
    assert layers
    assert not [name for name in layers if not re.fullmatch(known, name.removeprefix("transformer."))]


def test_a_dora_is_refused(tmp_path):
    flow_with_adapter(tiny_sd3(), use_dora=True).save_lora(tmp_path)
    with pytest.raises(ValueError, match="ComfyUI is given plain LoRAs alone, without DoRA or biases"):
        comfyui_adapter(tmp_path / "pytorch_lora_weights.safetensors")


def test_an_export_goes_into_a_folder_or_says_why_it_cannot(tmp_path):
    flow_with_adapter(tiny_sd3()).save_lora(tmp_path)
    (tmp_path / "loras").mkdir()
    export_comfyui([str(tmp_path), str(tmp_path / "loras")])
    assert (tmp_path / "loras" / "comfyui_lora.safetensors").is_file()
    with pytest.raises(ValueError, match=r"none/a\.safetensors cannot be written \(.*\): name another file\.$"):
        export_comfyui([str(tmp_path), str(tmp_path / "none" / "a.safetensors")])


@pytest.mark.parametrize("damage", ["cut off", "no metadata"])
def test_a_file_that_is_no_adapter_of_a_run_is_refused(tmp_path, damage):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    flow_with_adapter(tiny_sd3()).save_lora(tmp_path)
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        save_file(load_file(file), file)
    with pytest.raises(ValueError, match=r"is no adapter of a run \(.*\): name the `output_dir` of a run\.$"):
        comfyui_adapter(file)
