"""The tiny decoder computes what its published layout says, and the same chunk by chunk."""

import numpy
import pytest
import torch
from torch import Tensor, nn

from stage1_encode.decoders.tiny_network import SURPLUS_FRAMES, TinyLayout, TinyNetwork, keep_last_frames, read_layout
from tests.tiny_models import random_tiny_decoder

NARROW = TinyLayout(48, 12, (8, 6, 4, 4), is_wide=False)
WIDE = TinyLayout(48, 12, (8, 4, 4, 2), is_wide=True)
GROWING = {False: (7, 13, 19), True: (7, 14, 21)}  # numbers of the layers that make frames


def convolve(x: numpy.ndarray, weights: dict[str, numpy.ndarray], name: str, *, groups: int = 1) -> numpy.ndarray:
    """A convolution of a frame (C X Y) with zeros around it, tap by tap."""
    kernel = weights[f"{name}.weight"]
    side, (_, height, width) = kernel.shape[-1], x.shape
    padded = numpy.pad(x, ((0, 0), (side // 2, side // 2), (side // 2, side // 2)))
    out = numpy.zeros((len(kernel), height, width))
    for row in range(side):
        for column in range(side):
            window = padded[:, row : row + height, column : column + width]
            if groups == 1:
                out += numpy.einsum("nc,cxy->nxy", kernel[:, :, row, column], window)
            else:  # each channel for itself
                out += kernel[:, 0, row, column][:, None, None] * window
    return out + weights.get(f"{name}.bias", numpy.zeros(len(kernel)))[:, None, None]


def enlarge(x: numpy.ndarray) -> numpy.ndarray:
    return x.repeat(2, axis=1).repeat(2, axis=2)


def shuffle(x: numpy.ndarray) -> numpy.ndarray:
    """Four channels become the four pixels of a square (4C X Y) -> (C 2X 2Y): upper left, upper right, lower ..."""
    channels, height, width = len(x) // 4, *x.shape[1:]
    out = numpy.zeros((channels, 2 * height, 2 * width))
    for channel in range(channels):
        for row in range(2):
            for column in range(2):
                out[channel, row::2, column::2] = x[4 * channel + 2 * row + column]
    return out


def rectify(x: numpy.ndarray) -> numpy.ndarray:
    return numpy.maximum(x, 0)


def remember(frames: list[numpy.ndarray], weights: dict[str, numpy.ndarray], name: str) -> list[numpy.ndarray]:
    """A memory block: every frame with the one before it."""
    out = []
    for frame, before in zip(frames, [numpy.zeros_like(frames[0]), *frames[:-1]], strict=True):
        x = numpy.concatenate([frame, before])
        if f"{name}.conv.3.weight" in weights:
            x = convolve(x, weights, f"{name}.conv.0", groups=len(x))
            out.append(convolve(rectify(convolve(x, weights, f"{name}.conv.1")), weights, f"{name}.conv.3") + frame)
            continue
        x = rectify(convolve(x, weights, f"{name}.conv.0"))
        x = convolve(rectify(convolve(x, weights, f"{name}.conv.2")), weights, f"{name}.conv.4")
        out.append(rectify(x + frame))
    return out


def grow(frames: list[numpy.ndarray], weights: dict[str, numpy.ndarray], name: str) -> list[numpy.ndarray]:
    """Each frame becomes as many as the layer has groups of channels; the first group is the earliest."""
    grown = [convolve(frame, weights, f"{name}.conv") for frame in frames]
    return [part for x in grown for part in numpy.split(x, len(x) // len(frames[0]))]


def decode_by_definition(tensors: dict[str, Tensor], z: Tensor) -> numpy.ndarray:
    """All frames (F X Y 3) of latents (T C H W), layer by layer as the numbers of the file's keys go."""
    w = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    frames = list(z.double().numpy())
    if "decoder.0.weight" in w:
        frames = [convolve(x, w, "decoder.0") for x in frames]
        for first in (1, 8, 15):
            for number in range(first, first + 3):
                frames = remember(frames, w, f"decoder.{number}")
            frames = [shuffle(rectify(convolve(x, w, f"decoder.{first + 3}"))) for x in frames]
            frames = grow(frames, w, f"decoder.{first + 6}")
    else:
        frames = [rectify(convolve(3 * numpy.tanh(x / 3), w, "decoder.1")) for x in frames]
        for first in (3, 9, 15):
            for number in range(first, first + 3):
                frames = remember(frames, w, f"decoder.{number}")
            frames = grow([enlarge(x) for x in frames], w, f"decoder.{first + 4}")
            frames = [convolve(x, w, f"decoder.{first + 5}") for x in frames]
        frames = [rectify(x) for x in frames]
    pictures = [shuffle(convolve(x, w, "decoder.22")) for x in frames]
    return numpy.stack(pictures).transpose(0, 2, 3, 1)


def draw_latents(*shape: int, seed: int = 1) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def open_network(layout: TinyLayout) -> TinyNetwork:
    network = TinyNetwork(layout).eval().requires_grad_(False)
    network.load_state_dict(random_tiny_decoder(layout))
    return network


@pytest.mark.parametrize("layout", [NARROW, WIDE], ids=["narrow", "wide"])
def test_values_are_those_of_the_definition(layout: TinyLayout) -> None:
    tensors, z = random_tiny_decoder(layout), draw_latents(3, 48, 1, 2)
    assert read_layout(tensors) == layout
    expected = decode_by_definition(tensors, z)
    (result,) = open_network(layout)(z[None])
    assert result.shape == expected.shape == (12, 16, 32, 3)
    assert expected.std() > 0.1
    assert numpy.abs(result.numpy() - expected).max() < 1e-4 * numpy.abs(expected).max()
    network = open_network(layout)
    network.prepare_inference()
    assert (network(z[None])[0] - result).abs().max() < 1e-4


def open_exact_network(layout: TinyLayout) -> TinyNetwork:
    """A network of few whole numbers, whose sums float32 holds exactly in any order."""
    network = open_network(layout)
    for tensor in network.parameters():
        kept = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(7)) < 3 / max(1, tensor[0].numel())
        tensor.copy_(tensor.sign() * kept)
    if not layout.is_wide:
        network.decoder[0] = nn.Identity()  # a tangent is no whole number
    return network


@pytest.mark.parametrize("layout", [NARROW, WIDE], ids=["narrow", "wide"])
def test_chunks_give_the_same_bits_as_the_whole(layout: TinyLayout) -> None:
    """With whole numbers, since the rounding of a convolution depends on the number of frames."""
    for network, tolerance in ((open_exact_network(layout), 0.0), (open_network(layout), 1e-4)):
        z = draw_latents(2, 4, 48, 1, 2).round()
        network.reset_cache()
        whole = network(z)
        assert whole.shape[1] - SURPLUS_FRAMES == 4 * 3 + 1
        assert 0.5 < whole.abs().max() < 2**20
        for sizes in ((1,) * 4, (1, 2, 1)):
            network.reset_cache()
            parts = torch.cat([network(part) for part in z.split(sizes, dim=1)], dim=1)
            assert (parts - whole).abs().max() <= tolerance
        network.reset_cache()
        alone = network(z[1:])
        assert (alone - whole[1:]).abs().max() <= tolerance  # videos do not see each other
        again = network(z[1:, :1])
        assert (again - alone[:, :4]).abs().max() > 100 * tolerance  # without a reset the last frames are remembered


def test_the_last_frames_of_a_layer_that_makes_more_are_used() -> None:
    """As the reference does for weights that were trained with more growth."""
    tensors = random_tiny_decoder(NARROW)
    wanted = tensors["decoder.7.conv.weight"]
    tensors |= {"decoder.7.conv.weight": torch.cat([-wanted, wanted]), "encoder.0.weight": torch.zeros(1)}
    kept = keep_last_frames(tensors, NARROW)
    assert torch.equal(kept["decoder.7.conv.weight"], wanted)
    assert set(kept) == set(TinyNetwork(NARROW).state_dict())
