"""diffusers' own pipeline with 4 steps, on the models of `benchmarks/sample.py`."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline
from PIL import Image
from torch import Tensor

from benchmarks.runner import call_times, sync
from common.video import VideoSpec
from stage1_encode.generation.condition_encoder import ConditionEncoder
from stage1_encode.media.video_writer import write_video
from stage2_distill.model.transformer import WanTransformer

PROMPT = "A red circle moves to the right, slowly, in front of a grey wall, and then it turns and comes back again."


@dataclass(frozen=True)
class StockVideo:
    """Seconds from picture to file, of one step and of the decode; and the tensors of the decode."""

    whole: float
    step: float
    decode: float
    latents: Tensor  # (1 C T H W)
    video: Tensor  # (1 3 F X Y)


@contextmanager
def compiled_blocks(net: WanTransformer) -> Iterator[None]:
    """Let diffusers' own blocks run compiled, as its guide for speed says."""
    for block in net.blocks:
        block.compile(fullgraph=True)
    try:
        yield
    finally:
        for block in net.blocks:
            block._compiled_call_impl = None  # torch has no other way back


def run_stock(net: WanTransformer, models: ConditionEncoder, spec: VideoSpec, folder: Path, repeats: int) -> StockVideo:
    """Return medians of `repeats` videos after a first one; the picture is first.png in the folder."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    pipe = WanImageToVideoPipeline(
        tokenizer=models.text.tokenizer, text_encoder=models.text.model, vae=models.vae.model,
        scheduler=scheduler, transformer=net, expand_timesteps=True,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    step_ends: list[float] = []
    decoded: list[tuple[Tensor, Tensor]] = []  # of the last video only: more would fill the GPU
    decodes: list[float] = []
    decode, hook = models.vae.model.decode, net.register_forward_hook(lambda *_: step_ends.append(sync()))

    def timed_decode(z: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        began = sync()
        (video,) = decode(z, return_dict=False)
        decodes.append(sync() - began)
        decoded[:] = [(z, video)]
        return (video,)

    def run() -> None:
        size = {"height": spec.height, "width": spec.width, "num_frames": spec.num_frames}
        image = Image.open(folder / "first.png").convert("RGB").resize((spec.width, spec.height))
        video = pipe(image, PROMPT, guidance_scale=1.0, num_inference_steps=4, output_type="np", **size).frames[0]
        write_video(folder / "stock.mp4", (video * 255).round().astype(numpy.uint8), fps=24)

    models.vae.model.decode = timed_decode
    whole = statistics.median(call_times(run, 1 + repeats)[1:])
    hook.remove()
    models.vae.model.decode = decode
    step = statistics.median(
        after - before
        for first in range(4, len(step_ends), 4)
        for before, after in zip(step_ends[first : first + 3], step_ends[first + 1 : first + 4], strict=True)
    )
    return StockVideo(whole, step, statistics.median(decodes[1:]), *decoded[0])
