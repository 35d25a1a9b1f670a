"""The low-rank parts of large matrices keep nearly the energy of the exact ones, and the same bits twice."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stage2_distill.export.lora_file import EXACT_SIZE, decompose, product_energy, squared_norm

ROWS, COLUMNS = EXACT_SIZE + 4, EXACT_SIZE + 32


def flat(draws: torch.Generator) -> Tensor:
    """The hardest case: no singular value stands out."""
    return 1e-3 * torch.randn(ROWS, COLUMNS, generator=draws)


def decaying(draws: torch.Generator) -> Tensor:
    left, right = (torch.linalg.qr(torch.randn(size, ROWS, generator=draws)).Q for size in (ROWS, COLUMNS))
    return left * (1 + torch.arange(float(ROWS))) ** -0.5 @ right.T


def sparse(draws: torch.Generator) -> Tensor:
    """Seven rows that differ, of rank 7; the others are equal in both models."""
    matrix = torch.zeros(ROWS, COLUMNS)
    matrix[10:17] = torch.randn(7, COLUMNS, generator=draws)
    return matrix


@pytest.mark.parametrize(
    ("make", "is_tall", "lost"), [(flat, False, 5e-3), (decaying, True, 1e-4), (sparse, False, 1e-6)]
)
def test_kept_energy(make: Callable[[torch.Generator], Tensor], is_tall: bool, lost: float) -> None:
    wide = make(torch.Generator().manual_seed(0))
    squares, matrix = torch.linalg.eigvalsh(wide.double() @ wide.double().T).flip(0), wide.T if is_tall else wide
    for rank in (2, 16):
        first, second = decompose(matrix, rank, "x")
        assert first.shape == (rank, matrix.shape[1]) and second.shape == (matrix.shape[0], rank)
        kept = float(1 - (matrix - second @ first).double().square().sum() / squares.sum())
        exact = float(squares[:rank].sum() / squares.sum())
        assert exact - lost < kept < exact + 1e-6
        assert abs(product_energy(first, second) / squared_norm(matrix) - kept) < 1e-5
    assert all(map(torch.equal, decompose(matrix, 16, "x"), (first, second)))
    assert squared_norm(matrix) == pytest.approx(float(squares.sum()), rel=1e-6)


def test_full_rank_is_exact() -> None:
    matrix = flat(torch.Generator().manual_seed(0))
    first, second = decompose(matrix, ROWS, "x")
    assert (matrix - second @ first).norm() < 1e-6 * matrix.norm()


def test_no_difference() -> None:
    first, second = decompose(torch.zeros(ROWS, COLUMNS), 4, "x")
    assert not first.any() and not second.any()
