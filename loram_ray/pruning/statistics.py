"""Accumulators over the calibration inputs ``x [sequences, tokens, in]`` of a linear.

Each accumulator adds one batch at a time. Two of the same kind can be merged, so different workers
can process different parts of a calibration set. Accumulators are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from loram_ray.criteria import CRITERIA


class Statistic(Protocol):
    """Interface of accumulators over calibration inputs."""

    def add(self, inputs: torch.Tensor) -> None:
        """Add a batch ``[sequences, tokens, in]``, or one sequence ``[tokens, in]``."""

    def merge(self, other: Self) -> None:
        """Add the inputs of another accumulator."""


@dataclass
class Moments:
    """Mean and variance of each input feature, by Chan's parallel update.

    Attributes:
        count: Number of tokens.
        mean: Mean of each feature, float32 ``[in]``.
        squares: Sum of squared differences from the mean, float32 ``[in]``.
    """

    count: int
    mean: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def empty(cls, features: int) -> Moments:
        """Return an empty accumulator for ``features`` inputs."""
        return cls(0, torch.zeros(features), torch.zeros(features))

    @property
    def variance(self) -> torch.Tensor:
        """Variance over tokens, float32 ``[in]``."""
        return self.squares / max(self.count, 1)

    def add(self, inputs: torch.Tensor) -> None:
        """Add a batch."""
        tokens = inputs.reshape(-1, inputs.shape[-1]).float()
        if len(tokens):
            variance, mean = torch.var_mean(tokens, dim=0, correction=0)
            self.merge(Moments(len(tokens), mean.cpu(), (variance * len(tokens)).cpu()))

    def merge(self, other: Moments) -> None:
        """Add the inputs of another accumulator."""
        total = self.count + other.count
        if not other.count:
            return
        apart = other.mean - self.mean
        self.mean = self.mean + apart * (other.count / total)
        between = apart.square() * (self.count * other.count / total)
        self.squares = self.squares + other.squares + between
        self.count = total


@dataclass
class SquaredNorms:
    """Squared L2 norm of each input feature over all tokens (Wanda).

    Attributes:
        total: Squared norms, float32 ``[in]``.
    """

    total: torch.Tensor

    @classmethod
    def empty(cls, features: int) -> SquaredNorms:
        """Return an empty accumulator for ``features`` inputs."""
        return cls(torch.zeros(features))

    def add(self, inputs: torch.Tensor) -> None:
        """Add a batch."""
        self.total += inputs.reshape(-1, inputs.shape[-1]).float().square().sum(0).cpu()

    def merge(self, other: SquaredNorms) -> None:
        """Add the inputs of another accumulator."""
        self.total += other.total


@dataclass
class MeanActivations:
    """Sum over sequences of the squared mean absolute input of each feature (Minitron).

    Attributes:
        total: Sums, float32 ``[in]``.
    """

    total: torch.Tensor

    @classmethod
    def empty(cls, features: int) -> MeanActivations:
        """Return an empty accumulator for ``features`` inputs."""
        return cls(torch.zeros(features))

    def add(self, inputs: torch.Tensor) -> None:
        """Add a batch; the tokens of an expert count as one sequence."""
        if inputs.numel():
            means = inputs.float().abs().mean(-2)
            self.total += means.reshape(-1, means.shape[-1]).square().sum(0).cpu()

    def merge(self, other: MeanActivations) -> None:
        """Add the inputs of another accumulator."""
        self.total += other.total


@dataclass
class Hessian:
    """Sum ``x x^T`` over all tokens: the layer-wise Hessian of SparseGPT up to a factor.

    Attributes:
        count: Number of tokens.
        total: Sum of outer products, float32 ``[in, in]``, on the device of the inputs.
    """

    count: int
    total: torch.Tensor

    @classmethod
    def empty(cls, features: int) -> Hessian:
        """Return an empty accumulator for ``features`` inputs."""
        return cls(0, torch.zeros(features, features))

    @property
    def matrix(self) -> torch.Tensor:
        """The Hessian ``(2 / N) sum x x^T``, float32 ``[in, in]``."""
        return self.total * (2 / max(self.count, 1))

    def add(self, inputs: torch.Tensor) -> None:
        """Add a batch."""
        tokens = inputs.reshape(-1, inputs.shape[-1]).float()
        self.total = self.total.to(tokens.device).addmm_(tokens.t(), tokens)
        self.count += len(tokens)

    def merge(self, other: Hessian) -> None:
        """Add the inputs of another accumulator."""
        self.total = self.total + other.total.to(self.total.device)
        self.count += other.count


def statistic_of(criterion: str) -> Any:
    """Return the accumulator class that a criterion needs, see `Criterion`."""
    return globals()[str(CRITERIA[criterion].statistic)]
