"""Writes the plans at the end of docs/recipes.md: `python -m tests.recipe_plans`; test_readme holds the two equal."""

from pathlib import Path

from click.testing import CliRunner

from cli import cli

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
MARK = "<!-- below: python -m tests.recipe_plans -->\n"
ONE, EIGHT = "python", "torchrun --nproc-per-node 8"
NODES = "torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0:29500 --rdzv-id RUN"
FULL, DATA = "recipes/wan22-ti2v-5b.yaml", "--shards DATA --model MODEL --out RUN"
# heading, options of `plan`, launcher and options of `distill`
CARDS = (
    (
        "One GPU of 24 GB",
        "--gpus 1 --gpu rtx4090 --records 10000 --price 0.5 --recipe recipes/wan22-ti2v-5b-lora-24gb.yaml",
        f"{ONE} cli.py distill --config recipes/wan22-ti2v-5b-lora-24gb.yaml",
    ),
    (
        "One GPU of 80 GB",
        "--gpus 1 --gpu h100 --records 10000 --price 3.5 --recipe recipes/wan22-ti2v-5b-80gb.yaml",
        f"{ONE} cli.py distill --config recipes/wan22-ti2v-5b-80gb.yaml",
    ),
    (
        "8 GPUs of 80 GB",
        f"--gpus 8 --gpu h100 --records 100000 --price 3.5 --recipe {FULL}",
        f"{EIGHT} cli.py distill --config {FULL}",
    ),
    (
        "64 GPUs of 80 GB",
        f"--gpus 64 --gpu h100 --records 100000 --price 3.5 --recipe {FULL} --set replicate=8",
        f"{NODES} \\\n    cli.py distill --config {FULL} --replicate 8",
    ),
)


def recipe_plans() -> str:
    """The commands of each card and the plan that they have."""
    parts = [MARK]
    for heading, options, distill in CARDS:
        done = CliRunner().invoke(cli, ["plan", *options.split()], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        machine, _, recipe = options.partition(" --recipe ")
        commands = f"python cli.py plan {machine} \\\n    --recipe {recipe}\n{distill} \\\n    {DATA}"
        parts.append(f"\n### {heading}\n\n```\n{commands}\n```\n\n```\n{done.stdout.rstrip()}\n```\n")
    return "".join(parts)


if __name__ == "__main__":
    kept = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(kept + recipe_plans(), encoding="utf-8")
