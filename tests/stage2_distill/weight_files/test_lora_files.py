"""LoRA files of four dialects add the same numbers, and what does not fit is refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stage2_distill.weight_files.key_names import split_parameter, to_original
from stage2_distill.weight_files.lora_files import LoraFile, parse_loras
from stage2_distill.weight_files.stored_weights import WEIGHTS_FILE, read_weight_table
from tests.stage2_distill.export.students import adapter_weights

RANK, ALPHA = 4, 6.0
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def factors(model: Path) -> Weights:
    """Random factors under diffusers' names."""
    return adapter_weights(model, 5, RANK)


def modules(factors: Weights) -> list[str]:
    return [name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")]


def pairs(factors: Weights, key: Callable[[str], str], down: str, up: str, alpha: float | None = None) -> Weights:
    tensors = {}
    for module in modules(factors):
        tensors[key(module) + down] = factors[f"{module}.lora_A.weight"]
        tensors[key(module) + up] = factors[f"{module}.lora_B.weight"]
        if alpha is not None:
            tensors[key(module) + ".alpha"] = torch.tensor(alpha)
    return tensors


def peft(factors: Weights) -> tuple[Weights, dict[str, str]]:
    settings = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.alpha_pattern": {}}
    tensors = pairs(factors, lambda name: f"transformer.{name}", ".lora_A.weight", ".lora_B.weight")
    return tensors, {"lora_adapter_metadata": json.dumps(settings)}


def comfy(factors: Weights) -> tuple[Weights, dict[str, str]]:
    def key(name: str) -> str:
        return f"diffusion_model.{to_original(name)}"

    return pairs(factors, key, ".lora_down.weight", ".lora_up.weight", ALPHA), {}


def kohya(factors: Weights) -> tuple[Weights, dict[str, str]]:
    def key(name: str) -> str:
        return "lora_unet_" + to_original(name).replace(".", "_")

    return pairs(factors, key, ".lora_down.weight", ".lora_up.weight", ALPHA), {}


def lightx2v(factors: Weights) -> tuple[Weights, dict[str, str]]:
    folded = {name: tensor * (ALPHA / RANK if "lora_B" in name else 1) for name, tensor in factors.items()}
    key = lambda name: f"diffusion_model.{to_original(name)}"  # noqa: E731
    return pairs(folded, key, ".lora_down.weight", ".lora_up.weight"), {}


def own(factors: Weights) -> tuple[Weights, dict[str, str]]:
    tensors, _ = lightx2v(factors)
    renamed = {k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): v for k, v in tensors.items()}
    return renamed, {}


DIALECTS = {"peft": peft, "comfy": comfy, "kohya": kohya, "lightx2v": lightx2v, "own": own}


def check_sum(model: Path, loras: list[LoraFile], factors: Weights, scale: float) -> None:
    table = read_weight_table(model / "transformer", loras)
    base = load_file(model / "transformer" / WEIGHTS_FILE)
    adapted = set(modules(factors))
    assert len(adapted) == 20
    for name, tensor in base.items():
        module, suffix = split_parameter(name)
        expected = tensor
        if module in adapted and suffix == ".weight":
            product = factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
            assert float(product.abs().max()) > 0.1
            expected = tensor + scale * product
        assert torch.allclose(table[name][...], expected, atol=1e-6, rtol=1e-5), name
        assert torch.allclose(table[name][1:2], expected[1:2], atol=1e-6, rtol=1e-5), name


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_add_the_same(dialect: str, model: Path, factors: Weights, tmp_path: Path) -> None:
    tensors, metadata = DIALECTS[dialect](factors)
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    check_sum(model, [LoraFile(tmp_path / "x.safetensors")], factors, ALPHA / RANK)
    check_sum(model, [LoraFile(tmp_path / "x.safetensors", -0.5)], factors, -0.5 * ALPHA / RANK)


