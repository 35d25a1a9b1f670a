"""Rebuilds the nano models: `python -m examples.nano.build --out examples/nano/model` (one GPU, less
than 25 minutes).

Stages: text encoder, VAE, teacher, then the gate and the card's pictures. A stage whose output exists is skipped.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5EncoderModel

from common.video import FrameSize, VideoSpec, parse_frame_size
from examples.nano.captions import NEGATIVE_PROMPT, captions
from examples.nano.card import write_card
from examples.nano.dit import SHIFT, Pool, train_dit
from examples.nano.gate import Conditions, answers, distances, few, generate, make_conditions, pixels, table
from examples.nano.render import render, to_network
from examples.nano.show import sheet
from examples.nano.text import embed, train_text
from examples.nano.vae import channels_last, encode, train_vae
from examples.nano.world import FRAMES, HEIGHT, WIDTH, draw_scenes
from stage2_distill.model.transformer import convert_transformer

SEED = 1
POOL_BATCH = 1000  # clips encoded at once
GATE = (
    "{conditions} held-out conditions, {seeds} seeds, guidance {scale:g} (the best of {scales}), Frechet distance of "
    "`stage2_distill/evaluation/latent_metrics.py`; the analyser read {judged} clips a row. `floor` is the distance "
    "between two sets of the teacher at {steps} steps."
)
INDEX = {
    "_class_name": "WanImageToVideoPipeline",
    "expand_timesteps": True,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("examples/nano/model"))
    parser.add_argument("--pictures", type=Path, default=Path("examples/nano/pictures"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae-seconds", type=float, default=190)
    parser.add_argument("--dit-seconds", type=float, default=820)
    parser.add_argument("--vae-batch", type=int, default=32)
    parser.add_argument("--dit-batch", type=int, default=512)
    parser.add_argument("--pool", type=int, default=200_000, help="encoded clips, of all sizes together")
    parser.add_argument("--sizes", type=parse_frame_size, nargs="+", default=[FrameSize(HEIGHT, WIDTH)])
    parser.add_argument("--frames", type=int, nargs="+", default=[FRAMES], help="lengths of the teacher's clips")
    parser.add_argument("--conditions", type=int, default=2048)
    parser.add_argument("--judged", type=int, default=2048, help="conditions whose pixels the analyser reads")
    parser.add_argument("--steps", type=int, default=50, help="the teacher's steps in the gate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 2.5], help="guidance; the best is used"
    )
    parser.add_argument("--limit", type=int, default=10**9, help="iterations of each training stage, to try the script")
    parser.add_argument("--more", action="store_true", help="continue to train the existing teacher")
    return parser.parse_args()


class Texts:
    """The trained text encoder as a function from prompts to compact embeddings on one device."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder").float().to(device)

    def __call__(self, prompts: list[str]) -> torch.Tensor:
        """Return embeddings (B L D)."""
        return embed(self.encoder, self.tokenizer, prompts)


def make_pool(vae: AutoencoderKLWan, texts: Texts, device: torch.device, count: int, size: FrameSize) -> Pool:
    """Encode `count` training clips of a size once."""
    channels_last(vae)
    latents, rows, shape = [], [], (size.height, size.width)
    for start in range(0, count, POOL_BATCH):
        index = torch.arange(start, min(start + POOL_BATCH, count), device=device)
        scenes = draw_scenes(SEED + 5, index, held=False, size=shape)
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            latents.append(encode(vae, to_network(render(scenes))).half())
        rows.append(texts(captions(scenes)).half())
    return Pool(torch.cat(latents), torch.cat(rows), texts([NEGATIVE_PROMPT])[0].half())


