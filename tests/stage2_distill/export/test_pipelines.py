"""The stock pipelines of diffusers give the latents of `sample`: same noise, same fresh draws, same conditions."""

import shutil
from pathlib import Path

import numpy
import pytest
import torch
import zarr
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from commands.sample import sample_videos
from common.seed import draw_normal, make_generator
from stage2_distill.export.config import ExportConfig
from stage2_distill.export.export import export_student
from stage2_distill.model.lora import LoraSettings
from stage2_distill.sampling.config import SampleConfig
from tests.stage2_distill.export.students import STEPS, make_student
from tests.stage2_distill.training_helpers import SPEC
from tests.tiny_models import picture

PROMPT, SEED = "A red circle moves to the right.", 5
CALL = {
    "height": SPEC.height,
    "width": SPEC.width,
    "num_frames": SPEC.num_frames,
    "guidance_scale": 1.0,
    "output_type": "latent",
    "max_sequence_length": 512,
}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "first.png"
    Image.fromarray(picture(SPEC.height, SPEC.width, seed=3)).save(path)
    return path


def sampled(checkpoint: Path, model: Path, out: Path, image: Path | None) -> numpy.ndarray:
    """Latents of the command `sample` in float32."""
    sample_videos(
        SampleConfig(
            checkpoint=str(checkpoint), model=str(model), out=str(out / "one.mp4"), prompt=PROMPT,
            image=None if image is None else str(image), seed=SEED, dtype="float32", device="cpu",
        )
    )  # fmt: skip
    return zarr.open_array(out / "one.zarr" / "sample" / "latents", mode="r")[:]


def piped(pipe: WanPipeline | WanImageToVideoPipeline, steps: int, image: Path | None) -> numpy.ndarray:
    """Latents of a pipeline; torch's global generator continues where the generator of `sample` stood."""
    generator = make_generator(SEED, 0, 0, "sample")
    noise = draw_normal(SPEC.latent_shape, [generator])
    pipe.set_progress_bar_config(disable=True)
    first = {} if image is None else {"image": Image.open(image)}
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        return pipe(prompt=PROMPT, num_inference_steps=steps, latents=noise, **first, **CALL).frames.numpy()


def check_pipelines(checkpoint: Path, model: Path, tmp_path: Path, image: Path, steps: int, **options: object) -> None:
    out = export_student(ExportConfig(str(checkpoint), str(model), "diffusers", str(tmp_path / "X"), dtype="float32"))
    moved = shutil.move(out, tmp_path / "elsewhere" / "renamed")
    for kind, first in ((WanImageToVideoPipeline, image), (WanPipeline, None)):
        pipe = kind.from_pretrained(moved, dtype=torch.float32, **options)
        folder = tmp_path / kind.__name__
        folder.mkdir()
        expected = sampled(checkpoint, model, folder, first)
        assert numpy.abs(expected).max() > 0.5
        difference = numpy.abs(piped(pipe, steps, first) - expected).max()
        assert difference < 1e-4, f"{kind.__name__}, {steps} steps: {difference:.1e}"


@pytest.mark.parametrize("steps", STEPS)
def test_pipelines_give_the_latents_of_sample(model: Path, image: Path, tmp_path: Path, steps: int) -> None:
    (tmp_path / "elsewhere").mkdir()
    checkpoint = make_student(tmp_path / "run" / "step-000500", model, timesteps=STEPS[steps])
    check_pipelines(checkpoint, model, tmp_path, image, steps)


def test_adapters_are_merged(model: Path, image: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    checkpoint = make_student(tmp_path / "run" / "step-000500", model, adapters=LoraSettings(4, 6.0))
    check_pipelines(checkpoint, model, tmp_path, image, 4)


def test_own_scheduler_travels_with_the_folder(model: Path, image: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    checkpoint = make_student(tmp_path / "run" / "step-000500", model, timesteps=(1000.0, 900.0, 400.0, 100.0))
    check_pipelines(checkpoint, model, tmp_path, image, 4, trust_remote_code=True)
