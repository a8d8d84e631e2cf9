"""What layers cost: parameters, FLOPs and what they keep for the backward pass, as plain numbers.

FLOPs are those of matrix products only, 2 for each multiplication with its addition, and nothing is counted
twice that is computed twice. The backward pass of a product costs one product for each operand that a
gradient is asked of. No torch here: a plan of a run is printed before torch would have been imported.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Cost:
    """Of a part of the trained module. FLOPs and saved elements are those of one image of the batch."""

    parameters: int = 0  # that are trained
    frozen: int = 0  # parameters that are not
    matrices: int = 0  # elements of the parameters that autocast keeps a copy of in bf16
    forward: float = 0.0  # FLOPs
    backward: float = 0.0
    saved: float = 0.0  # elements kept for the backward pass in the precision of matrix products
    saved_fp32: float = 0.0  # elements kept in float32 at any precision

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def train(self) -> float:
        """FLOPs of both passes."""
        return self.forward + self.backward


def total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


def product(rows: float, inner: int, columns: float, *, num_gradients: int = 2, saved: float = 0.0) -> Cost:
    """(rows, inner) @ (inner, columns), neither a parameter; of how many of the two a gradient is asked."""
    forward = 2.0 * rows * inner * columns
    return Cost(forward=forward, backward=num_gradients * forward, saved_fp32=saved)


def linear(rows: float, wide_in: int, wide_out: int, *, bias: bool = True, frozen: bool = False) -> Cost:
    """A linear layer for so many rows of one image; it keeps its input."""
    matrix = wide_in * wide_out
    forward = 2.0 * rows * matrix
    num_parameters = matrix + (wide_out if bias else 0)
    return Cost(
        parameters=0 if frozen else num_parameters,
        frozen=num_parameters if frozen else 0,
        matrices=matrix,
        forward=forward,
        backward=2 * forward,
        saved=rows * wide_in,
    )


def norm(rows: float, dim: int) -> Cost:
    """A layer norm with gain and bias; it keeps its input in float32, with a mean and a deviation a row."""
    return Cost(parameters=2 * dim, saved_fp32=rows * (dim + 2))


def mlp(
    rows: float,
    dims: Sequence[int],
    *,
    batch_norm: bool = False,
    keeps_input: bool = False,
    bias: bool = True,
    last_norm: bool = False,
) -> Cost:
    """As `models.heads.mlp`. keeps_input: of the activation its input is kept too (GELU), not only what the
    next layer gets (ReLU)."""
    parts = []
    num_layers = len(dims) - 1
    for number, (wide_in, wide_out) in enumerate(itertools.pairwise(dims), start=1):
        is_last = number == num_layers
        has_norm = last_norm if is_last else batch_norm
        parts.append(linear(rows, wide_in, wide_out, bias=bias and not has_norm))
        if has_norm:  # keeps its input
            parts.append(Cost(parameters=0 if is_last else 2 * wide_out, saved=rows * wide_out))
        if keeps_input and not is_last:
            parts.append(Cost(saved=rows * wide_out))
    return total(parts)


def projection_head(
    rows: float,
    wide_in: int,
    hidden: int,
    wide_out: int,
    num_layers: int,
    *,
    bias: bool = True,
    last_norm: bool = False,
) -> Cost:
    """As `models.heads.projection_head`."""
    dims = [wide_in, *[hidden] * (num_layers - 1), wide_out]
    return mlp(rows, dims, batch_norm=True, bias=bias, last_norm=last_norm)


def convolution(places: float, wide_in: int, wide_out: int, kernel: int) -> Cost:
    """A convolution with stride 1 and a bias, at so many places of a map."""
    as_linear = linear(places, kernel**2 * wide_in, wide_out)
    return Cost(**{**vars(as_linear), "saved": places * wide_in})


def block(rows: float, pairs: float, dim: int, num_heads: int, hidden: int) -> Cost:
    """A pre-norm transformer block (timm's `Block`) on all sequences of one image.

    rows: tokens of all sequences; pairs: the sum over sequences of the square of their number. Attention is
    the fused kind, which keeps queries, keys, values, its output and a number for each row of the attention
    matrix, but not the matrix.
    """
    of_all_heads = product(pairs, dim, 1)  # queries and keys; weights and values cost as much
    return total(
        [
            norm(rows, dim),
            linear(rows, dim, 3 * dim),
            Cost(saved=3 * rows * dim, saved_fp32=rows * num_heads),
            of_all_heads,
            of_all_heads,
            linear(rows, dim, dim),
            norm(rows, dim),
            linear(rows, dim, hidden),
            Cost(saved=rows * hidden),  # GELU
            linear(rows, hidden, dim),
        ]
    )


def unfused_attention(pairs: float, num_heads: int) -> Cost:
    """What a block's attention keeps more where it is computed as plain products: the matrix of each head."""
    return Cost(saved=num_heads * pairs)


def scaled(cost: Cost, factor: float = 1.0) -> Cost:
    """What is done so many times with the same parameters, which are left out."""
    return Cost(
        forward=factor * cost.forward,
        backward=factor * cost.backward,
        saved=factor * cost.saved,
        saved_fp32=factor * cost.saved_fp32,
    )