def write_pictures(
    net: WanTransformer3DModel, vae: AutoencoderKLWan, c: Conditions, args: argparse.Namespace, scale: float
) -> None:
    """Draw the card's pictures: VAE reconstructions, teacher samples, and the three samplers side by side."""
    args.pictures.mkdir(parents=True, exist_ok=True)
    device = c.real.device
    true = render(draw_scenes(SEED + 9, torch.arange(6, device=device), held=None))
    again = pixels(vae, encode(vae, to_network(true)), 8)
    sheet(torch.stack([true, again], dim=1).flatten(0, 1), args.pictures / "vae.png", gap_every=2)
    c = few(c, 12)
    kinds = ("teacher 50", "teacher 4", "undistilled 4")
    sets = [pixels(vae, generate(net, c, kind, seed=9, scale=scale, steps=args.steps, batch=16), 16) for kind in kinds]
    sheet(sets[0], args.pictures / "teacher.png")
    sheet(torch.stack([part[:8] for part in sets], dim=1).flatten(0, 1), args.pictures / "compare.png", gap_every=3)


def write_index(out: Path) -> None:
    """Write the files that make the folder a diffusers pipeline."""
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT).save_pretrained(out / "scheduler")
    (out / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")


def train(args: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Train whatever is missing: text encoder, VAE, teacher."""
    out, device = args.out, torch.device(args.device)
    if not (out / "text_encoder").exists():
        right = train_text(out, seed=SEED, iterations=min(args.limit, 1500))
        say(f"text encoder: {right:.4f} of the words right")
    if not (out / "vae").exists():
        done = train_vae(
            out, device, seed=SEED, seconds=args.vae_seconds, limit=args.limit, batch=args.vae_batch, report=say
        )
        say(f"vae: {done} iterations")
    if args.more or not (out / "transformer").exists():
        vae = AutoencoderKLWan.from_pretrained(out / "vae").float().to(device)
        texts, count = Texts(out, device), args.pool // len(args.sizes)
        pools = [make_pool(vae, texts, device, count, size) for size in args.sizes]
        for size, pool in zip(args.sizes, pools, strict=True):
            say(f"pool: {len(pool.latents)} clips of {size}, std {pool.latents[:1000].float().std():.3f}")
        pools = [pool.shortened(VideoSpec(num_frames=frames).latent_frames) for pool in pools for frames in args.frames]
        done = train_dit(
            out, pools, seed=SEED, seconds=args.dit_seconds, limit=args.limit, batch=args.dit_batch, report=say
        )
        say(f"dit: {done} iterations")


def gate(args: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Judge the teacher at the guidance at which it is best, and draw the card's pictures."""
    device = torch.device(args.device)
    texts = Texts(args.out, device)
    vae = AutoencoderKLWan.from_pretrained(args.out / "vae").float().to(device)
    net = WanTransformer3DModel.from_pretrained(args.out / "transformer").float().to(device).eval()
    convert_transformer(net)
    conditions = make_conditions(vae, texts, texts([NEGATIVE_PROMPT]), args.conditions, 256)
    common = {"steps": args.steps, "batch": 1024}
    real = {scale: distances(net, conditions, seed=0, scale=scale, **common)["real"] for scale in args.scales}
    scale = min(real, key=lambda one: real[one])
    say(f"distance of true clips by guidance {real}; {scale} is used")
    write_pictures(net, vae, conditions, args, scale)
    rows = [distances(net, conditions, seed=seed, scale=scale, **common) for seed in range(args.seeds)]
    report = table(rows, answers(net, vae, few(conditions, args.judged), scale=scale, **common))
    (args.pictures / "gate.md").write_text(f"{GATE.format(scale=scale, **vars(args))}\n\n{report}\n")
    say("gate\n" + report)


def main() -> None:
    """Run every stage whose output is missing."""
    args = arguments()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {text}", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    write_index(args.out)
    train(args, say)
    gate(args, say)
    written = {name: args.pictures / f"{name.lower()}.md" for name in ("Gate", "Student")}
    write_card(args.out, args.pictures, sections={name: p.read_text() for name, p in written.items() if p.is_file()})


if __name__ == "__main__":
    main()
