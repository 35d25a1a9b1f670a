"""Every format holds the student's weights, whatever the checkpoint's form and number of ranks."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file

from stage2_distill.checkpointing.format import STUDENT_FILE
from stage2_distill.export.config import ExportConfig
from stage2_distill.export.export import export_student
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.lora import LoraSettings
from stage2_distill.sampling.student_sampler import load_student
from stage2_distill.weight_files.stored_weights import WEIGHTS_FILE
from tests.stage2_distill.export.students import adapter_weights, make_student, shifted_weights
from tests.stage2_distill.training_helpers import make_config, make_shards, run_worker

CPU = torch.device("cpu")
LORA = LoraSettings(rank=4, alpha=6.0)
FORMS = {"standard": {}, "compact": {"compact": True}, "adapters": {"adapters": LORA}}


@pytest.fixture(scope="module", params=FORMS)
def checkpoint(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "step-000500"
    return make_student(folder, model, **FORMS[request.param])


def export(checkpoint: Path, model: Path, out: Path, form: str, **options: object) -> Path:
    config = {"dtype": "float32", "device": "cpu"} | options
    return export_student(ExportConfig(str(checkpoint), str(model), form, str(out), **config))


@pytest.mark.parametrize("weights", ["average", "student"])
def test_wan_file_holds_the_student(checkpoint: Path, model: Path, tmp_path: Path, weights: str) -> None:
    """Through diffusers' own conversion, tensor by tensor."""
    out = export(checkpoint, model, tmp_path / "boats", "wan", weights=weights)
    stored = load_file(out / "boats.safetensors")
    assert "blocks.0.self_attn.q.weight" in stored and "head.modulation" in stored
    converted = convert_wan_transformer_to_diffusers(dict(stored))
    prefix = {"average": "ema", "student": "student"}[weights]
    net = load_student(
        checkpoint, ExecutionPlan(), model=str(model), weights=prefix, dtype=torch.float32, device=CPU
    )  # fmt: skip
    expected = dict(net.named_parameters())
    assert converted.keys() == expected.keys()
    for name, value in expected.items():
        if weights == "student" and "compact" in str(checkpoint):  # `sample` uses the bf16 half of the master weights
            assert torch.equal(converted[name].bfloat16(), value.bfloat16()), name
            continue
        assert torch.equal(converted[name], value), name


def test_single_file_loader_of_diffusers(checkpoint: Path, model: Path, tmp_path: Path) -> None:
    out = export(checkpoint, model, tmp_path / "boats", "wan")
    net = WanTransformer3DModel.from_single_file(
        str(out / "boats.safetensors"), config=str(model), subfolder="transformer", torch_dtype=torch.float32
    )
    expected = load_student(
        checkpoint, ExecutionPlan(), model=str(model), weights="ema", dtype=torch.float32, device=CPU
    )  # fmt: skip
    for name, value in expected.named_parameters():
        assert torch.equal(net.get_parameter(name), value), name


def test_exact_master_of_the_compact_form(model: Path, tmp_path: Path) -> None:
    checkpoint = make_student(tmp_path / "step-000500", model, compact=True)
    out = export(checkpoint, model, tmp_path / "boats", "diffusers", weights="student")
    stored = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, value in shifted_weights(model, 1).items():
        assert torch.equal(stored[name], value), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_precisions_and_metadata(checkpoint: Path, model: Path, tmp_path: Path, dtype: str) -> None:
    out = export(checkpoint, model, tmp_path / "boats", "wan", dtype=dtype)
    with safe_open(out / "boats.safetensors", framework="pt") as file:
        facts = file.metadata()
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert dtypes == {getattr(torch, dtype)}
    assert facts["timesteps"] == "1000, 750, 500, 250" and facts["shift"] == "5"
    assert facts["sigmas"] == "1, 0.9375, 0.8333333333, 0.625" and facts["guidance_scale"] == "1"
    assert facts["license"] == "other" and facts["size"] == "9x64x64"


def test_adapter_file(model: Path, tmp_path: Path) -> None:
    checkpoint = make_student(tmp_path / "step-000500", model, adapters=LORA)
    out = export(checkpoint, model, tmp_path / "boats", "lora")
    stored, expected = load_file(out / "boats.safetensors"), adapter_weights(model, 2, LORA.rank)
    assert len(stored) == len(expected) == 2 * 2 * 10
    first = "diffusion_model.blocks.1.self_attn.o.lora_{}.weight"
    assert torch.equal(stored[first.format("A")], expected["blocks.1.attn1.to_out.0.lora_A.weight"])
    assert torch.equal(stored[first.format("B")], 1.5 * expected["blocks.1.attn1.to_out.0.lora_B.weight"])


def test_low_rank_error_falls_and_full_rank_is_exact(model: Path, tmp_path: Path) -> None:
    checkpoint, base = make_student(tmp_path / "step-000500", model), None
    base = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    student, errors = shifted_weights(model, 2), []
    name, key = "blocks.0.ffn.net.0.proj.weight", "diffusion_model.blocks.0.ffn.0.lora_{}.weight"
    for rank in (2, 8, 24):  # 24 is the width: full rank
        stored = load_file(export(checkpoint, model, tmp_path / f"r{rank}", "lora", rank=rank) / f"r{rank}.safetensors")
        rebuilt = base[name] + stored[key.format("B")] @ stored[key.format("A")]
        errors.append(float((rebuilt - student[name]).norm() / (student[name] - base[name]).norm()))
        dense = base["blocks.1.scale_shift_table"] + stored["diffusion_model.blocks.1.modulation.diff"]
        assert torch.allclose(dense, student["blocks.1.scale_shift_table"], atol=1e-6)
        bias = base["proj_out.bias"] + stored["diffusion_model.head.head.diff_b"]
        assert torch.allclose(bias, student["proj_out.bias"], atol=1e-6)
    assert errors[0] > errors[1] > 10 * errors[2]
    assert errors[2] < 1e-5
    card = (tmp_path / "r24" / "README.md").read_text()
    assert "kept energy of the matrices' differences | 100.00 %" in card


