"""Names of the transformer's tensors in other programs: the one table from diffusers to the original Wan, and back.

Both name the same tensors in the same layout, so a translation never changes a value. The original names are those of
Wan-Video/Wan2.2 `wan/modules/model.py`, which ComfyUI, LightX2V and LoRA files use too.
"""

import re
from collections.abc import Iterable

# diffusers -> original, outside of the blocks and inside of a block; the rest of a name (.weight, .bias) stays
OUTER_NAMES = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "scale_shift_table": "head.modulation",
    "proj_out": "head.head",
}
ATTENTION_NAMES = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k"}
BLOCK_NAMES = {
    **{f"attn1.{one}": f"self_attn.{other}" for one, other in ATTENTION_NAMES.items()},
    **{f"attn2.{one}": f"cross_attn.{other}" for one, other in ATTENTION_NAMES.items()},
    "norm2": "norm3",  # the only norm of a block with weights; the original's norm1 and norm2 have none
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}
# the matrices that adapters train, by their names within a block
MATRIX_NAMES = tuple(name for name in BLOCK_NAMES if "norm" not in name and name != "scale_shift_table")
BLOCK_PATTERN = re.compile(r"blocks\.(\d+)\.(.+)")
LORA_PREFIX = "diffusion_model."  # before the original names in the LoRA files of most programs
PARAMETER_SUFFIXES = (".weight", ".bias")


def split_parameter(name: str) -> tuple[str, str]:
    """A tensor's name as (module, .weight or .bias); a parameter of its own, such as a modulation, has no suffix."""
    for suffix in PARAMETER_SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""


def _translate(name: str, outer: dict[str, str], block: dict[str, str]) -> str | None:
    module, suffix = split_parameter(name)
    match = BLOCK_PATTERN.fullmatch(module)
    if match is None:
        return f"{outer[module]}{suffix}" if module in outer else None
    number, inner = match.groups()
    return f"blocks.{number}.{block[inner]}{suffix}" if inner in block else None


def to_original(name: str) -> str:
    """The original Wan name of a tensor or module of diffusers; KeyError for a name that is in no Wan2.2-TI2V."""
    translated = _translate(name, OUTER_NAMES, BLOCK_NAMES)
    if translated is None:
        raise KeyError(name)
    return translated


def from_original(name: str) -> str | None:
    """diffusers' name of a tensor or module of the original Wan; None for a name that is in no Wan2.2-TI2V."""
    return _translate(name, _OUTER_BACK, _BLOCK_BACK)


def is_matrix(name: str) -> bool:
    """Whether a tensor of diffusers' names is one of the matrices that adapters train."""
    module, suffix = split_parameter(name)
    match = BLOCK_PATTERN.fullmatch(module)
    return match is not None and suffix == ".weight" and match.group(2) in MATRIX_NAMES


def flat_module_names(modules: Iterable[str]) -> dict[str, str]:
    """{name with underscores for dots, as kohya and musubi write it: the module's name}; both of original names."""
    return {module.replace(".", "_"): module for module in modules}


_OUTER_BACK = {original: name for name, original in OUTER_NAMES.items()}
_BLOCK_BACK = {original: name for name, original in BLOCK_NAMES.items()}
