"""The two models of stage one alone, by precision and batch, with their errors against float32."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence

import numpy
import torch
from torch import Tensor

from benchmarks.random_models import WORDS, Size
from common.device import copy_async
from stage1_encode.models import text_encoder, vae

PRECISIONS = ("float32", "tf32", "float16", "bfloat16")
BATCHES = (1, 8, 16)
Row = tuple[str, str]


def settle() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Best time of a piece of work, after one run that is not counted."""
    work()
    found = []
    for _ in range(repeats):
        settle()
        began = time.perf_counter()
        work()
        settle()
        found.append(time.perf_counter() - began)
    return min(found)


def memory() -> str:
    """Peak GPU memory since the last call."""
    if not torch.cuda.is_available():
        return "no GPU"
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return f"peak {peak:.1f} GiB"


def vae_copy(base: vae.WanVae, precision: str) -> vae.WanVae:
    """The same VAE in another precision."""
    return vae.WanVae(copy.deepcopy(base.model).to(vae.parse_vae_dtype(precision)), base.mean, base.std)


def fresh(base: vae.WanVae, precision: str) -> vae.FrameEncoder:
    """A frame encoder of one precision; `base` stays whole."""
    return vae.make_frame_encoder(vae_copy(base, precision), tf32=precision == vae.TF32)


def pictures(size: Size, count: int, device: torch.device) -> Tensor:
    """Noise over gradients (B X Y 3) uint8: pictures need not be clips here."""
    draw = numpy.random.default_rng(0)
    y, x = numpy.mgrid[: size.height, : size.width]
    smooth = numpy.stack([x * 160 / size.width, y * 160 / size.height, 40 + 0 * x], axis=-1)
    noise = draw.integers(0, 64, (count, size.height, size.width, 3))
    return torch.from_numpy((smooth + noise).astype(numpy.uint8)).to(device)


def vae_error(encoder: vae.FrameEncoder, base: vae.WanVae, pixels: Tensor) -> float:
    """Relative error of latents against diffusers in float32."""
    images = pixels.permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = torch.cat([base.model.encode(image[None]).latent_dist.mode() for image in images])
    exact = (exact - base.mean) / base.std
    return ((vae.encode_frames(encoder, pixels) - exact).norm() / exact.norm()).item()


def of_vae(base: vae.WanVae, pixels: Tensor, precisions: Sequence[str]) -> Iterator[Row]:
    """One frame by diffusers and by `FrameEncoderNet`, in every precision."""
    images = pixels.permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1
    for batch in BATCHES[:2] if "float32" in precisions else ():
        for name, tf32 in (("float32", False), ("float32 with tf32", True)):
            with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
                took = seconds(lambda batch=batch: base.model.encode(images[:batch]))
            yield f"VAE, one frame, diffusers, {name}, batch {batch}", f"{took / batch * 1e3:.2f} ms a frame"
    for precision in precisions:
        encoder = fresh(base, precision)
        error = vae_error(encoder, base, pixels[:4])
        memory()
        for batch in BATCHES:
            took = seconds(lambda encoder=encoder, batch=batch: vae.encode_frames(encoder, pixels[:batch]))
            figure = f"{took / batch * 1e3:.2f} ms a frame, {memory()}, latents off by {error:.1e}"
            yield f"VAE, one frame, here, {precision}, batch {batch}", figure


def some_text(encoder: text_encoder.TextEncoder) -> Tensor:
    """Embeddings of four prompts of 128 tokens (4 128 D), in the encoder's precision."""
    tokens = torch.randint(3, WORDS, (4, 128), generator=torch.Generator().manual_seed(0))
    ids, mask = (copy_async(x, encoder.model.device) for x in text_encoder.pad_tokens(tokens.tolist(), 0))
    with torch.no_grad():
        return encoder.model(ids, mask).last_hidden_state.float()


def of_text(encoder: text_encoder.TextEncoder, name: str, exact: Tensor) -> Iterator[Row]:
    """UMT5 at the batches of REFERENCE section 5 and at the default budget; its error against float32."""
    error = ((some_text(encoder) - exact).norm() / exact.norm()).item()
    for count, length in ((8, 512), (32, 128), (64, 128)):
        tokens = torch.randint(3, WORDS, (count, length), generator=torch.Generator().manual_seed(0))
        ids, mask = (copy_async(x, encoder.model.device) for x in text_encoder.pad_tokens(tokens.tolist(), 0))
        with torch.no_grad():
            took = seconds(lambda ids=ids, mask=mask: encoder.model(ids, mask))
        rate = f"{took:.4f} s, {count * length / took:.0f} tokens/s, {took / count * 1e3:.2f} ms a prompt"
        yield f"UMT5, {name}, {count} x {length} tokens", f"{rate}, off by {error:.1e}, {memory()}"
