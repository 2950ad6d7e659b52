"""What the tests of losses share: inputs without a random number generator, and the formulas' parts in plain Python."""

import math

import torch
from torch import Tensor


def wave(shape: tuple[int, ...], a: float, b: float) -> Tensor:
    """3·sin(a·i + b) in float64, i running over the elements row by row: the inputs of published reference values."""
    count = math.prod(shape)
    return 3 * torch.sin(a * torch.arange(count, dtype=torch.float64) + b).reshape(shape)


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(z / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


def numerical_gradient(function, x: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Central differences of a function of a tensor that returns a number."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        shift = torch.zeros_like(x)
        shift.view(-1)[i] = epsilon
        gradient.view(-1)[i] = (function(x + shift) - function(x - shift)) / (2 * epsilon)
    return gradient
