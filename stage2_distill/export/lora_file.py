"""The format `lora`: a trained adapter as one file, or the low-rank part of the difference of all weights to the base.

Keys are `diffusion_model.<original name>.lora_A.weight` (rank, inputs) and `.lora_B.weight` (outputs, rank), whose
product is added with weight 1: alpha / rank is multiplied into B. What has no low rank is stored as a dense difference,
`.diff` of a weight and `.diff_b` of a bias, as ComfyUI reads them.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.seed import make_generator
from stage2_distill.export.student_weights import StudentWeights, cast_weight
from stage2_distill.weight_files.key_names import LORA_PREFIX, is_matrix, split_parameter, to_original
from stage2_distill.weight_files.safetensors_writer import TensorShape, write_tensors

KRYLOV_STEPS, MIN_BLOCK = 4, 32  # of a flat spectrum 0.1 to 0.2 points of the energy are lost; see benchmarks/LOG.md
EXACT_SIZE = 512  # a matrix with fewer rows or columns is decomposed exactly
DIFF_SUFFIXES = {".weight": ".diff", "": ".diff", ".bias": ".diff_b"}


@dataclass(frozen=True)
class LowRankErrors:
    """How much of a student a low-rank file keeps."""

    rank: int
    kept_energy: float  # of the matrices' differences: squared norm of what is stored / of all
    matrix_error: float  # norm of the matrices' error / norm of their differences
    weight_error: float  # the same error / norm of the student's weights


def factor_key(module: str, factor: str) -> str:
    """Key of a factor (lora_A or lora_B) of a module under diffusers' name."""
    return f"{LORA_PREFIX}{to_original(module)}.{factor}.weight"


def write_adapter(path: Path, student: StudentWeights, dtype: torch.dtype, metadata: dict[str, str]) -> int:
    """Write a trained adapter; returns its number of pairs."""
    assert student.adapters is not None
    tensors: dict[str, Tensor] = {}
    for module, (first, second) in student.read_adapters():
        tensors[factor_key(module, "lora_A")] = cast_weight(module, first, dtype)
        tensors[factor_key(module, "lora_B")] = cast_weight(module, second * student.adapters.scale, dtype)
    write_all(path, tensors, metadata | {"rank": str(student.adapters.rank), "alpha": str(student.adapters.rank)})
    return len(tensors) // 2


def write_all(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors that are in memory."""
    shapes = {name: TensorShape(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_tensors(path, shapes, tensors.items(), metadata)


def write_low_rank(
    path: Path, student: StudentWeights, rank: int, dtype: torch.dtype, metadata: dict[str, str], device: torch.device
) -> LowRankErrors:
    """Write the differences of a fully trained student to its base, matrices at a rank; returns what is lost."""
    tensors: dict[str, Tensor] = {}
    stored_energy = energy = error = weight_energy = 0.0
    for name, value in student.read_weights():
        weight = value.to(device).float()
        weight_energy += squared_norm(weight)
        difference = student.base[name][...].to(device).float()
        torch.sub(weight, difference, out=difference)  # in place: new memory costs a CPU more time than the subtraction
        module, suffix = split_parameter(name)
        if not is_matrix(name):
            if difference.any():
                key = f"{LORA_PREFIX}{to_original(module)}{DIFF_SUFFIXES[suffix]}"
                tensors[key] = cast_weight(name, difference, dtype).cpu()
            continue
        first, second = (cast_weight(name, part, dtype) for part in decompose(difference, rank, name))
        tensors |= {factor_key(module, "lora_A"): first.cpu(), factor_key(module, "lora_B"): second.cpu()}
        energy += squared_norm(difference)
        stored_energy += product_energy(first, second)
        error += squared_norm(difference.addmm_(second.float(), first.float(), alpha=-1))
    write_all(path, tensors, metadata | {"rank": str(rank), "alpha": str(rank)})
    total = max(energy, torch.finfo(torch.float64).tiny)  # a student that equals its base keeps nothing of nothing
    return LowRankErrors(rank, stored_energy / total, (error / total) ** 0.5, (error / weight_energy) ** 0.5)


def squared_norm(tensor: Tensor) -> float:
    """Sum of the squares of a tensor's elements: of each row in float32, of all rows in float64."""
    return float(torch.linalg.vector_norm(tensor, dim=-1).double().square().sum())


def product_energy(first: Tensor, second: Tensor) -> float:
    """Squared norm of second @ first, which is trace((B^T B) (A A^T)), without the product."""
    first, second = first.double(), second.double()
    return float(((second.T @ second) * (first @ first.T)).sum())


def decompose(difference: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """A (rank, inputs) and B (outputs, rank) with the nearest product to a difference (outputs, inputs).

    Both carry the root of the singular values, so that neither under- nor overflows in half precision.
    """
    rank = min(rank, *difference.shape)
    if difference.shape[0] > difference.shape[1]:  # the smaller side has the cheaper basis
        second, first = decompose(difference.T, rank, name)
        return first.T, second.T
    if len(difference) <= max(EXACT_SIZE, 2 * rank):
        left, values, right = gram_svd(difference)
    else:
        basis = krylov_basis(difference, max(rank, MIN_BLOCK), name)
        left, values, right = gram_svd(basis.T @ difference)
        left = basis.double() @ left
    root = values[:rank].sqrt()
    return (root[:, None] * right[:rank]).float(), (left[:, :rank] * root).float()


def krylov_basis(matrix: Tensor, size: int, name: str) -> Tensor:
    """Orthonormal columns (n k) that nearly hold the first left singular vectors, `size` at most, of a matrix (n m).

    They span the blocks A G, (A A^T) A G, ... of a Gaussian G (m size), of which power iterations would keep the last
    alone (Musco & Musco, arXiv 1504.05477, algorithm 2). QR in between, or rounding errors drown smaller values.
    """
    generator = make_generator(0, 0, 0, name, matrix.device)
    probe = torch.randn(matrix.shape[1], size, generator=generator, device=matrix.device)
    blocks = [torch.linalg.qr(matrix @ probe).Q]
    for _ in range(KRYLOV_STEPS):
        blocks.append(torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ blocks[-1]).Q).Q)
    return torch.linalg.qr(torch.cat(blocks, dim=1)).Q


def gram_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors (n n), singular values, the largest first, and right vectors (n m) of a wide matrix, float64.

    By eigenvectors of A A^T, which are far cheaper than an SVD. Right vectors of values below 1e-8 of the largest are
    not orthogonal, but left @ diag(values) @ right is the matrix still.
    """
    matrix = matrix.double()
    squares, left = torch.linalg.eigh(matrix @ matrix.T)
    values, left = squares.flip(0).clamp(min=0).sqrt(), left.flip(1)
    return left, values, (left.T @ matrix) / values.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
