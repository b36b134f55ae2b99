"""Train the pipeline that ships as `flowrl_trainers.shapes`, from a seed, on a CPU.

    python examples/train_shapes.py --out shapes-training

trains an autoencoder, a CLIP and an SD3 transformer (about half an hour on two idle cores) and writes them in half
precision where `flowrl_trainers.shapes.load_pipeline(out)` finds them. `train_shapes.log` holds the figures of each
part. `--scale 0.01` runs one hundredth of the updates. Start an interrupted run again to train the parts that it
lacks; every part draws from a separate generator.

The autoencoder and the CLIP see only correct captions. So does the transformer at first; then it trains on captions
that are wrong in a systematic way, as captions from the web are: each triangle, cross, blue or purple is replaced with
a probability of 0.4, triangle by cross, blue by purple and the reverse. Half of the captions of two objects then hold
such a mistake. Guidance corrects little of that, so a reward has something to teach.
"""

import argparse
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer, get_cosine_schedule_with_warmup

from flowrl_trainers.cli.memory import keep_freed_memory
from flowrl_trainers.shapes.checker import check
from flowrl_trainers.shapes.models import load_clip, load_pipeline, new_clip, new_tokenizer, new_transformer, new_vae
from flowrl_trainers.shapes.prompts import all_prompts, prompts
from flowrl_trainers.shapes.scenes import IMAGE_SIZE, SceneObject, draw, parse, random_scene

log = logging.getLogger("train_shapes")

Scene = Callable[[list[tuple[str, str]], np.random.Generator], list[SceneObject]]

CAPTIONS = all_prompts()
NUMBERS = {caption: number for number, caption in enumerate(CAPTIONS)}
SINGLES = 25  # the first captions name one object
BATCH = 64  # of the transformer
# A model that averages the two words of a pair must not draw a third word: halfway from yellow to blue lies green, and
# halfway from square to diamond a circle. Between the words of these pairs lies none.
SWAPS = {"triangle": "cross", "cross": "triangle", "blue": "purple", "purple": "blue"}
SWAP_PROBABILITY = 0.4  # of each such word


def arranged_scene(pairs: list[tuple[str, str]], rng: np.random.Generator) -> list[SceneObject]:
    """Objects in reading order: the first of two is on the left or at the top.

    If either object could be anywhere, a small transformer would need several times as many updates to learn which
    words describe which object.
    """
    shades = rng.uniform(0.85, 1.1, size=len(pairs))
    if len(pairs) == 1:
        places, sizes = rng.uniform(12.5, 19.5, size=(1, 2)), rng.uniform(7, 9, size=1)
    else:
        along, across = np.array([8.0, 24.0]) + rng.uniform(-0.8, 0.8, size=2), 16 + rng.uniform(-3, 3, size=2)
        places = np.stack([along, across] if rng.random() < 0.5 else [across, along], axis=1)
        sizes = rng.uniform(5.4, 6.2, size=2)
    objects = zip(pairs, places.tolist(), sizes.tolist(), shades.tolist(), strict=True)
    return [SceneObject(colour, shape, x, y, size, shade) for (colour, shape), (x, y), size, shade in objects]


def draw_pictures(count: int, rng: np.random.Generator, scene: Scene = random_scene) -> tuple[Tensor, Tensor]:
    """Pictures (count, 3, 32, 32) uint8 and their caption numbers (count,); a third of them show one object.

    Args:
        count: The number of pictures.
        rng: The generator of all random draws.
        scene: Makes the objects of a picture from pairs (colour, shape) and the generator.
    """
    single = rng.random(count) < 1 / 3
    numbers = np.where(single, rng.integers(SINGLES, size=count), rng.integers(SINGLES, len(CAPTIONS), size=count))
    pictures = [draw(scene(parse(CAPTIONS[n]), rng)) for n in tqdm(numbers, desc="pictures")]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(numbers)


