"""DiNa-LRM on a tiny random checkpoint in the published layout, against a computation of its own."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import gelu, linear, silu

from flowrl_trainers.rewards.dina_lrm import Backbone, DiNaLRM
from flowrl_trainers.rewards.dina_lrm_head import RewardHead

from .helpers import make_trainer, update_rows
from .tiny import tiny_sd3

LAYERS, HEADS, SIGMA = [0, 1], 2, 0.4  # of a transformer of two layers, the second of which has no text after it
TARGETS = ["to_q", "to_v", "to_out.0", "add_k_proj"]


def randomised(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dina")
    torch.manual_seed(3)
    transformer = tiny_sd3().transformer
    adapted = get_peft_model(Backbone(transformer, 1), LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder / "checkpoint" / "backbone_lora")
    head = RewardHead(transformer.inner_dim, (2, 2), num_attn_heads=HEADS)
    randomised(head)
    torch.save(head.state_dict(), folder / "checkpoint" / "rm_head.pt")
    model = {
        "backbone_model_id": "no/such/folder", "num_transformer_layers": 1, "use_lora": True, "visual_head_idx": LAYERS,
        "text_head_idx": LAYERS, "reward_head": {"width": -1, "num_queries": 4, "num_attn_heads": HEADS, "dropout": 0.0},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"model": model}))
    return folder


def official_score(folder, pipeline, latents, prompts):
    """By hooks in the whole transformer, whose weights got the LoRA, and the head written out."""
    saved = load_file(folder / "checkpoint" / "backbone_lora" / "adapter_model.safetensors")
    lora = {
        k.removeprefix("base_model.model.").replace(".lora_", ".").removesuffix(".weight"): v for k, v in saved.items()
    }
    transformer = pipeline.transformer
    with torch.no_grad():
        for name, module in transformer.named_modules():
            if f"{name}.A" in lora:
                module.weight += 2 * lora[f"{name}.B"] @ lora[f"{name}.A"]
    tokens, _, pooled, _ = pipeline.encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=False)
    sigma = pipeline.scheduler.sigmas[(pipeline.scheduler.sigmas - SIGMA).abs().argmin()]
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0))
    kept = {}
    block = transformer.transformer_blocks[0]
    first = block.register_forward_hook(lambda m, a, given, out: kept.update(given, out=out), with_kwargs=True)
    transformer((1 - sigma) * latents + sigma * noise, tokens, pooled, (1000 * sigma).expand(len(latents)))
    first.remove()
    text, picture = kept["out"]
    w = torch.load(folder / "checkpoint" / "rm_head.pt")
    return head_score(w, [kept["hidden_states"], picture], [kept["encoder_hidden_states"], text], kept["temb"])


def head_score(w, pictures, texts, level):
    def affine(name, x):
        return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name, x):
        return x / (x.square().mean(dim=-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * w[f"{name}.weight"]

    def tokens(kind, layers):
        parts = []
        for i, x in enumerate(layers):
            adapter = f"layer_adapters_{kind}.{i}"
            scale, shift = affine(f"{adapter}.cond_mlp.2", silu(affine(f"{adapter}.cond_mlp.0", level)))[
                :, None
            ].chunk(2, -1)
            parts.append(affine(f"{adapter}.proj", x * (1 + scale) + shift + w[f"{adapter}.layer_embed"]))
        return affine(f"agg_{kind}", torch.cat(parts, dim=-1))

    def attention(q, k, v):
        q, k, v = (x.unflatten(-1, (HEADS, -1)) for x in (q, k, v))
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(dim=-1), v).flatten(2)

    def gate(name, x):
        return affine(f"{name}.2", silu(affine(f"{name}.0", x))).sigmoid()

    seen, read = tokens("visual", pictures), tokens("text", texts)
    queries = w["query_tokens"].expand(len(seen), -1, -1)
    q, x, t = (
        affine("attn1.to_q", norm("attn1.norm_q", queries)),
        norm("attn1.norm_v", seen),
        norm("attn1.norm_t", read),
    )
    found = attention(q, affine("attn1.to_k_vis", x), affine("attn1.to_v_vis", x) * gate("attn1.gate_vis", x))
    found = found + attention(
        q, affine("attn1.to_k_text", t), affine("attn1.to_v_text", t) * gate("attn1.gate_text", t)
    )
    queries = queries + affine("attn1.to_out.0", found)
    q, x = affine("attn2.to_q", norm("attn2.norm_q", queries)), norm("attn2.norm_v", seen)
    queries = queries + affine(
        "attn2.to_out.0", attention(q, affine("attn2.to_k_vis", x), affine("attn2.to_v_vis", x))
    )
    queries = queries + affine("ff.2", gelu(affine("ff.0", norm("norm_ff", queries))))
    return (affine("head", queries).mean(dim=(1, 2)) + 10) / 10


def test_scores_are_those_of_the_official_computation(checkpoint):
    pipeline, prompts = tiny_sd3(), ["a red circle", "a blue square", "a red circle"]
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    reward = DiNaLRM(checkpoint, pipeline=pipeline)
    assert all(torch.equal(before[name], value) for name, value in pipeline.transformer.state_dict().items())
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    x = latents.clone().requires_grad_()
    scores = reward(latents=x, prompts=prompts)
    torch.testing.assert_close(scores, official_score(checkpoint, pipeline, latents, prompts), atol=1e-5, rtol=1e-5)
    assert scores.std() > 2e-3
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    direction = torch.randn_like(latents)
    with torch.no_grad():
        ahead, behind = (reward(latents=latents + h * direction, prompts=prompts).sum() for h in (1e-2, -1e-2))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / 2e-2, atol=1e-3, rtol=1e-2)


def test_a_pipeline_by_folder_gives_the_same_scores(checkpoint, tmp_path):
    tiny_sd3().save_pretrained(tmp_path)
    latents, prompts = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)), ["a red circle"] * 2
    loaded, by_folder = (DiNaLRM(checkpoint, pipeline=source) for source in (tiny_sd3(), tmp_path))
    assert by_folder.pipeline.transformer is None
    by_folder.to(torch.device("cpu"))
    torch.testing.assert_close(by_folder(latents, prompts), loaded(latents, prompts), atol=1e-6, rtol=1e-5)


def test_a_run_trains_on_it(checkpoint, tmp_path):
    pipeline = tiny_sd3()
    t = make_trainer("AdjointMatchingTrainer", tmp_path, pipeline, reward=DiNaLRM(checkpoint, pipeline=pipeline))
    t.train()
    assert all(row["reward_gradient_norm"] > 0 for row in update_rows(t))


def test_other_checkpoints_are_refused(checkpoint, tmp_path):
    with pytest.raises(
        ValueError, match=r"has no config.json: pass a checkpoint with config.json, checkpoint/backbone"
    ):
        DiNaLRM(tmp_path)
    with pytest.raises(ValueError, match=r"`checkpoint` \('no/such'\) cannot be had: pass a folder or a Hub id"):
        DiNaLRM("no/such")
    with pytest.raises(ValueError, match=r"`noise_level` \(1.5\) must be at least 0 and below 1"):
        DiNaLRM(checkpoint, noise_level=1.5)
    with pytest.raises(
        ValueError, match=r"`pipeline` \('no/such/folder'\) cannot be had: pass the Stable Diffusion 3.5"
    ):
        DiNaLRM(checkpoint)
