"""The format `wan`: one safetensors file under the original names, and ComfyUI workflows beside it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from stage2_distill.checkpointing.format import StudentFacts
from stage2_distill.export.diffusers_folder import write_json
from stage2_distill.export.workflow import build_workflow
from stage2_distill.weight_files.key_names import to_original
from stage2_distill.weight_files.safetensors_writer import TensorShape, write_tensors
from stage2_distill.weight_files.transformer_config import HEADS_KEY

WORKFLOWS = {"workflow_image_to_video.json": True, "workflow_text_to_video.json": False}


def write_wan_file(
    folder: Path,
    name: str,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, TensorShape],
    metadata: Mapping[str, str],
) -> None:
    """Write `name`.safetensors of weights under diffusers' names."""
    renamed_shapes = {to_original(key): shape for key, shape in shapes.items()}
    renamed = ((to_original(key), tensor) for key, tensor in tensors)
    write_tensors(folder / f"{name}.safetensors", renamed_shapes, renamed, metadata)


def write_workflows(folder: Path, name: str, facts: StudentFacts, *, is_lora: bool) -> None:
    """Write the workflows of a file."""
    for file, with_image in WORKFLOWS.items():
        write_json(folder / file, build_workflow(facts, name, with_image=with_image, is_lora=is_lora))


def sampling_metadata(facts: StudentFacts, base: str, licence: str, heads: int) -> dict[str, str]:
    """What a program must know to sample from a file, as text; `sampling.student_source` reads it back."""
    spec = facts.spec
    # only of a student of several, so that the files of all others stay as they are
    several = {"sizes": ", ".join(map(str, facts.sizes)), "lengths": ", ".join(map(str, facts.lengths))}
    return {
        "timesteps": ", ".join(f"{timestep:.10g}" for timestep in facts.ladder),  # before the shift
        "sigmas": ", ".join(f"{sigma:.10g}" for sigma in facts.sigmas),
        "shift": f"{facts.shift:g}",
        "sampler": facts.sampler,
        "guidance_scale": "1",
        "size": f"{spec.num_frames}x{spec.height}x{spec.width}",
        "fps": f"{spec.fps}",
        HEADS_KEY: f"{heads}",  # which the shapes do not say
        "base_model": base,
        "license": licence,
        **{name: value for name, value in several.items() if value},
    }
