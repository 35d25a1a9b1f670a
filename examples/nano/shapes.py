"""One student of several sizes and lengths against students of one size.

    python -m examples.nano.build --out WORK/model --pictures WORK --sizes 64x96 96x64 64x64 --frames 9 17
    python -m examples.nano.shapes --model WORK/model --out WORK/shapes

Each student has the same number of updates in total. Every size has a data set of its own; the first mixes them all.
Writes OUT/shapes.md: distances in floors on each size and length. What is complete in OUT is kept if it is stopped.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from common.options import resolve_config
from common.video import FrameSize, parse_frame_size
from examples.nano.clips import CLIPS_SEED, PROMPTS_SEED, write_conditions
from stage1_encode.config import EncodeConfig
from stage1_encode.encode import encode
from stage2_distill.config import DistillConfig
from stage2_distill.evaluation.compare import open_evaluation, sample_comparison
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.evaluation.latent_metrics import score_candidates
from stage2_distill.train import distill

FOLDER, ROOT = Path(__file__).parent, Path(__file__).parents[2]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="teacher of all sizes and lengths")
    parser.add_argument("--out", type=Path, default=Path("shapes"))
    parser.add_argument(
        "--sizes", type=parse_frame_size, nargs="+", default=[FrameSize(64, 96), FrameSize(96, 64), FrameSize(64, 64)]
    )
    parser.add_argument("--frames", type=int, nargs="+", default=[9, 17])
    parser.add_argument("--records", type=int, default=8192, help="training conditions of each size")
    parser.add_argument("--held-out", type=int, default=8192, help="conditions of the comparison, of each size")
    parser.add_argument("--iterations", type=int, default=3200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--each-length", action="store_true", help="one size means one length too: twice the students")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def make_data(args: argparse.Namespace, size: FrameSize, *, held: bool) -> Path:
    """Draw first frames of one size and encode them; returns the data set."""
    name, count = ("held", args.held_out) if held else ("train", args.records)
    folder = args.out / "conditions" / f"{size}-{name}"
    table, seed = folder / f"{name}.csv", PROMPTS_SEED if held else CLIPS_SEED
    if not table.exists():
        write_conditions(folder, f"{name}.csv", seed=seed, count=count, held=held, sizes=[size])
    out = args.out / "data" / f"{size}-{name}"
    options = {"config": FOLDER / "encode.yaml", "data": str(table), "out": str(out), **vars(size)}
    encode(resolve_config(EncodeConfig, options | {"model": args.model, "device": args.device}))
    return out


def train(args: argparse.Namespace, name: str, data: list[Path], frames: list[int]) -> Path:
    """Train a student by the recipe of the nano world without rollout reuse; returns its run."""
    out = args.out / "runs" / name
    height, width = (int(part) for part in data[0].name.partition("-")[0].split("x"))
    options: dict[str, object] = {
        "config": ROOT / "recipes" / "nano.yaml", "model": args.model, "out": str(out), "device": args.device,
        "shards": tuple(map(str, data)), "num_frames": ",".join(map(str, frames)), "height": height, "width": width,
        "iterations": args.iterations, "lr_cooldown": args.iterations // 2, "critic_warmup": args.iterations // 16,
        # a rollout that is used again would need micro-batches of one
        "rollout_reuse": False, "compile": args.compile, "batch_size": args.batch_size,
    }  # fmt: skip
    distill(resolve_config(DistillConfig, options))
    return out


def compare(args: argparse.Namespace, runs: list[Path], held: Path, frames: int) -> list[float]:
    """Distances of the students to the teacher in floors, means over the seeds."""
    out = args.out / "comparisons" / f"{held.name}-{frames}"
    options = {"checkpoint": tuple(map(str, runs)), "shards": str(held), "model": args.model, "out": str(out)}
    options |= {"num_records": args.held_out, "num_frames": frames, "seeds": tuple(range(args.seeds)), "videos": 0}
    options |= {"batch_size": 512, "dtype": "float32", "max_text_tokens": 32, "device": args.device}
    setting = open_evaluation(resolve_config(EvaluateConfig, options))
    comparison = sample_comparison(setting)
    scores = score_candidates(setting.store, comparison)
    floor = fmean(scores[comparison.teacher.name].frechet)
    students = comparison.contestants[-len(runs) :]  # in the order of the checkpoints
    return [fmean(scores[one.name].frechet) / floor for one in students]


def measure(args: argparse.Namespace) -> Iterator[tuple[object, ...]]:
    """Train all students and yield a row of the table for each size and length."""
    data = {size: make_data(args, size, held=False) for size in args.sizes}
    groups = [[frames] for frames in args.frames] if args.each_length else [list(args.frames)]
    many = train(args, "many", list(data.values()), args.frames)
    for size, own in data.items():
        held = make_data(args, size, held=True)
        for lengths in groups:
            alone = train(args, f"{size}-{'-'.join(map(str, lengths))}", [own], lengths)
            for frames in lengths:
                mixed, single = compare(args, [many, alone], held, frames)
                yield str(size), frames, f"{mixed:.2f}", f"{single:.2f}", f"{mixed / single:.3f}"


def main() -> None:
    """Print and write the table."""
    args = arguments()
    head = ("size", "frames", "many shapes, floors", "one size, floors", "ratio (accepted up to 1.15)")
    rows = list(measure(args))
    lines = [" | ".join(map(str, row)) for row in (head, ("---",) * len(head), *rows)]
    text = "".join(f"| {line} |\n" for line in lines)
    (args.out / "shapes.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
