"""What was exported comes back: for training, sampling and evaluation, and through diffusers' own LoRA loader."""

import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import FlowMatchLCMScheduler, WanPipeline
from safetensors.torch import load_file

from common.video import FrameSize
from stage2_distill.checkpointing.format import STUDENT_FILE, load_checkpoint, read_facts, write_json
from stage2_distill.evaluation.compare import open_evaluation, sample_comparison
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.export.config import ExportConfig
from stage2_distill.export.export import export_student
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.lora import LoraSettings
from stage2_distill.model.wan import load_transformer
from stage2_distill.sampling.student_sampler import load_student
from stage2_distill.sampling.student_source import find_student, stated_facts
from stage2_distill.weight_files.lora_files import LoraFile
from stage2_distill.weight_files.stored_weights import WEIGHTS_FILE, read_weight_table
from tests.stage2_distill.export.students import make_student
from tests.stage2_distill.export.test_pipelines import piped, sampled
from tests.stage2_distill.training_helpers import SPEC, make_config, make_shards, run_here, tensors

CPU = torch.device("cpu")


def export(checkpoint: Path, model: Path, out: Path, form: str, **options: object) -> Path:
    return export_student(ExportConfig(str(checkpoint), str(model), form, str(out), **options))


def weights_of(path: Path, model: Path, **options: object) -> dict[str, torch.Tensor]:
    net = load_student(
        path, ExecutionPlan(), model=str(model), weights="ema", dtype=torch.float32, device=CPU, **options
    )
    return dict(net.named_parameters())


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "data", model)


