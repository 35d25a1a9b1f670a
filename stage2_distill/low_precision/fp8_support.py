"""What products in 8 bits need, and what they cost in accuracy."""

import logging

import torch
from torch import nn

from stage2_distill.distributed.process_group import rank_and_world
from stage2_distill.low_precision.fp8_linear import block_layers, store_in_fp8
from stage2_distill.low_precision.quantized_rows import multiply_rows, quantize_rows

SIZE_STEP = 16  # of the sizes of a matrix: the products read rows in pieces of 16 bytes
MIN_CAPABILITY = (8, 9)  # Ada; then Hopper and Blackwell
COST = (  # the median over videos of the nano model's trained student; see docs/sampling.md
    "products of the blocks in 8 bits: on the nano model the latents of a video differ from exact ones by 5 % "
    "(relative L2; bfloat16 from float32: 1 %)"
)


def check_fp8(net: nn.Module, device: torch.device) -> None:
    """Raise ValueError if a network, whose weights are not needed, cannot have products in 8 bits on a device."""
    check_fp8_device(device)
    check_fp8_sizes(net)


def check_fp8_device(device: torch.device) -> None:
    """Raise ValueError if a device has no products in 8 bits."""
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        card, found = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        raise ValueError(
            f"precision=fp8: {card} has compute capability {found}, and fp8 needs 8.9; give --precision exact"
        )
    try:
        rows = quantize_rows(torch.zeros(SIZE_STEP, SIZE_STEP, dtype=torch.bfloat16, device=device))
        multiply_rows(rows, rows, None)
    except (AttributeError, RuntimeError, ValueError) as error:
        cause, _, _ = str(error).partition("\n")
        raise ValueError(
            f"precision=fp8: torch {torch.__version__} has no fp8 product with scales of rows on {device.type} "
            f"({cause}); update torch, or give --precision exact"
        ) from error


def check_fp8_sizes(net: nn.Module) -> None:
    """Raise ValueError if a layer of a network's blocks has sizes that products in 8 bits cannot have."""
    for _, name, layer in block_layers(net):
        sizes = layer.in_features, layer.out_features
        if any(size % SIZE_STEP for size in sizes):
            shape = " to ".join(map(str, sizes))
            raise ValueError(
                f"precision=fp8: layer {name} of the model maps {shape}, and fp8 needs multiples of {SIZE_STEP}; "
                "give --precision exact"
            )


def store_weights_in_fp8(net: nn.Module) -> None:
    """Round the weights of a network that samples, in place, and say what that costs."""
    store_in_fp8(net)
    if rank_and_world()[0] == 0:
        logging.info("precision=fp8: %s", COST)
