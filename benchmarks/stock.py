"""diffusers' own pipeline with 4 steps, on the models of `benchmarks/sample.py`."""

import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline
from PIL import Image
from torch import Tensor

from benchmarks.clock import sync, times
from common.video import VideoSpec
from stage1_encode.generation.condition_encoder import ConditionEncoder
from stage1_encode.media.video_writer import write_video
from stage2_distill.model.transformer import WanTransformer

PROMPT = "A red circle moves to the right, slowly, in front of a grey wall, and then it turns and comes back again."


@dataclass(frozen=True)
class Stock:
    """Seconds from picture to file, of one step and of the decode; what it decoded."""

    whole: float
    step: float
    decode: float
    latents: Tensor  # (1 C T H W)
    video: Tensor  # (1 3 F X Y)


def run_stock(net: WanTransformer, models: ConditionEncoder, spec: VideoSpec, folder: Path, repeats: int) -> Stock:
    """Medians of `repeats` videos after a first one; the picture is first.png in the folder."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    pipe = WanImageToVideoPipeline(
        tokenizer=models.text.tokenizer, text_encoder=models.text.model, vae=models.vae.model,
        scheduler=scheduler, transformer=net, expand_timesteps=True,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    steps: list[float] = []
    decoded: list[tuple[Tensor, Tensor]] = []
    decodes: list[float] = []
    plain, hook = models.vae.model.decode, net.register_forward_hook(lambda *_: steps.append(sync()))

    def watched(z: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        began = sync()
        (video,) = plain(z, return_dict=False)
        decodes.append(sync() - began)
        decoded[:] = [(z, video)]
        return (video,)

    def run() -> None:
        size = {"height": spec.height, "width": spec.width, "num_frames": spec.num_frames}
        image = Image.open(folder / "first.png").convert("RGB").resize((spec.width, spec.height))
        made = pipe(image, PROMPT, guidance_scale=1.0, num_inference_steps=4, output_type="np", **size).frames[0]
        write_video(folder / "stock.mp4", (made * 255).round().astype(numpy.uint8), fps=24)

    models.vae.model.decode = watched
    whole = statistics.median(times(run, 1 + repeats)[1:])
    hook.remove()
    models.vae.model.decode = plain
    step = statistics.median(
        after - before
        for k in range(4, len(steps), 4)
        for before, after in zip(steps[k : k + 3], steps[k + 1 : k + 4], strict=True)
    )
    return Stock(whole, step, statistics.median(decodes[1:]), *decoded[0])
