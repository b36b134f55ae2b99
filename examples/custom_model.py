"""A plain network of 2-vectors, tuned by all five trainers in about a minute on a CPU."""

from copy import deepcopy

import torch
from datasets import Dataset
from torch import nn

import flowrl_trainers
from flowrl_trainers.rewards import differentiable


class Vectors(flowrl_trainers.FlowPipeline):
    def __init__(self, network):
        self.network = network

    @property
    def transformer(self):
        return self.network

    def encode_prompts(self, prompts):
        return {"nothing": torch.zeros(len(prompts), 1)}

    def initial_latents(self, batch_size, generator=None):
        generators = generator if isinstance(generator, list) else [generator] * batch_size
        return torch.cat([torch.randn(1, 2, generator=g) for g in generators])

    def velocity(self, transformer, latents, sigma, conditioning, *, guidance):
        return transformer(torch.cat([latents, sigma[:, None]], dim=1))

    def decode(self, latents):
        return latents

    images = decode


@differentiable
def to_the_right(images, prompts, **columns):
    return images[:, 0].clamp(max=2)


network = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
optimizer = torch.optim.Adam(network.parameters(), 3e-3)
for _ in range(1000):  # flow matching on a ring
    angle, noise, sigma = 2 * torch.pi * torch.rand(256), torch.randn(256, 2), torch.rand(256)
    data = torch.stack([angle.cos(), angle.sin()], dim=1)
    x = (1 - sigma[:, None]) * data + sigma[:, None] * noise
    loss = (network(torch.cat([x, sigma[:, None]], dim=1)) - (noise - data)).square().mean()
    optimizer.zero_grad(), loss.backward(), optimizer.step()
prompts = Dataset.from_dict({"prompt": [str(n) for n in range(256)]})
shared = {
    "per_device_train_batch_size": 128,
    "max_steps": 40,
    "learning_rate": 3e-3,
    "save_strategy": "no",
    "report_to": "none",
    "log_images": 0,
    "use_cpu": True,
    "disable_tqdm": True,
}
settings = {
    "AdjointMatching": {"adjoint_steps": 20, "control_to_velocity_ratio": 1.0},
    "VGGFlow": {"control_to_velocity_ratio": 1.0},
    "ACFlow": {"num_generations": 8},
    "DiffusionNFT": {"num_generations": 8},
    "TAFSGRPO": {"num_generations": 16},
}
for name, own in settings.items():
    trainer_class = getattr(flowrl_trainers, f"{name}Trainer")
    config = trainer_class.config_class(output_dir=f"custom-model/{name}", **shared, **own)
    trainer = trainer_class(Vectors(deepcopy(network)), to_the_right, config, prompts, eval_dataset=prompts)
    trainer.train()
    trainer.evaluate()
    print(name, *(f"{label} {row['reward/to_the_right']:.2f}" for label, row in trainer.rows.items()), sep="  ")
