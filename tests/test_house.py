"""The house rules: floors, doors and the three locks between the stages, each shown to bite."""

import ast
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks.structure import measure_structure

ROOT = Path(__file__).parent.parent
FLOORS = {
    "common": {"common"},
    "shards": {"common", "shards"},
    "stage1_encode": {"common", "shards", "stage1_encode"},
    "stage2_distill": {"common", "shards", "stage2_distill"},
    "commands": {"common", "shards", "stage1_encode", "stage2_distill", "commands"},
    "cli": {"common", "shards", "stage1_encode", "stage2_distill", "commands", "cli"},
}
DOORS = {  # library -> the only files that may import it
    "diffusers": {
        "stage1_encode/models/vae.py",
        "stage2_distill/model/wan.py",
        "stage2_distill/model/transformer.py",
        "stage2_distill/model/layers.py",
        "stage2_distill/export/few_step_scheduler.py",  # travels with an export and is loaded by diffusers
    },
    "transformers": {"stage1_encode/models/text_encoder.py", "stage1_encode/video_metrics/clip_score.py"},
    "decord": {"stage1_encode/media/first_frame.py"},
    "av": {
        "stage1_encode/media/color.py",
        "stage1_encode/media/first_frame.py",
        "stage1_encode/media/video_frame.py",
        "stage1_encode/media/video_writer.py",
        "stage1_encode/media/whole_clip.py",
    },
    "zarr": {"shards/latent_store.py"},
    "msgspec": {"common/files.py", "shards/latent_store.py"},
    "webdataset": {"shards/"},
    "click": {"cli.py", "common/options.py"},
    "peft": {"stage2_distill/model/lora.py"},
    "pyarrow": {"stage1_encode/imported_latents/fastvideo.py"},
    "matplotlib": {"stage2_distill/monitoring/plot.py"},
    "gradio": {"commands/page.py", "commands/page_server.py"},
    "fastapi": {"commands/page_server.py"},
    "uvicorn": {"commands/page_server.py"},
    "wandb": {"stage2_distill/monitoring/trackers.py"},
    "torch.distributed": {"stage2_distill/", "stage1_encode/decoders/split_decoder.py"},  # ranks share one video
    "pickle": set(),
}
FORBIDDEN_IN_STAGE_TWO = (
    "stage1_encode",
    "decord",
    "AutoencoderKLWan",
    "UMT5EncoderModel",
    "autoencoders",
)
FORBIDDEN_LIBRARY = "transformers"  # its own modules; diffusers.models.transformers is where the denoiser lives


def sources() -> dict[str, str]:
    """Every product file, {path from the root: text}."""
    folders = [name for name in FLOORS if name != "cli"]
    files = [path for name in folders for path in (ROOT / name).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in [*files, ROOT / "cli.py"]}


