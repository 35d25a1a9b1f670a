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

OVERSAMPLING, POWER_ITERATIONS = 16, 4  # of the randomized decomposition (Halko et al., arXiv 0909.4061, section 4.4)
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
    for name, weight in student.read_weights():
        difference = (weight.float() - student.base[name][...].float()).to(device)
        weight_energy += float(weight.double().square().sum())
        if not is_matrix(name):
            module, suffix = split_parameter(name)
            if difference.any():
                key = f"{LORA_PREFIX}{to_original(module)}{DIFF_SUFFIXES[suffix]}"
                tensors[key] = cast_weight(name, difference, dtype).cpu()
            continue
        first, second = (cast_weight(name, part, dtype).cpu() for part in decompose(difference, rank, name))
        module = split_parameter(name)[0]
        tensors |= {factor_key(module, "lora_A"): first, factor_key(module, "lora_B"): second}
        product = second.to(device).float() @ first.to(device).float()
        energy += float(difference.double().square().sum())
        stored_energy += float(product.double().square().sum())
        error += float((difference - product).double().square().sum())
    write_all(path, tensors, metadata | {"rank": str(rank), "alpha": str(rank)})
    total = max(energy, torch.finfo(torch.float64).tiny)  # a student that equals its base keeps nothing of nothing
    return LowRankErrors(rank, stored_energy / total, (error / total) ** 0.5, (error / weight_energy) ** 0.5)


def decompose(difference: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """A (rank, inputs) and B (outputs, rank) with the nearest product to a difference (outputs, inputs).

    Both carry the root of the singular values, so that neither under- nor overflows in half precision.
    """
    rank = min(rank, *difference.shape)
    if min(difference.shape) <= max(EXACT_SIZE, 2 * rank):
        left, values, right = torch.linalg.svd(difference.double(), full_matrices=False)
    else:
        left, values, right = randomized_svd(difference, rank + OVERSAMPLING, name)
    root = values[:rank].sqrt()
    return (root[:, None] * right[:rank]).float(), (left[:, :rank] * root).float()


def randomized_svd(matrix: Tensor, size: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The `size` largest singular values of a matrix (n m) and their vectors (n size), (size m)."""
    generator = make_generator(0, 0, 0, name, matrix.device)
    probe = torch.randn(matrix.shape[1], size, generator=generator, device=matrix.device)
    basis = torch.linalg.qr(matrix @ probe).Q
    for _ in range(POWER_ITERATIONS):  # with QR in between, or the smaller values drown in rounding errors
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, values, right
