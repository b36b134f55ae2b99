"""How far two computations of one thing may end apart in float32, where only the order of sums differs.

Batch shape, number of threads and the CPU's vector width change that order. Each addition rounds to one unit roundoff,
2^-24, of what it adds; the signs of these errors are as good as random, so n of them in a row amount to sqrt(n), and
the largest of the thousands of numbers of a picture lies within five standard deviations:

    5 * 2^-24 * sqrt(n),    n = steps * (terms of the sums of the network) + (terms of the sums of the decoder)

for numbers of order one, as latents, velocities and pictures are. A sum of a layer has as many terms as the layer has
inputs (times the area of a convolution's kernel). A step moves the state by its share of the velocity alone, which
leaves room for guidance, whose scale amplifies the difference of two velocities. On the embedded pipeline with 4 steps
that makes 8e-5; 1.1e-5 was measured with AVX-512.
"""

import math

import torch
from torch import nn

from flowrl_trainers import FlowPipeline

UNIT_ROUNDOFF = 2**-24
DEVIATIONS = 5


def terms(network: nn.Module) -> int:
    """The terms of the sums of all its linear and convolutional layers, one after the other."""
    layers = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    return sum(layer.weight[0].numel() for layer in layers)


def rounding(count: int) -> float:
    """Of `count` additions in a row of numbers of order one."""
    return DEVIATIONS * UNIT_ROUNDOFF * math.sqrt(count)


def in_bfloat16(network: nn.Module) -> float:
    """Of a network's output, relative to it: sums are float32, and every layer rounds its output to 8 bits once."""
    layers = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm))]
    return DEVIATIONS * 2**-9 * math.sqrt(len(layers))


def of_velocities(flow: FlowPipeline, steps: int = 1) -> float:
    """Of the network's output after so many steps."""
    return rounding(steps * terms(flow.transformer))


def of_pictures(flow: FlowPipeline, steps: int) -> float:
    """Of pictures that were drawn in so many steps."""
    return rounding(steps * terms(flow.transformer) + sum(terms(decoder) for decoder in flow.decoders()))


def assert_same_pictures(found: torch.Tensor, expected: torch.Tensor, flow: FlowPipeline, steps: int) -> None:
    """Equal but for the order of sums."""
    torch.testing.assert_close(found, expected, atol=of_pictures(flow, steps), rtol=0)