def imports(text: str) -> list[tuple[str, int]]:
    """Every module imported anywhere in a file, lazily and under TYPE_CHECKING too, with its depth of `from` dots."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(f"{node.module or ''}.{alias.name}", node.level) for alias in node.names]
    return found


def violations(files: dict[str, str]) -> list[str]:
    """What breaks the floor table or the door table."""
    found = []
    for path, text in files.items():
        floor = path.split("/")[0].removesuffix(".py")
        for module, level in imports(text):
            top = module.split(".")[0]
            if level:
                found.append(f"{path}: relative import")
            if top in FLOORS and top not in FLOORS[floor]:
                found.append(f"{path}: {floor} may not import {top}")
            closed = [name for name in DOORS if f"{module}.".startswith(f"{name}.")]
            closed = [name for name in closed if not path.startswith(tuple(DOORS[name]))]
            found += [f"{path}: {name} comes in by {sorted(DOORS[name])} only" for name in closed]
            if top == "torch" and path.endswith("config.py"):
                found.append(f"{path}: torch in a configuration")
        if path.endswith("__init__.py") and text.strip():
            found.append(f"{path}: code in __init__.py")
    return found


def lock_violations(files: dict[str, str]) -> list[str]:
    """Lock 1: what stage two names of stage one, a VAE or a text encoder; and the reverse."""
    found = []
    for path, text in files.items():
        names = {module for module, _ in imports(text)}
        if path.startswith("stage2_distill/"):
            found += [f"{path}: {n}" for n in names for bad in FORBIDDEN_IN_STAGE_TWO if bad in n]
            found += [f"{path}: {n}" for n in names if n.split(".")[0] == FORBIDDEN_LIBRARY]
        if path.startswith("stage1_encode/"):
            found += [f"{path}: {n}" for n in names if n.startswith("stage2_distill")]
    return found


def test_floors_and_doors() -> None:
    assert violations(sources()) == []


@pytest.mark.parametrize(
    ("path", "line", "broken"),
    [
        ("common/flow.py", "import shards.record", "may not import shards"),
        ("shards/dataset.py", "from stage1_encode.media import rows", "may not import stage1_encode"),
        (
            "stage1_encode/media/rows.py",
            "from stage2_distill.model.wan import load_transformer",
            "may not import stage2_distill",
        ),
        ("stage2_distill/trainer.py", "from diffusers import WanTransformer3DModel", "comes in by"),
        ("stage1_encode/media/rows.py", "import decord", "comes in by"),
        ("common/device.py", "from torch import distributed", "comes in by"),
        ("stage2_distill/config.py", "import torch", "torch in a configuration"),
        ("stage2_distill/trainer.py", "from commands.sample import sample_videos", "may not import commands"),
        ("commands/sample.py", "import cli", "may not import cli"),
        ("shards/__init__.py", "import torch", "code in __init__"),
        ("shards/dataset.py", "from . import record", "relative import"),
        ("shards/dataset.py", "import pickle", "comes in by"),
    ],
)
def test_floors_and_doors_bite(path: str, line: str, broken: str) -> None:
    assert any(broken in found for found in violations({path: line}))


def test_lock_1_no_stage_names_the_other() -> None:
    assert lock_violations(sources()) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("stage2_distill/trainer.py", "def f():\n    from stage1_encode.models.vae import decode"),
        ("stage2_distill/trainer.py", "if TYPE_CHECKING:\n    import stage1_encode.models.text_encoder"),
        ("stage2_distill/model/wan.py", "from diffusers import AutoencoderKLWan"),
        ("stage2_distill/sampling/student_sampler.py", "import decord"),
        ("stage2_distill/model/transformer.py", "from transformers import T5EncoderModel"),
        ("stage1_encode/encode.py", "def f():\n    import stage2_distill.model.wan"),
    ],
)
def test_lock_1_bites(path: str, text: str) -> None:
    assert lock_violations({path: text})


CLEAN = """
import sys
import stage2_distill.train, stage2_distill.sampling.student_sampler
{extra}
names = ("stage1_encode", "decord", "diffusers.models.autoencoders.autoencoder_kl_wan", "transformers.models.umt5")
bad = [m for m in sys.modules if m.startswith(names)]
sys.exit(f"loaded: {{bad}}" if bad else 0)
"""


@pytest.mark.parametrize(("extra", "code"), [("", 0), ("import stage1_encode.config", 1)])
def test_lock_2_importing_the_trainer_loads_nothing_of_stage_one(extra: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", CLEAN.format(extra=extra)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr


def test_help_is_quick_and_loads_no_torch() -> None:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "cli.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.perf_counter() - began < 5  # the figure itself, under 0.3 s, is printed by `time python cli.py --help`
    assert "distill" in done.stdout
    probe = "import sys, cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT).returncode == 0


MOST_FILES, MOST_AT_ROOT = 10, 6
STAGES = ("stage1_encode", "stage2_distill")


def too_many_files(files: Iterable[str]) -> list[str]:
    """Folders of the source with more files than one can look through."""
    count = Counter(path.rpartition("/")[0] for path in files if "/" in path and not path.endswith("/__init__.py"))
    return sorted(folder for folder, n in count.items() if n > (MOST_AT_ROOT if folder in STAGES else MOST_FILES))


def module_graph(files: dict[str, str]) -> dict[str, set[str]]:
    """For each file the files of the source that it imports."""
    graph: dict[str, set[str]] = {}
    for path, text in files.items():
        options = [
            "/".join(name.split(".")[:size]) + ".py"
            for name, _ in imports(text)
            for size in range(1, name.count(".") + 2)
        ]
        graph[path] = {one for one in options if one in files}
    return graph


def folder_graph(files: dict[str, str], stage: str) -> dict[str, set[str]]:
    """For each folder of a stage the others that it imports; `config.py` of the root, which any may, is left out."""
    graph: dict[str, set[str]] = defaultdict(set)
    for path, targets in module_graph(files).items():
        for target in targets:
            own, other = path.rpartition("/")[0], target.rpartition("/")[0]
            inside = all(folder.split("/")[0] == stage for folder in (own, other))
            if inside and own != other and target != f"{stage}/config.py":
                graph[own].add(other)
    return graph


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Nodes that lie on a cycle or between two, or none."""
    left = {node: set(targets) for node, targets in graph.items()}
    while True:
        free = {node for node, targets in left.items() if not targets & left.keys()}
        if not free:
            break
        left = {node: targets for node, targets in left.items() if node not in free}
    return sorted(left)


