"""Speeds of GPUs for predictions: measured on H100 and H200, for other cards scaled by their data sheets. No torch."""

from dataclasses import dataclass

HOPPER_TFLOPS = 989  # dense bf16 of the data sheet, H100 SXM and H200
# Measured at 121 x 704 x 1280 on Hopper, in TFLOP/s: a product of 27,280 rows (benchmarks/results/network-*), and
# attention forward and backward alone with sums in order, by kernel. `flash` is FlashAttention-2, as torch has it.
PRODUCT_TFLOPS = 740
ATTENTION_TFLOPS = {"flash-3": (669, 569), "cudnn": (580, 515), "flash": (355, 168), "efficient": (179, 129)}
BANDWIDTH_SHARE = 0.8  # of the data sheet's bandwidth, reached by elementwise kernels
# Of the rate of one GPU alone: benchmarks/results/modes-* (several GPUs of one host), together-* (one video by several)
SHARDED_RATE, SHARED_VIDEO_RATE = 0.97, 0.9
EAGER_FACTOR = 1.3  # time without --compile
HOST_LINK = 25e9  # bytes per second between host memory and GPU, each way (LOG: 27 GB/s for a checkpoint's copy)
ENCODE_RECORDS = 65  # records per second at 704 x 1280 (benchmarks/results/encode-*, encode_ranks-*, rebuild-*)
DECODE_SECONDS, OTHER_SECONDS = 3.2, 0.26  # decoding 121 x 704 x 1280, and the rest of a video (results/sample-*)


@dataclass(frozen=True)
class Card:
    """A kind of GPU."""

    name: str  # as `--gpu` takes it and as it occurs in the driver's name
    memory_gib: float  # that torch can use
    tflops: float  # dense bf16 products with float32 sums, data sheet
    bandwidth: float  # bytes per second, data sheet
    measured: bool = False
    slowdown: float = 1.0  # measured seconds over predicted ones

    @property
    def scale(self) -> float:
        """Its arithmetic against Hopper's."""
        return self.tflops / HOPPER_TFLOPS / self.slowdown

    @property
    def traffic(self) -> float:
        """Bytes per second that elementwise kernels move."""
        return self.bandwidth * BANDWIDTH_SHARE / self.slowdown

    @property
    def source(self) -> str:
        """Where its speeds come from."""
        if self.slowdown != 1:
            return "measured here"
        return "measured" if self.measured else "scaled from H200 by data sheets, not measured"


# Data sheets: NVIDIA H100/H200/A100/L40S product pages, Blackwell and Ada architecture papers (GeForce), HGX B200.
CARDS = (
    Card("h100", 79.1, 989, 3.35e12, measured=True),
    Card("h200", 139.8, 989, 4.8e12, measured=True),
    Card("b200", 178, 2250, 7.7e12),
    Card("a100", 79.1, 312, 2.04e12),
    Card("l40s", 44.4, 362, 0.864e12),
    Card("rtx5090", 31.4, 209.5, 1.79e12),
    Card("rtx4090", 23.5, 165.2, 1.01e12),
)
CARD_NAMES = tuple(card.name for card in CARDS)


def find_card(name: str) -> Card | None:
    """The card of an option's name or of a driver's, such as NVIDIA H100 80GB HBM3; None if it is not in the table."""
    plain = name.lower().replace(" ", "")
    return next((card for card in CARDS if card.name in plain), None)


def planned_kernel(attention: str, card: Card) -> str:
    """The kernel whose speed option `attention` has: `auto` is cuDNN, because flash-attn-3 may not be installed."""
    if attention in ("auto", "torch", "math"):  # the last is no kernel for videos of this size
        return "cudnn"
    is_hopper = card.tflops == HOPPER_TFLOPS and find_card(card.name) is not None
    return "flash-3" if attention == "flash" and is_hopper else attention
