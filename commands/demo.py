"""The `demo` command: every step, from clips to videos, on the small model of examples/nano."""

import sys
from pathlib import Path

from commands.evaluate import evaluate_students
from commands.sample import sample_videos
from common.options import resolve_config
from stage1_encode.config import EncodeConfig
from stage1_encode.encode import encode
from stage2_distill.config import DistillConfig
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.evaluation.report import summary_lines
from stage2_distill.sampling.config import SampleConfig
from stage2_distill.train import distill


def run_demo(folder: Path) -> list[str]:
    """Encode, distill, evaluate and sample into a folder; returns the lines that end the demo."""
    nano = find_example()
    sys.path.append(str(nano.parent.parent))  # its judge imports examples.nano, which is not installed
    common = {"model": str(nano / "model"), "device": "cpu"}
    data, held_out, run, videos = (folder / name for name in ("data", "held", "run", "videos"))
    for table, shards in (("clips.csv", data), ("held.csv", held_out)):
        options = {"config": nano / "encode.yaml", "data": str(nano / table), "out": str(shards)}
        encode(resolve_config(EncodeConfig, common | options))
    options = {"config": nano / "demo.yaml", "shards": (str(data),), "out": str(run)}
    distill(resolve_config(DistillConfig, common | options))
    options = {"config": nano / "evaluate.yaml", "checkpoint": (str(run),), "shards": str(held_out)}
    options |= {"out": str(folder / "report"), "judge": str(nano / "judge.py")}
    report = evaluate_students(resolve_config(EvaluateConfig, common | options))
    options = {"config": nano / "sample.yaml", "checkpoint": str(run), "data": str(nano / "prompts.csv")}
    sample_videos(resolve_config(SampleConfig, common | options | {"out": str(videos)}))
    return [
        "",
        *summary_lines(report.parent),
        "",
        "50 iterations bring the student as near to its teacher's 50 steps as 128 conditions can tell by distances;",
        "whitened latents still show every error of one step, pixels what of it is seen (docs/evaluation.md).",
        f"open {report} to see it; shards are in {data}, checkpoints in {run}, videos in {videos}",
    ]


def find_example() -> Path:
    """The folder examples/nano of the source, above this file or in the working directory; ValueError without it."""
    folders = [root / "examples" / "nano" for root in (Path(__file__).parent.parent, Path.cwd())]
    for folder in folders:
        if (folder / "demo.yaml").is_file():
            return folder
    raise ValueError(
        f"demo: needs the folder examples/nano of the source, which no installed package has (looked in "
        f"{' and '.join(str(folder) for folder in folders)}); clone the repository and run ti2v-distill demo in it"
    )