@pytest.fixture(scope="module")
def student(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(tmp_path_factory.mktemp("run") / "step-000500", model)


@pytest.fixture(scope="module")
def adapted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = LoraSettings(rank=4, alpha=6.0)
    return make_student(tmp_path_factory.mktemp("run") / "step-000500", model, adapters=settings)


def test_training_from_an_export_gives_the_same_bits(model: Path, shards: Path, student: Path, tmp_path: Path) -> None:
    """One iteration from the bf16 file equals one from the checkpoint's weights rounded to bf16."""
    wan = export(student, model, tmp_path / "boats", "wan") / "boats.safetensors"
    rounded = tmp_path / "rounded"
    rounded.mkdir()
    average = {f"ema.{name}": torch.empty_like(value) for name, value in weights_of(student, model).items()}
    load_checkpoint(student, average)
    content = {name.removeprefix("ema."): value.bfloat16() for name, value in average.items()}
    torch.save(content, rounded / "model.pt")
    results = []
    for source in (wan, rounded / "model.pt", wan.parent):
        config = make_config(shards, model, tmp_path / f"run{len(results)}", iterations=1, init_from=str(source))
        results.append(tensors(run_here(config)))
    for other in results[1:]:
        assert results[0].keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_a_file_as_base(model: Path, shards: Path, student: Path, tmp_path: Path) -> None:
    """`distill --model FILE` equals `--init-from FILE`; the folder with the VAE serves for sampling and export."""
    wan = export(student, model, tmp_path / "boats", "wan", dtype="float32") / "boats.safetensors"
    run = run_here(make_config(shards, wan, tmp_path / "run", iterations=1, guidance_scale=1.0, checkpoint_every=1))
    assert numpy.isfinite(sampled(run, model, tmp_path, None)).all()
    stored = load_file(export(run, model, tmp_path / "X", "diffusers", dtype="float32") / "transformer" / WEIGHTS_FILE)
    for name, value in weights_of(run, model).items():
        assert torch.equal(stored[name], value), name
    adapted = run_here(make_config(shards, wan, tmp_path / "adapted", iterations=1, checkpoint_every=1, lora_rank=2))
    with pytest.raises(ValueError, match="its transformer is not the one of the distillation"):
        weights_of(adapted, model)


def test_sample_and_evaluate_from_a_file(model: Path, shards: Path, student: Path, tmp_path: Path) -> None:
    """A float32 export samples the same latents as its checkpoint, and names its own timesteps and size."""
    wan = export(student, model, tmp_path / "boats", "wan", dtype="float32") / "boats.safetensors"
    found = []
    for source in (student, wan):
        folder = tmp_path / f"sample{len(found)}"
        folder.mkdir()
        found.append(sampled(source, model, folder, None))
    assert numpy.array_equal(*found)
    config = EvaluateConfig(
        (str(student), str(wan)), str(shards), str(model), str(tmp_path / "report"), num_records=2, seeds=(0,),
        teacher_steps=2, dtype="float32", device="cpu", videos=0,
    )  # fmt: skip
    comparison = sample_comparison(open_evaluation(config))
    assert len(comparison.contestants) == 5


def test_lora_through_diffusers(model: Path, adapted: Path, tmp_path: Path) -> None:
    """Base and file in diffusers equal the merged student, and the latents of `sample`."""
    out = export(adapted, model, tmp_path / "boats", "lora", dtype="float32")
    pipe = WanPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.load_lora_weights(str(out / "boats.safetensors"))
    pipe.fuse_lora()
    merged = weights_of(adapted, model)
    fused = {n.replace(".base_layer.", "."): p for n, p in pipe.transformer.named_parameters() if ".lora_" not in n}
    assert fused.keys() == merged.keys()
    for name, value in merged.items():
        assert torch.allclose(fused[name], value, atol=1e-5), name
    pipe.scheduler = FlowMatchLCMScheduler.from_pretrained(out / "scheduler")
    difference = numpy.abs(piped(pipe, 4, None) - sampled(adapted, model, tmp_path, None)).max()
    assert difference < 1e-4, difference


def test_lora_file_as_student_and_as_base(model: Path, shards: Path, adapted: Path, tmp_path: Path) -> None:
    file = export(adapted, model, tmp_path / "boats", "lora", dtype="float32") / "boats.safetensors"
    merged = weights_of(adapted, model)
    net = load_transformer(model, torch.float32, loras=[LoraFile(file)])
    for name, value in net.named_parameters():
        assert torch.allclose(value, merged[name], atol=1e-5), name
    again = weights_of(adapted, model, loras=[LoraFile(file, -1.0)])
    for name, value in load_transformer(model, torch.float32).named_parameters():
        assert torch.allclose(again[name], value, atol=1e-5), name
    assert numpy.allclose(
        sampled(file, model, tmp_path, None), sampled(adapted, model, make(tmp_path / "x"), None), atol=1e-4
    )
    # "my style, then few steps": the run's base is the model with the file, for all roles and for sampling
    for rank in (0, 2):
        config = make_config(
            shards, model, tmp_path / f"run{rank}", iterations=1, checkpoint_every=1, student_lr=0.0, lora_rank=rank,
            base_lora=(f"{file}:1.0",),
        )  # fmt: skip
        for name, value in weights_of(run_here(config), model).items():
            assert torch.allclose(value, merged[name], atol=1e-5), (rank, name)


def test_export_of_adapters_on_a_base_with_lora(model: Path, shards: Path, adapted: Path, tmp_path: Path) -> None:
    file = export(adapted, model, tmp_path / "style", "lora", dtype="float32") / "style.safetensors"
    options = {"iterations": 1, "checkpoint_every": 1, "lora_rank": 2, "base_lora": (str(file),)}
    run = run_here(make_config(shards, model, tmp_path / "run", **options))
    table = read_weight_table(export(run, model, tmp_path / "both", "wan", dtype="float32") / "both.safetensors")
    for name, value in weights_of(run, model).items():
        assert torch.allclose(table[name][...], value, atol=1e-6), name


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_svd_at_full_rank_is_the_student(model: Path, student: Path, shards: Path, tmp_path: Path) -> None:
    merged, errors, latents = weights_of(student, model), [], []
    for rank in (4, 12, 48):
        options = {"shards": str(shards), "num_records": 2, "device": "cpu"}
        file = export(student, model, tmp_path / f"r{rank}", "lora", dtype="float32", rank=rank, **options)
        row = "error of sampled latents on held-out conditions | "
        latents.append(float((file / "README.md").read_text().partition(row)[2].partition(",")[0]))
        net = load_transformer(model, torch.float32, loras=[LoraFile(file / f"r{rank}.safetensors")])
        found = dict(net.named_parameters())
        errors.append(max(float((found[name] - value).detach().abs().max()) for name, value in merged.items()))
    assert errors[0] > errors[1] > 100 * errors[2]
    assert errors[2] < 1e-5
    assert latents[0] > latents[1] > 100 * latents[2]
    assert latents[2] < 1e-5


def test_every_format_names_all_sizes_and_lengths(model: Path, tmp_path: Path) -> None:
    """The card says how to choose; files carry them, and a low rank is measured on records of each size."""
    run = make_student(tmp_path / "step-000500", model)
    sizes = (FrameSize(32, 96), FrameSize(64, 64))
    write_json(run / STUDENT_FILE, replace(read_facts(run), sizes=sizes, lengths=(5, 9)).stored_fields)
    shards = make_shards(tmp_path / "data", model, sizes=((32, 96), (64, 64), (96, 32)))
    options = {"rank": 4, "shards": str(shards), "num_records": 3, "device": "cpu"}
    for form, own in (("wan", {}), ("lora", options), ("diffusers", {})):
        out = export(run, model, tmp_path / form, form, dtype="float32", **own)
        card = (out / "README.md").read_text()
        assert "| videos | 5 or 9 frames of 32x96, 64x64 (height x width), 8 per second |" in card
        assert "nearest to the picture's" in card and "make 9 frames of 64x64;" in card
        assert ("not measured" not in card) and ("error of sampled latents" in card) == (form == "lora")
        if form != "diffusers":
            facts = find_student(str(out / f"{form}.safetensors"), str(model)).facts
            assert (facts.sizes, facts.lengths, facts.spec) == (sizes, (5, 9), SPEC)
            node = json.loads((out / "workflow_image_to_video.json").read_text())["7"]
            assert node["inputs"]["width"] == 64 and node["_meta"]["title"].endswith("32x96, 64x64 (height x width)")
    with pytest.raises(ValueError, match=r"checkpoint=a: its metadata cannot be read \('shift'\); export it again"):
        stated_facts("a", read_facts(run), {"size": "9x64x64", "timesteps": "1000"})
    tall = make_shards(tmp_path / "tall", model, records=8, sizes=((96, 32),))
    with pytest.raises(ValueError, match="has records of 96x32, and the student was trained on 32x96, 64x64"):
        export(run, model, tmp_path / "refused", "lora", **options | {"shards": str(tall)})
