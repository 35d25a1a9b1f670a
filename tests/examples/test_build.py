"""The nano model is a folder that the stock pipeline of diffusers opens and runs."""

import json
from pathlib import Path

import numpy
import pytest
from diffusers import DiffusionPipeline, WanImageToVideoPipeline
from PIL import Image

from examples.nano import build

MODEL = Path(build.__file__).parent / "model"


def test_index_is_what_build_writes() -> None:
    assert json.loads((MODEL / "model_index.json").read_text()) == build.INDEX


@pytest.mark.parametrize("pipeline_class", [WanImageToVideoPipeline, DiffusionPipeline])
def test_stock_pipeline_opens_and_samples(pipeline_class: type[DiffusionPipeline]) -> None:
    pipeline = pipeline_class.from_pretrained(MODEL)
    assert isinstance(pipeline, WanImageToVideoPipeline)
    assert pipeline.tokenizer("the yellow cross").input_ids[-1] == pipeline.tokenizer.eos_token_id
    video = pipeline(
        image=Image.new("RGB", (96, 64), "navy"), prompt="the yellow cross goes downwards", height=64, width=96,
        num_frames=5, num_inference_steps=2, guidance_scale=2.0, output_type="np",
    ).frames[0]  # fmt: skip
    assert video.shape == (5, 64, 96, 3)
    assert numpy.isfinite(video).all()
