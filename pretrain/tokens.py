"""The order of tokens in a ViT sequence; the one place that knows it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Order of tokens in a ViT sequence: [class | registers | patches], the patches row by row.

    Task tokens are timm register tokens, known here by the names of the tasks that read them.
    """

    grid: tuple[int, int]  # patches as (rows, columns)
    registers: tuple[str, ...] = ()
    has_class_token: bool = True

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix(self) -> int:
        return int(self.has_class_token) + len(self.registers)

    @property
    def num_tokens(self) -> int:
        return self.num_prefix + self.num_patches

    def class_token(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)"""
        if not self.has_class_token:
            raise ValueError("this sequence has no class token")
        return tokens[:, 0]

    def task_token(self, tokens: Tensor, name: str) -> Tensor:
        """The register that belongs to a task. (B, N, D) -> (B, D)"""
        return tokens[:, int(self.has_class_token) + self.registers.index(name)]

    def patches(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, P, D), row by row"""
        return tokens[:, self.num_prefix :]

    def image_feature(self, tokens: Tensor) -> Tensor:
        """What stands for the whole image: the class token, or without one the mean of the patch tokens.

        (B, N, D) -> (B, D)
        """
        return self.class_token(tokens) if self.has_class_token else self.patches(tokens).mean(dim=1)

    def prefix(self, tokens: Tensor) -> Tensor:
        """Class token and registers. (B, N, D) -> (B, N - P, D)"""
        return tokens[:, : self.num_prefix]

    def positions(self, device: torch.device | None = None) -> Tensor:
        """Grid coordinates (row, column) of each patch: int64 (P, 2)"""
        rows, columns = self.grid
        return torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))


def take(values: Tensor, index: Tensor) -> Tensor:
    """Pick tokens by a per-sample index. values (B, P, ...), index int64 (B, K) -> (B, K, ...)"""
    shape = index.shape + values.shape[2:]
    return values.gather(1, index.reshape(index.shape + (1,) * (values.dim() - 2)).expand(shape))
