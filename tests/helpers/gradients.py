"""Sparse gradients of tables, and optimizers in float64 as loops over rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

Gradients = dict[int, np.ndarray]  # row -> sum of its gradients


def sparse_gradient(
    rows: list[int], values: np.ndarray, shape: torch.Size, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return a sparse gradient with its rows as they come: not sorted, summed or coalesced."""
    return torch.sparse_coo_tensor(
        torch.tensor([rows], dtype=torch.int64),
        torch.as_tensor(values, dtype=dtype).reshape(len(rows), *shape[1:]),
        shape,
        check_invariants=True,
    )


def random_rows(
    rng: np.random.Generator, shape: tuple[int, ...], count: int
) -> tuple[list[int], np.ndarray]:
    """Return distinct rows in no order, and gradients of many magnitudes, some elements zero."""
    rows = rng.permutation(shape[0])[:count].tolist()
    values = rng.standard_normal((count, *shape[1:])) * 10.0 ** rng.integers(-4, 2, (count, 1))
    values[:, 1:][rng.random((count, shape[1] - 1)) < 0.2] = 0.0
    return rows, values.astype(np.float32)


class DenseAdam:
    """Dense Adam: rows without a gradient go on along their mean."""

    def __init__(self, weights_VD: np.ndarray) -> None:
        self.weights = weights_VD.astype(np.float64)
        self.mean = np.zeros_like(self.weights)
        self.square = np.zeros_like(self.weights)
        self.steps = 0

    def step(self, gradients: Gradients, lr: float) -> None:
        self.steps += 1
        for row in range(len(self.weights)):
            gradient = np.zeros_like(self.weights[row])
            if row in gradients:
                gradient = gradients[row].astype(np.float64)
            self.mean[row] += (1 - 0.9) * (gradient - self.mean[row])
            self.square[row] += (1 - 0.999) * (gradient**2 - self.square[row])
            mean = self.mean[row] / (1 - 0.9**self.steps)
            square = self.square[row] / (1 - 0.999**self.steps)
            self.weights[row] -= lr * mean / (np.sqrt(square) + 1e-8)


class DenseAdagrad:
    """Adagrad: rows without a gradient stay as they are."""

    def __init__(self, weights_VD: np.ndarray) -> None:
        self.weights = weights_VD.astype(np.float64)
        self.square = np.zeros_like(self.weights)

    def step(self, gradients: Gradients, lr: float) -> None:
        for row, values in gradients.items():
            gradient = values.astype(np.float64)
            self.square[row] += gradient**2
            self.weights[row] -= lr * gradient / (np.sqrt(self.square[row]) + 1e-10)


ORACLES = {"row_adam": DenseAdam, "adagrad": DenseAdagrad}


def table(rng: np.random.Generator, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(rng.standard_normal(shape).astype(np.float32)))


def check_close(weights: torch.Tensor, expected: np.ndarray, *, moves: float) -> None:
    """Check weights of order 1 within float32's rounding, after moves that add up to `moves`."""
    np.testing.assert_allclose(
        weights.detach().double().numpy(), expected, rtol=1e-6, atol=2e-6 * max(moves, 0.1)
    )