def test_card_and_workflow(checkpoint: Path, model: Path, tmp_path: Path) -> None:
    out = export(checkpoint, model, tmp_path / "boats", "wan")
    card = (out / "README.md").read_text()
    assert "/secret" not in card and str(model) not in card
    assert "1, 0.9375, 0.833333, 0.625" in card and "by their source" in card
    for file, has_image in (("workflow_image_to_video.json", True), ("workflow_text_to_video.json", False)):
        graph = json.loads((out / file).read_text())
        sampler = graph["10"]
        assert sampler["class_type"] == "KSampler"
        settings = {name: value for name, value in sampler["inputs"].items() if not isinstance(value, list)}
        assert settings == {
            "seed": 0, "steps": 4, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "simple", "denoise": 1.0
        }  # fmt: skip
        assert graph["6"]["inputs"]["shift"] == 5 and graph["1"]["inputs"]["unet_name"] == "boats.safetensors"
        assert ("start_image" in graph["7"]["inputs"]) == has_image
        links = [value for one in graph.values() for value in one["inputs"].values() if isinstance(value, list)]
        assert all(target in graph for target, _ in links)


def test_custom_timesteps_in_the_workflow(model: Path, tmp_path: Path) -> None:
    checkpoint = make_student(tmp_path / "step-000500", model, timesteps=(1000.0, 900.0, 400.0, 100.0))
    graph = json.loads((export(checkpoint, model, tmp_path / "x", "wan") / "workflow_text_to_video.json").read_text())
    assert graph["10"]["class_type"] == "SamplerCustom"
    assert graph["12"]["inputs"]["sigmas"] == "1, 0.9782609, 0.7692308, 0.3571429, 0"


@pytest.mark.parametrize(("form", "options"), [("wan", {}), ("diffusers", {}), ("lora", {"rank": 2})])
def test_progress_counts_every_tensor(
    form: str, options: dict[str, object], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = len(load_file(model / "transformer" / "diffusion_pytorch_model.safetensors"))
    export(make_student(tmp_path / "step-000500", model), model, tmp_path / "out", form, **options)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"export: {count}/{count}, ")


def test_mistakes(model: Path, tmp_path: Path) -> None:
    full = make_student(tmp_path / "full" / "step-000500", model)
    adapted = make_student(tmp_path / "adapted" / "step-000500", model, adapters=LORA)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="out=.*there: exists already"):
        export(full, model, tmp_path / "there", "wan")
    with pytest.raises(ValueError, match="format=lora: .* give --rank"):
        export(full, model, tmp_path / "x", "lora")
    with pytest.raises(ValueError, match="rank=8: .* adapters of rank 4 already"):
        export(adapted, model, tmp_path / "x", "lora", rank=8)
    with pytest.raises(ValueError, match="rank=8: is for --format lora"):
        export(full, model, tmp_path / "x", "wan", rank=8)
    with pytest.raises(ValueError, match="report=.*: holds no report.json"):
        export(full, model, tmp_path / "x", "wan", report=str(tmp_path))
    for text in ("{", "[]", '{"count": 4}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(ValueError, match=r"^report=.*: its report.json cannot be read \(.*\); run evaluate again"):
            export(full, model, tmp_path / "x", "wan", report=str(tmp_path))
    with (
        mock.patch("stage2_distill.export.export.write_low_rank", side_effect=AssertionError),
        pytest.raises(ValueError, match="^shards=.*there: does not exist or is unfinished"),
    ):
        export(full, model, tmp_path / "x", "lora", rank=2, shards=str(tmp_path / "there"))
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()


def test_checkpoints_of_two_ranks(model: Path, tmp_path: Path) -> None:
    """Each rank wrote slices of the tensors; the export joins them."""
    shards = make_shards(tmp_path / "data", model)
    forms = {"standard": {}, "compact": {"dtype": "bfloat16", "optimizer_form": "compact"}}
    configs = [
        make_config(shards, model, tmp_path / name, iterations=2, checkpoint_every=2, **options)
        for name, options in forms.items()
    ]
    for run in run_worker(configs, 2, tmp_path):
        assert len(list((run / "step-000002").glob("shard-*.safetensors"))) > 1
        stored = load_file(export(run, model, tmp_path / f"{run.name}-x", "diffusers") / "transformer" / WEIGHTS_FILE)
        net = load_student(
            run / "step-000002", ExecutionPlan(), model=str(model), weights="ema", dtype=torch.float32, device=CPU
        )  # fmt: skip
        for name, value in net.named_parameters():
            assert torch.equal(stored[name], value), name


def test_a_student_of_a_later_sampler_is_refused(model: Path, tmp_path: Path) -> None:
    folder = make_student(tmp_path / "step-000500", model)
    facts = json.loads((folder / STUDENT_FILE).read_text())
    (folder / STUDENT_FILE).write_text(json.dumps(facts | {"sampler": "heun"}))
    problem = "step-000500: needs the sampler heun, which this version does not have; use a newer one"
    with pytest.raises(ValueError, match=problem):
        export(folder, model, tmp_path / "x", "wan")
    with pytest.raises(ValueError, match=problem):
        load_student(folder, ExecutionPlan(), model=str(model), weights="ema", dtype=torch.float32, device=CPU)
