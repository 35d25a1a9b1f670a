"""What encoding clips and decoding videos take, at Wan2.2-TI2V-5B's sizes: seconds, memory, disk. No torch.

The test compares the figures with the measured ones of benchmarks/results.
"""

from common.planning.cards import DECODE_SECONDS, ENCODE_RECORDS, OTHER_SECONDS, Card
from common.video import LATENT_CHANNELS, VideoSpec

TEXT_WIDTH = 4096  # of an embedding
PROMPT_TOKENS = 118  # of a record's text, on average
HALO_SHARE = 0.042  # operations for a halo, of those for a frame of 704 x 1280
ENCODERS_GIB = 11.4  # text encoder in bf16 and the VAE's encoder
FRAME_GIB = {"float32": 0.7, "tf32": 0.7, "float16": 0.36, "bfloat16": 0.36}  # of a first frame of 704 x 1280


def frame_share(spec: VideoSpec) -> float:
    """Pixels of a frame against those of 704 x 1280."""
    return spec.height * spec.width / (704 * 1280)


def encode_seconds(records: int, spec: VideoSpec, card: Card, *, gpus: int) -> float:
    """Seconds to encode records on GPUs of one kind."""
    return records * frame_share(spec) / (ENCODE_RECORDS * card.scale * gpus)


def encode_gib(spec: VideoSpec, *, batch_size: int, vae_dtype: str) -> float:
    """Peak of a GPU that encodes, in GiB."""
    return ENCODERS_GIB + FRAME_GIB[vae_dtype] * frame_share(spec) * batch_size


def record_bytes(spec: VideoSpec, text_width: int = TEXT_WIDTH) -> float:
    """Bytes of a record: first frame and text in bf16, without the text's padding."""
    _, _, height, width = spec.latent_shape
    return 2 * (LATENT_CHANNELS * height * width + PROMPT_TOKENS * text_width)


def decode_seconds(spec: VideoSpec, card: Card, *, gpus: int = 1) -> float:
    """Seconds from a video's latents to its mp4 file by GPUs that share it, its picture and prompt included."""
    decode = DECODE_SECONDS * frame_share(spec) * spec.num_frames / 121 / card.scale
    return decode * decode_share(gpus) + OTHER_SECONDS


def decode_share(gpus: int) -> float:
    """Part of a decode's operations that the busiest of several GPUs makes: its own columns and a halo or two."""
    return min(1.0, 1 / gpus + HALO_SHARE * min(gpus - 1, 2))
