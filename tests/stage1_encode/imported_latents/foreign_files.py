"""The clips of the tests as FastVideo and LightX2V would have encoded them: whole, by diffusers and transformers."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy
import pyarrow
import pyarrow.parquet
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from stage1_encode.config import EncodeConfig
from stage1_encode.media.first_frame import read_first_frame

NEGATIVE, FRAMES, TEXT_ROWS = "blurry", 9, 512


@dataclass(frozen=True)
class ForeignClip:
    """A clip: raw latents (C T H W) and an embedding (L D), both float32, and what normalizes the latents."""

    caption: str
    latents: Tensor
    text: Tensor
    statistics: tuple[Tensor, Tensor]

    @property
    def normalized(self) -> Tensor:
        mean, std = self.statistics
        return (self.latents - mean) / std


def configure(source: Path, model: Path, out: Path, **options: object) -> EncodeConfig:
    base = EncodeConfig(str(source), str(model), str(out), FRAMES, 64, 96, shard_size=4, device="cpu")
    return replace(base, **options)


def encode_clips(folder: Path, model: Path) -> list[ForeignClip]:
    vae = AutoencoderKLWan.from_pretrained(model / "vae")
    statistics = tuple(torch.tensor(x).view(48, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    with (folder / "clips.csv").open() as file:
        rows = list(csv.DictReader(file))
    clips = []
    for row in rows:
        with av.open(str(folder / row["video"])) as video:
            frames = [
                frame.to_ndarray(format="rgb24") for _, frame in zip(range(FRAMES), video.decode(video=0), strict=False)
            ]
        frames[0] = read_first_frame(str(folder / row["video"]), height=64, width=96).pixels
        pixels = torch.from_numpy(numpy.stack(frames)).permute(3, 0, 1, 2)[None] / 127.5 - 1
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mode()[0]
        caption = " ".join(row["prompt"].replace("&amp;", "&").split())
        clips.append(ForeignClip(caption, latents, embed(model, caption), statistics))
    return clips


def embed(model: Path, prompt: str) -> Tensor:
    ids = AutoTokenizer.from_pretrained(model / "tokenizer")(prompt, return_tensors="pt")
    with torch.no_grad():
        return UMT5EncoderModel.from_pretrained(model / "text_encoder")(**ids).last_hidden_state[0]


def padded(text: Tensor) -> Tensor:
    return torch.nn.functional.pad(text, (0, 0, 0, TEXT_ROWS - len(text)))


def columns(name: str, tensor: Tensor) -> dict[str, object]:
    data, kind = tensor.contiguous().numpy(), str(tensor.dtype).removeprefix("torch.")
    return {f"{name}_bytes": data.tobytes(), f"{name}_shape": list(data.shape), f"{name}_dtype": kind}


def parquet_rows(clips: Sequence[ForeignClip]) -> list[dict[str, object]]:
    """Rows with the fields of FastVideo's schema for text-to-video; width and height swapped, as it writes them."""
    facts = {"media_type": "video", "width": 64, "height": 96, "num_frames": 3, "duration_sec": 0.4, "fps": 24.0}
    return [
        {"id": f"clip-{number}", "file_name": f"clip-{number}", "caption": clip.caption, **facts}
        | columns("vae_latent", clip.latents)
        | columns("text_embedding", clip.text)
        for number, clip in enumerate(clips)
    ]


def write_parquet(folder: Path, rows: Sequence[dict[str, object]], *, per_file: int = 2) -> Path:
    (folder / "worker_0").mkdir(parents=True, exist_ok=True)
    for start in range(0, len(rows), per_file):
        table = pyarrow.Table.from_pylist(list(rows[start : start + per_file]))
        path = folder / "worker_0" / f"data_chunk_{start // per_file}.parquet"
        pyarrow.parquet.write_table(table, path, compression="zstd")
    return folder


def write_cache(folder: Path, clips: Sequence[ForeignClip], model: Path) -> Path:
    """The folder of LightX2V: normalized latents and padded embeddings in bfloat16."""
    for name in ("latents", "conditions"):
        (folder / name).mkdir(parents=True)
    lines = []
    for number, clip in enumerate(clips):
        stem = f"sample_g{number:06d}_w000.pt"
        latents = clip.normalized.bfloat16()
        facts = {"num_frames": 3, "height": 4, "width": 6, "fps": 24.0}
        torch.save({"latents": latents, **facts}, folder / "latents" / stem)
        save_condition(folder / "conditions" / stem, clip.caption, clip.text)
        paths = {"video_latent_path": f"latents/{stem}", "condition_path": f"conditions/{stem}"}
        lines.append(json.dumps({"caption": clip.caption, "video_paths": ["x.mp4"], "height": 64, **paths}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    save_condition(folder / "negative_condition.pt", NEGATIVE, embed(model, NEGATIVE))
    return folder


def save_condition(path: Path, prompt: str, text: Tensor) -> None:
    torch.save({"prompt": prompt, "conditions": {"prompt_embed": padded(text).bfloat16()}}, path)