def test_several_files_with_weights(model: Path, factors: Weights, tmp_path: Path) -> None:
    for name, dialect in DIALECTS.items():
        tensors, metadata = dialect(factors)
        save_file(tensors, tmp_path / f"{name}:1.safetensors", metadata=metadata)
    texts = [f"{tmp_path / 'peft:1.safetensors'}:0.5", f"{tmp_path / 'comfy:1.safetensors'}:0.25"]
    texts += [str(tmp_path / "kohya:1.safetensors")]
    check_sum(model, list(parse_loras(texts)), factors, 1.75 * ALPHA / RANK)


def test_folder_of_peft(model: Path, factors: Weights, tmp_path: Path) -> None:
    tensors = {f"base_model.model.{name}": tensor for name, tensor in factors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "use_rslora": True}))
    check_sum(model, list(parse_loras([str(tmp_path)])), factors, ALPHA / RANK**0.5)


@pytest.mark.parametrize("key", ["diffusion_model.blocks.1.modulation.diff", "diffusion_model.blocks.1.diff_m"])
def test_dense_differences(model: Path, tmp_path: Path, key: str) -> None:
    base = load_file(model / "transformer" / WEIGHTS_FILE)
    ones = {name: torch.ones_like(base[name]) for name in ("blocks.1.scale_shift_table", "proj_out.bias")}
    ones["patch_embedding.weight"] = torch.ones_like(base["patch_embedding.weight"])
    stored = {key: ones["blocks.1.scale_shift_table"], "diffusion_model.head.head.diff_b": ones["proj_out.bias"]}
    stored["diffusion_model.patch_embedding.diff"] = ones["patch_embedding.weight"]
    save_file(stored, tmp_path / "x.safetensors")
    table = read_weight_table(model / "transformer", [LoraFile(tmp_path / "x.safetensors", 2.0)])
    for name, tensor in base.items():
        assert torch.equal(table[name][...], tensor + 2 * ones.get(name, 0 * tensor)), name


A = "diffusion_model.blocks.0.ffn.0.lora_down.weight"
B = "diffusion_model.blocks.0.ffn.0.lora_up.weight"
PAIR = {A: torch.ones(2, 24), B: torch.ones(48, 2)}
WRONG = {
    "other model": ({A.replace("0.ffn", "29.ffn"): PAIR[A], B: PAIR[B]}, "1 of 2 tensors belong to no weight"),
    "text encoder": ({"text_encoder.x.lora_A.weight": PAIR[A]}, "1 of 1 tensors belong to no weight"),
    "image attention": (PAIR | {A.replace("ffn.0", "cross_attn.k_img"): PAIR[A]}, "1 of 3 .*cross_attn.k_img"),
    "DoRA": (PAIR | {"diffusion_model.blocks.0.ffn.0.dora_scale": torch.ones(48)}, "such as .*dora_scale"),
    "LoKr": ({"lora_unet_blocks_0_ffn_0.lokr_w1": torch.ones(4, 4)}, "such as .*lokr_w1"),
    "whole weights": (PAIR | {"diffusion_model.head.set_weight": torch.ones(2)}, "such as .*set_weight"),
    "half a pair": ({A: PAIR[A]}, "has no other factor"),
    "other width": ({A: torch.ones(2, 5120), B: torch.ones(13824, 2)}, r"is for a weight of \[13824, 5120\]"),
    "other ranks": ({A: PAIR[A], B: torch.ones(48, 3)}, "its factors have ranks 2 and 3"),
    "kohya without alpha": (
        {
            "lora_unet_blocks_0_ffn_0.lora_down.weight": PAIR[A],
            "lora_unet_blocks_0_ffn_0.lora_up.weight": PAIR[B],
        },
        "has no alpha",
    ),
    "a model": ({"head.modulation": torch.ones(1, 2, 24)}, "belong to no weight"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files_are_named(kind: str, model: Path, tmp_path: Path) -> None:
    tensors, words = WRONG[kind]
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=words) as caught:
        read_weight_table(model / "transformer", [LoraFile(tmp_path / "x.safetensors")])
    assert "\n" not in str(caught.value) and f"base_lora={tmp_path}" in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base_lora=.*: no such file"):
        parse_loras([f"{tmp_path / 'none.safetensors'}:0.5"])
