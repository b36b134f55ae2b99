"""Statistics that show when a model draws for the reward alone: noise and speckle, washed-out or garish colours."""

import torch
from torch import Tensor

EDGE = 0.1  # a step of brightness between neighbouring pixels that people can see
LEVELS = 4  # per colour channel


def edge_density(images: Tensor) -> Tensor:
    """The share of pairs of neighbouring pixels whose brightness differs by more than 0.1: (B,) in [0, 1].

    images: (B, 3, H, W) in [0, 1]. Neighbours lie beside or below each other; brightness is the mean of the channels.
    Speckle raises the share, blur and empty pictures lower it.
    """
    brightness = images.mean(dim=1)
    across, down = (brightness.diff(dim=dim).abs() > EDGE for dim in (2, 1))
    return (across.flatten(1).sum(dim=1) + down.flatten(1).sum(dim=1)) / (across[0].numel() + down[0].numel())


def colour_entropy(images: Tensor) -> Tensor:
    """The entropy of the colours of a picture in bits, with four levels per channel: (B,) in [0, 6].

    images: (B, 3, H, W) in [0, 1]. A picture of one colour has 0, one that uses all 64 colours evenly has 6.
    """
    level = (images * LEVELS).long().clamp(0, LEVELS - 1)
    colour = (level[:, 0] * LEVELS + level[:, 1]) * LEVELS + level[:, 2]
    of_picture = colour.flatten(1) + LEVELS**3 * torch.arange(len(images), device=images.device)[:, None]
    counts = torch.bincount(of_picture.flatten(), minlength=len(images) * LEVELS**3).reshape(len(images), -1)
    shares = counts / colour[0].numel()
    return torch.special.entr(shares).sum(dim=1) / torch.log(shares.new_tensor(2.0))