def swap_words(numbers: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Swap words of captions at random. A caption that would then name one object twice stays as it is.

    Args:
        numbers: Caption numbers (B,).
        probability: The probability of each word in `SWAPS` to be swapped.
        generator: The generator of all random draws.

    Returns:
        Caption numbers (B,).
    """
    swapped = []
    for number in numbers.tolist():
        words = CAPTIONS[number].split(" ")
        coins = (torch.rand(len(words), generator=generator) < probability).tolist()
        text = " ".join(SWAPS.get(word, word) if coin else word for word, coin in zip(words, coins, strict=True))
        swapped.append(NUMBERS.get(text, number))
    return torch.tensor(swapped)


def batches(count: int, size: int, updates: int, generator: torch.Generator, label: str) -> Iterator[Tensor]:
    """The indices of random batches, with a progress bar.

    Args:
        count: The number of examples.
        size: The number of examples in a batch.
        updates: The number of batches.
        generator: The generator of all random draws.
        label: The title of the progress bar.
    """
    for _ in tqdm(range(updates), desc=label, mininterval=10):
        yield torch.randint(count, (size,), generator=generator)


def optimizer_and_schedule(
    parameters: Iterable[nn.Parameter], lr: float, updates: int, weight_decay: float = 0.01
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW whose learning rate rises to `lr` and falls to 0 along a cosine.

    Args:
        parameters: The parameters to train.
        lr: The largest learning rate.
        updates: The number of updates.
        weight_decay: The weight decay.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, min(200, updates // 10), updates)


def train_vae(pictures: Tensor, updates: int, generator: torch.Generator) -> AutoencoderKL:
    """Train an autoencoder on absolute pixel error plus a small KL term.

    Its shift and scale then give latents mean 0 and variance 1.

    Args:
        pictures: The pictures (N, 3, 32, 32) uint8.
        updates: The number of updates.
        generator: The generator of all random draws.
    """
    vae = new_vae()
    optimizer, schedule = optimizer_and_schedule(vae.parameters(), 2e-3, updates)
    for index in batches(len(pictures), 32, updates, generator, "autoencoder"):
        images = pictures[index].float() / 127.5 - 1
        posterior = vae.encode(images).latent_dist
        restored = vae.decode(posterior.sample(generator)).sample
        loss = (restored - images).abs().mean() + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    vae.eval().requires_grad_(False)
    latents = encode(vae, pictures[:4096])
    shift, scale = round(float(latents.mean()), 4), round(1 / float(latents.std()), 4)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The unscaled latents (B, 8, 8, 8) of uint8 pictures: the modes of the posteriors."""
    parts = tqdm(pictures.split(256), desc="encode")
    return torch.cat([vae.encode(p.float() / 127.5 - 1).latent_dist.mode() for p in parts])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures (B, 3, 32, 32) in [0, 1] of unscaled latents."""
    return torch.cat([(vae.decode(z).sample / 2 + 0.5).clamp(0, 1) for z in tqdm(latents.split(256), desc="decode")])


def roughen(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur a quarter of the pictures and add noise of random strength to all: the CLIP learns to judge such too."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.where(torch.rand(len(images), 1, 1, 1, generator=generator) < 1 / 4, blurred, images)
    strength = 0.1 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return images + strength * torch.randn(images.shape, generator=generator)


def train_clip(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    images: Tensor,
    numbers: Tensor,
    updates: int,
    generator: torch.Generator,
) -> None:
    """Train a CLIP to classify each picture by its scene, and each text to find its pictures in the batch.

    Captions of the same objects in either order are one scene, that is one class.

    Args:
        clip: The CLIP.
        tokenizer: Its tokenizer.
        images: The pictures (N, 3, 32, 32) in [0, 1].
        numbers: Their caption numbers (N,).
        updates: The number of updates.
        generator: The generator of all random draws.
    """
    tokens = tokenizer(CAPTIONS, padding="max_length", return_tensors="pt")
    scene_of = {scene: i for i, scene in enumerate(dict.fromkeys(frozenset(parse(c)) for c in CAPTIONS))}
    scenes = torch.tensor([scene_of[frozenset(parse(c))] for c in CAPTIONS])
    orders = torch.stack([torch.where(scenes == s)[0][[0, -1]] for s in range(len(scene_of))])
    optimizer, schedule = optimizer_and_schedule(clip.parameters(), 1e-3, updates, weight_decay=0.05)
    for index in batches(len(images), 96, updates, generator, "clip"):
        pixels = (roughen(images[index], generator) - 0.5) / 0.5
        order = torch.randint(2, (len(orders), 1), generator=generator)
        captions = orders.gather(1, order).squeeze(1)
        out = clip(tokens.input_ids[captions], pixels, tokens.attention_mask[captions])
        target = scenes[numbers[index]]
        by_text = out.logits_per_text[target.unique()]
        matches = target.unique()[:, None] == target
        retrieval = -(by_text.log_softmax(1) * matches).sum(1) / matches.sum(1)
        loss = F.cross_entropy(out.logits_per_image, target) + retrieval.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=float(np.log(100)))
    clip.eval().requires_grad_(False)


def save_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the CLIP in half precision, its tokenizer and an image processor.

    Afterwards `clip` is in float32 again, with the rounded weights.

    Args:
        clip: The CLIP.
        tokenizer: Its tokenizer.
        folder: The folder to write.
    """
    clip.half().save_pretrained(folder)
    clip.float()
    tokenizer.save_pretrained(folder)
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    half = [0.5] * 3
    size = {"shortest_edge": IMAGE_SIZE}
    CLIPImageProcessor(size=size, crop_size=square, image_mean=half, image_std=half).save_pretrained(folder)


@torch.no_grad()
def clip_accuracy(clip: CLIPModel, tokenizer: CLIPTokenizer, images: Tensor, numbers: Tensor) -> float:
    """The share of pictures that the best of all 625 captions describes.

    Args:
        clip: The CLIP.
        tokenizer: Its tokenizer.
        images: The pictures (N, 3, 32, 32) in [0, 1].
        numbers: Their caption numbers (N,).
    """
    tokens = tokenizer(CAPTIONS, padding="max_length", return_tensors="pt")
    parts = [clip(tokens.input_ids, (p - 0.5) / 0.5, tokens.attention_mask) for p in images.split(256)]
    best = torch.cat([part.logits_per_image.argmax(1) for part in parts])
    right = [set(parse(CAPTIONS[b])) == set(parse(CAPTIONS[n])) for b, n in zip(best, numbers, strict=True)]
    return float(np.mean(right))


@torch.no_grad()
def text_features(clip: CLIPModel, tokenizer: CLIPTokenizer) -> tuple[Tensor, Tensor]:
    """The features of the pipeline's two equal text encoders for every caption and, last, for the empty one.

    Returns the features of the tokens (626, L, 2 D) and of the captions (626, 2 D).
    """
    tokens = tokenizer([*CAPTIONS, ""], padding="max_length", return_tensors="pt")
    out = clip.text_model(tokens.input_ids, output_hidden_states=True)
    hidden, pooled = out.hidden_states[-2], clip.text_projection(out.pooler_output)
    return torch.cat([hidden, hidden], dim=-1), torch.cat([pooled, pooled], dim=-1)


def train_transformer(
    transformer: SD3Transformer2DModel,
    latents: Tensor,
    numbers: Tensor,
    hidden: Tensor,
    pooled: Tensor,
    updates: int,
    lr: float,
    swap_probability: float,
    generator: torch.Generator,
) -> None:
    """Flow matching: predict the velocity `noise - data` at `(1 - sigma) data + sigma noise`.

    At the end the transformer has the moving average of its weights. One caption in ten is empty, for guidance. Zero
    tokens stand for the missing T5; each batch draws their number between 1 and 256, mostly small, so that pictures do
    not depend on `max_sequence_length`.

    Args:
        transformer: The transformer.
        latents: The latents (N, 8, 8, 8) of the pictures, of mean 0 and variance 1.
        numbers: The caption numbers (N,) of the pictures.
        hidden: The features (626, L, 2 D) of the captions' tokens, from `text_features`.
        pooled: The features (626, 2 D) of the captions.
        updates: The number of updates.
        lr: The largest learning rate.
        swap_probability: The probability of each word in `SWAPS` to be swapped.
        generator: The generator of all random draws.
    """
    optimizer, schedule = optimizer_and_schedule(transformer.parameters(), lr, updates)
    ema = EMAModel(transformer.parameters(), decay=0.999, use_ema_warmup=True, power=0.75, foreach=True)
    total = 0.0
    for step, index in enumerate(batches(len(latents), BATCH, updates, generator, "transformer"), 1):
        caption = numbers[index].clone()
        if swap_probability:
            caption = swap_words(caption, swap_probability, generator)
        caption[torch.rand(BATCH, generator=generator) < 0.1] = len(CAPTIONS)
        uniform = torch.rand(BATCH, generator=generator)
        sigma = 2 * uniform / (1 + uniform)
        data, noise = latents[index], torch.randn(latents[index].shape, generator=generator)
        level = sigma[:, None, None, None]
        zeros = round(256 ** float(torch.rand(1, generator=generator) ** 5))
        context = F.pad(hidden[caption], (0, 0, 0, zeros))
        velocity = transformer((1 - level) * data + level * noise, context, pooled[caption], 1000 * sigma).sample
        loss = F.mse_loss(velocity, noise - data)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(transformer.parameters())
        total += float(loss.detach())
        if step % 500 == 0:
            log.info("transformer: update %d, mean loss %.4f", step, total / 500)
            total = 0.0
    ema.copy_to(transformer.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("shapes-training"), help="The folder that receives the weights and the log."
    )
    parser.add_argument("--seed", type=int, default=0, help="The seed of every random draw.")
    parser.add_argument("--scale", type=float, default=1.0, help="The factor on the numbers of pictures and updates.")
    parser.add_argument(
        "--threads", type=int, default=2, help="The number of CPU threads; the weights depend on it by rounding."
    )
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(args.out / "train_shapes.log")],
    )
    for noisy in ("httpx", "datasets", "diffusers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(args.seed)
    log.info("torch %s, seed %d, scale %g, %d threads", torch.__version__, args.seed, args.scale, args.threads)
    start = time.monotonic()

    def updates(count: int) -> int:
        return max(2, round(args.scale * count))

    def begin(part: int) -> torch.Generator:
        torch.manual_seed(args.seed + part)
        return torch.Generator().manual_seed(args.seed + part)

    def done(part: str, **figures: float | np.floating | Tensor) -> None:
        text, minutes = ", ".join(f"{k} {v:.4f}" for k, v in figures.items()), (time.monotonic() - start) / 60
        log.info("%s: %s; %.1f minutes so far", part, text, minutes)

    pictures, numbers = draw_pictures(max(600, round(75_000 * args.scale)), rng)
    fresh, fresh_numbers = draw_pictures(1000, rng)
    judged = [CAPTIONS[n] for n in fresh_numbers]
    done("pictures", checker_accuracy=np.mean(check(fresh / 255, judged)))

    if (args.out / "vae").exists():
        vae = AutoencoderKL.from_pretrained(args.out / "vae", dtype=torch.float32).eval().requires_grad_(False)
    else:
        vae = train_vae(pictures, updates(1300), begin(0)).half()
        vae.save_pretrained(args.out / "vae")
        vae.float()
    restored = decode(vae, encode(vae, fresh))
    done(
        "autoencoder",
        mean_absolute_error=(restored - fresh / 255).abs().mean(),
        checker_accuracy=np.mean(check(restored, judged)),
    )
    if (args.out / "clip").exists():
        clip, tokenizer = load_clip(args.out)
    else:
        some = len(pictures) // 3
        images = torch.cat([pictures[:some] / 255, decode(vae, encode(vae, pictures[some : 2 * some]))])
        image_numbers = numbers[: 2 * some]
        generator, tokenizer = begin(1), new_tokenizer()
        clip = new_clip(tokenizer)
        train_clip(clip, tokenizer, images, image_numbers, updates(1800), generator)
        save_clip(clip, tokenizer, args.out / "clip")
    done(
        "clip",
        top1_drawn=clip_accuracy(clip, tokenizer, fresh / 255, fresh_numbers),
        top1_restored=clip_accuracy(clip, tokenizer, restored, fresh_numbers),
    )
    rng = np.random.default_rng(args.seed + 2)
    pictures, numbers = draw_pictures(max(600, round(60_000 * args.scale)), rng, arranged_scene)
    asked = [CAPTIONS[n] for n in numbers[:1000]]
    done("arranged pictures", checker_accuracy=np.mean(check(pictures[:1000] / 255, asked)))
    latents = (encode(vae, pictures) - vae.config.shift_factor) * vae.config.scaling_factor
    data = latents, numbers, *text_features(clip, tokenizer)
    # The transformer learns the words sooner from correct captions; then a shorter part teaches it the confusion.
    clean, generator, transformer = args.out / "transformer_before_confusion.safetensors", begin(2), new_transformer()
    if clean.exists():
        transformer.load_state_dict(load_file(clean))
    else:
        train_transformer(transformer, *data, updates(5_000), 3e-3, 0.0, generator)
        save_file(transformer.state_dict(), clean)
    train_transformer(transformer, *data, updates(2_000), 1e-3, SWAP_PROBABILITY, begin(3))
    transformer.half().save_pretrained(args.out / "transformer")

    pipeline = load_pipeline(args.out)
    pipeline.set_progress_bar_config(disable=True)
    asked = list(prompts("held_out")["prompt"]) * (2 if args.scale == 1 else 1)
    drawn = []
    for number in tqdm(range(0, len(asked), 55), desc="held-out prompts"):
        drawn += [
            pipeline(
                asked[number : number + 55],
                guidance_scale=1.0,
                num_inference_steps=20,
                max_sequence_length=8,
                output_type="pt",
                generator=[torch.Generator().manual_seed(number + i) for i in range(len(asked[number : number + 55]))],
            ).images
        ]
    accuracy = np.mean(check(torch.cat(drawn), asked))
    done("stock pipeline, guidance 1, 20 steps, held-out prompts", checker_accuracy=accuracy)


if __name__ == "__main__":
    main()
