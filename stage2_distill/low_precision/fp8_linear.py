"""The linear layers of transformer blocks in 8 bits, for sampling.

Modulation, embedders, norms and the head stay as they are. Shapes: D inputs, F outputs; (... D) is a batch of tokens.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from stage2_distill.low_precision.quantized_rows import QuantizedRows, multiply_rows, quantize_gelu, quantize_rows

LayerInput = Tensor | QuantizedRows  # tokens, or tokens that several layers share and that are rounded already


class StoredFp8Linear(nn.Module):
    """A linear layer that stores its weight in 8 bits; it has no gradient."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        values, scale = quantize_rows(layer.weight.detach())
        self.weight = nn.Parameter(values, requires_grad=False)  # (F D)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)  # (F 1)
        self.bias = layer.bias

    def forward(self, x: LayerInput) -> Tensor:
        """The layer's output (... F), bfloat16."""
        rows = x if isinstance(x, QuantizedRows) else quantize_rows(x)
        return multiply_rows(rows, QuantizedRows(self.weight, self.weight_scale), self.bias)


def computes_in_fp8(layer: nn.Module) -> bool:
    """Whether a layer computes in 8 bits."""
    return isinstance(layer, StoredFp8Linear)


def prepare_input(layer: nn.Module, x: Tensor) -> LayerInput:
    """What to give to a layer, and to others of the same input, so that x is rounded once."""
    return quantize_rows(x) if computes_in_fp8(layer) else x


def fp8_feed_forward(up: nn.Module, down: nn.Module, x: Tensor) -> Tensor:
    """down(gelu(up(x))) of two layers in 8 bits."""
    result: Tensor = down(quantize_gelu(up(x)))
    return result


def block_layers(net: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield block, name and layer of every linear layer in the blocks of a network."""
    for block in net.get_submodule("blocks").children():
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                yield block, name, layer


def store_in_fp8(net: nn.Module) -> None:
    """Replace the layers' weights by 8 bits, in place, which halves the memory of a bfloat16 network."""
    for block, name, layer in block_layers(net):
        block.set_submodule(name, StoredFp8Linear(layer))