def upward_imports(files: dict[str, str]) -> list[str]:
    """Folders of a stage that import a file of its root."""
    graphs = {stage: folder_graph(files, stage) for stage in STAGES}
    return sorted(f"{own} -> {stage}" for stage, graph in graphs.items() for own in graph if stage in graph[own])


def test_no_folder_is_too_full() -> None:
    assert too_many_files(sources()) == []


@pytest.mark.parametrize(
    ("folder", "number"), [("stage2_distill", 7), ("stage2_distill/model", 11), ("common", 11), ("shards/storage", 11)]
)
def test_no_folder_is_too_full_bites(folder: str, number: int) -> None:
    files = [f"{folder}/{name}.py" for name in ["__init__", *(f"f{n}" for n in range(number))]]
    assert too_many_files(files) == [folder]
    assert too_many_files(files[:-1]) == []


def test_no_cycle_of_files_nor_of_folders() -> None:
    files = sources()
    assert cycle(module_graph(files)) == []
    for floor in FLOORS:
        assert cycle(folder_graph(files, floor)) == []
    assert upward_imports(files) == []


def test_no_cycle_bites() -> None:
    files = {
        "stage2_distill/config.py": "",
        "stage2_distill/train.py": "from stage2_distill.dmd import losses",
        "stage2_distill/dmd/losses.py": "from stage2_distill.config import DistillConfig",
        "stage2_distill/model/wan.py": "from stage2_distill.dmd.losses import dmd_loss",
    }
    assert upward_imports(files) == []
    assert cycle(folder_graph(files, "stage2_distill")) == []
    files["stage2_distill/dmd/schedule.py"] = "def f():\n    from stage2_distill.model.wan import load"
    assert cycle(module_graph(files)) == []
    assert cycle(folder_graph(files, "stage2_distill")) == [
        "stage2_distill",
        "stage2_distill/dmd",
        "stage2_distill/model",
    ]
    files["stage2_distill/dmd/schedule.py"] = "import stage2_distill.train"
    assert upward_imports(files) == ["stage2_distill/dmd -> stage2_distill"]
    files["stage2_distill/dmd/schedule.py"] = "from stage2_distill.dmd.losses import dmd_loss"
    files["stage2_distill/dmd/losses.py"] = "from stage2_distill.dmd import schedule"
    assert cycle(module_graph(files))


def test_imports_of_tests() -> None:
    """Neither the source nor benchmarks nor examples need the tests."""
    files = sources() | {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for folder in ("benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.py")
    }
    named = {f"{path}: tests" for path, text in files.items() for n, _ in imports(text) if n.split(".")[0] == "tests"}
    assert named == set()


def test_sizes_comments_and_names() -> None:
    structure = measure_structure(ROOT)
    assert structure.function_lines_max <= 40
    assert structure.file_lines_max <= 400
    assert structure.files_in_a_folder_max <= 10
    assert structure.comments_per_100_lines >= 5
    assert structure.words_in_a_name_median >= 2
    assert structure.files_in_cycles == 0
