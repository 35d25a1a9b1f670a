"""The model card of an export, README.md: what the student is, how to run it, and which programs were tried."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.files import read_json
from stage2_distill.checkpointing.format import BEST_FILE, BestCheckpoint, StudentFacts
from stage2_distill.export.config import DIFFUSERS, LORA, WAN, ExportConfig
from stage2_distill.export.lora_file import LowRankErrors
from stage2_distill.export.scheduler import OWN_MODULE, scheduler_entry
from stage2_distill.export.workflow import SAMPLER, is_simple

BASE_LICENCES = {"wan2.2-ti2v-5b": "apache-2.0"}  # by a part of a model's name
UNKNOWN_LICENCE = "other"
PRIVATE_OPTIONS = ("shards", "model", "out", "init_from", "preview_data", "device", "wandb")  # paths, or no recipe
# Which program read such a file: in the project's tests; once, in the program's own code at the commit, with a model of
# two layers in float32; or only compared with its published source.
EVIDENCE = {
    DIFFUSERS: (
        ("diffusers 0.42", "WanPipeline, WanImageToVideoPipeline", "run in the tests: latents equal `sample`"),
        ("vllm-omni @36c5bc6", "`dmd2_config` of model_index.json", "by its source, not run"),
        ("FastVideo, SGLang, TensorRT-LLM", "`WanDMDPipeline`, timesteps 1000, 757, 522 only", "by source, not run"),
    ),
    WAN: (
        ("diffusers 0.42", "single-file conversion with `config=`", "run in the tests: tensors equal"),
        ("Wan2.2 @42bf4cf", "`wan/modules/model.py`", "run once: loads strictly, velocity within 5.2e-6"),
        (
            "ComfyUI @a125cd8",
            "UNETLoader, the workflows' sampler",
            "run once: WAN22_T2V, no missing or unexpected keys, latents within 2.8e-6",
        ),
        ("LightX2V @f8aee98, GGUF converters", "original names", "by their source, not run"),
    ),
    LORA: (
        ("diffusers 0.42", "`load_lora_weights`", "run in the tests for trained adapters; dense differences: no"),
        (
            "ComfyUI @a125cd8",
            "LoraLoaderModelOnly",
            "run once: every pair finds its weight, latents within 7.5e-6; it leaves out differences of modulations",
        ),
        ("LightX2V @f8aee98, WanVideoWrapper", "`diffusion_model.` names", "by their source, not run"),
    ),
}


@dataclass(frozen=True)
class CardFacts:
    """What a model card says beyond the checkpoint's own facts."""

    config: ExportConfig
    name: str  # of the export's files
    checkpoint: Path
    facts: StudentFacts
    licence: str
    errors: LowRankErrors | None = None
    latent_error: float | None = None  # relative, of sampled latents

    @property
    def base(self) -> str:
        """The base's name: of the hub, or the last part of a folder's path."""
        return base_name(self.facts.base_model)


def base_name(model: str) -> str:
    """A hub name as it is, of a local folder its own name: a card must not publish paths."""
    return Path(model).resolve().name if Path(model).exists() or model.count("/") != 1 else model


def find_licence(model: str, folder: Path) -> str:
    """Licence of a base: from its README.md, else from its name, else `other`."""
    card = folder / "README.md"
    if card.is_file():
        _, marker, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
        header = yaml.safe_load(rest.partition("\n---")[0]) if marker else None
        if isinstance(header, dict) and "license" in header:
            return str(header["license"])
    known = [licence for part, licence in BASE_LICENCES.items() if part in model.lower()]
    return known[0] if known else UNKNOWN_LICENCE


def data_fingerprints(facts: StudentFacts) -> list[str]:
    """One text per data set of the distillation: its folder's name, weight and content digest."""
    shards: Any = facts.config.get("shards") or ()
    names = []
    for one in shards:
        folder, _, weight = str(one).partition(":")
        names.append(f"{Path(folder).name}{f' (weight {weight})' if weight else ''}")
    digests = [*facts.data_sets, *["digest not stored"] * len(names)]  # checkpoints of 0.1 lack them
    return [f"{name}: {digest}" for name, digest in zip(names, digests, strict=False)]


def render_card(card: CardFacts) -> str:
    """The whole text."""
    header = {
        "license": card.licence,
        "base_model": card.base,
        "pipeline_tag": "image-to-video",
        "library_name": "diffusers" if card.config.format == DIFFUSERS else "wan",
        "tags": ["few-step", "distribution-matching-distillation", "text-to-video", "image-to-video"],
    }
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {card.name}",
        describe_student(card),
        *(describe_errors(card, card.errors) if card.errors else ()),
        "## How to run it\n\n" + "\n\n".join([*USAGE[card.config.format](card), *size_usage(card)]),
        "## Which programs were tried\n\n| program | reads it by | evidence |\n|---|---|---|\n"
        + "\n".join(f"| {' | '.join(row)} |" for row in EVIDENCE[card.config.format]),
        *figures(card),
        "## Recipe\n\n```yaml\n" + recipe(card.facts) + "```",
    ]
    return "\n\n".join(sections) + "\n"


def describe_student(card: CardFacts) -> str:
    """Origin and sampling settings."""
    facts, spec = card.facts, card.facts.spec
    videos = f"{spec.num_frames} frames of {spec.height} x {spec.width}, {spec.fps} per second"
    if facts.sizes or facts.lengths:
        videos = f"{facts.video_text}, {spec.fps} per second"
    rows = [
        ("base", f"{card.base} (licence: {licence_text(card.licence)})"),
        ("distilled by", "distribution matching distillation (DMD2, arXiv 2405.14867)"),
        ("weights", f"{card.config.weights} after {facts.iteration} iterations, {card.config.dtype}"),
        ("timesteps", ", ".join(f"{one:g}" for one in facts.ladder) + f", before the shift of {facts.shift:g}"),
        ("sigmas", ", ".join(f"{one:.6g}" for one in facts.sigmas) + "; x0, then fresh noise at the next sigma"),
        ("guidance scale", "1 (none)"),
        ("videos", videos),
        ("data sets", "; ".join(data_fingerprints(facts)) or "unknown"),
        ("base's transformer", f"fingerprint {facts.transformer}"),
    ]
    return "| what | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def licence_text(licence: str) -> str:
    """The licence, or a request to look it up."""
    return "not stated in the model folder; look it up before you publish" if licence == UNKNOWN_LICENCE else licence


def describe_errors(card: CardFacts, errors: LowRankErrors) -> tuple[str]:
    """What a low-rank file loses."""
    latents = (
        "not measured (give --shards)"
        if card.latent_error is None
        else f"{card.latent_error:.3g}, relative to their norm"
    )
    return (
        f"## What rank {errors.rank} loses\n\nThe file holds the matrices' differences to the base at that rank "
        "and all other differences in full.\n\n| measure | |\n|---|---|\n"
        f"| kept energy of the matrices' differences | {100 * errors.kept_energy:.2f} % |\n"
        f"| error of the matrices, relative to the differences | {errors.matrix_error:.3g} |\n"
        f"| error of the matrices, relative to all weights | {errors.weight_error:.3g} |\n"
        f"| error of sampled latents on held-out conditions | {latents} |",
    )


def diffusers_usage(card: CardFacts) -> list[str]:
    """Five lines per pipeline, and what differs from `sample`."""
    facts, spec = card.facts, card.facts.spec
    module, _ = scheduler_entry(facts.sigmas)
    trust = ", trust_remote_code=True" if module == OWN_MODULE else ""
    size = f"height={spec.height}, width={spec.width}, num_frames={spec.num_frames}"
    call = f"{size}, num_inference_steps={len(facts.ladder)}"
    fit = f"ImageOps.fit(Image.open('first.png').convert('RGB'), ({spec.width}, {spec.height}))"
    lines = [
        "From a first frame, with diffusers (before 0.40 write torch_dtype for dtype):",
        "```python\nimport torch; from diffusers import WanImageToVideoPipeline; from PIL import Image, ImageOps\n"
        f"pipe = WanImageToVideoPipeline.from_pretrained({card.name!r}, dtype=torch.bfloat16{trust}).to('cuda')\n"
        f"image = {fit}  # crops\n"
        "torch.manual_seed(0)  # the noise between the steps comes from torch's global generator\n"
        f"video = pipe(image, 'Describe the video.', {call}, guidance_scale=1.0).frames[0]\n```",
        "From the prompt alone:",
        "```python\nimport torch; from diffusers import WanPipeline\n"
        f"pipe = WanPipeline.from_pretrained({card.name!r}, dtype=torch.bfloat16{trust}).to('cuda')\n"
        "torch.manual_seed(0)\n"
        f"video = pipe('Describe the video.', {call}, guidance_scale=1.0).frames[0]\n```",
        "Both pipelines differ from this project's `sample`: they give the scheduler no generator, so the noise "
        "between the steps comes from torch's global one; they round the latents to the model's precision after each "
        "step; and WanImageToVideoPipeline stretches a picture of another shape, where `sample` crops it, as above.",
    ]
    if trust:
        lines.append(
            "No setting of a stock scheduler visits these timesteps, so `scheduler/few_step_scheduler.py` comes with "
            "the folder; diffusers loads it with `trust_remote_code=True`. Read its twenty lines first."
        )
    if [round(1000 * sigma) for sigma in facts.sigmas] == [1000, 757, 522]:
        lines.append(
            "Servers with a pipeline for the timesteps 1000, 757, 522 (FastVideo, SGLang, TensorRT-LLM) choose it by "
            '`"_class_name": "WanDMDPipeline"` in model_index.json; change that line in a copy for them.'
        )
    return lines


def comfy_usage(card: CardFacts) -> list[str]:
    """Where ComfyUI's files belong, and the settings of the sampler."""
    facts = card.facts
    folder = "loras" if card.config.format == LORA else "diffusion_models"
    sampler = (
        f"KSampler with steps {len(facts.ladder)}, cfg 1.0, sampler `{SAMPLER}`, scheduler `simple`"
        if is_simple(facts.ladder)
        else f"SamplerCustom with sampler `{SAMPLER}`, cfg 1.0 and ManualSigmas "
        + ", ".join(f"{sigma:.6g}" for sigma in (*facts.sigmas, 0))
    )
    return [
        f"In ComfyUI: copy `{card.name}.safetensors` to `models/{folder}`, and drag `workflow_image_to_video.json` or "
        f"`workflow_text_to_video.json` onto the canvas. They use ModelSamplingSD3 with shift {facts.shift:g} and "
        f"{sampler}. Ordinary samplers (euler, uni_pc) are wrong for this model: it needs fresh noise after each step. "
        "The VAE and the text encoder are those of Comfy-Org/Wan_2.2_ComfyUI_Repackaged.",
    ]


def wan_usage(card: CardFacts) -> list[str]:
    """ComfyUI, and this project's own reader."""
    return [*comfy_usage(card), *own_usage(card)]


def own_usage(card: CardFacts) -> list[str]:
    """The file in this project."""
    option = "--base-lora" if card.config.format == LORA else "--init-from"
    return [
        "In ti2v-distill, to continue from it:",
        f"```\npython cli.py distill {option} {card.name}.safetensors --model {card.base} --shards DATA --out RUN\n```",
    ]


def lora_usage(card: CardFacts) -> list[str]:
    """ComfyUI and diffusers."""
    steps = len(card.facts.ladder)
    lines = comfy_usage(card)
    if card.errors is None:
        lines += [
            "With diffusers, on a pipeline of the base whose scheduler is set as below:",
            "```python\nfrom diffusers import FlowMatchLCMScheduler\n"
            f"pipe.load_lora_weights('{card.name}.safetensors')\n"
            "pipe.scheduler = FlowMatchLCMScheduler.from_pretrained('scheduler')  # the folder beside the file\n"
            f"# then {steps} steps at guidance_scale=1.0, after torch.manual_seed(0)\n```",
        ]
    else:
        lines.append(
            "ComfyUI leaves out the differences of modulations, and diffusers refuses them: for an exact student "
            "there, use the formats `wan` and `diffusers`."
        )
    return lines + own_usage(card)


def size_usage(card: CardFacts) -> list[str]:
    """How to choose among several sizes and lengths."""
    facts, spec = card.facts, card.facts.spec
    if not (facts.sizes or facts.lengths):
        return []
    own = f"{spec.num_frames} frames of {spec.frame_size}"
    if card.config.format == DIFFUSERS:
        usage = f"The calls above make {own}; crop the picture to another size as to theirs."
    else:
        usage = f"The workflows make {own}; their node Wan22ImageToVideoLatent sets another."
    choice = (
        "Take the size whose width / height is nearest to the picture's, so that least is cropped; "
        "`python cli.py sample` does so by itself. "
    )
    known = f"The student was trained on {facts.video_text}, and other shapes give worse videos."
    return [f"{known} {choice if facts.sizes else ''}{usage}"]


USAGE = {DIFFUSERS: diffusers_usage, WAN: wan_usage, LORA: lora_usage}


def figures(card: CardFacts) -> list[str]:
    """Figures of `evaluate`: of the report that was named, and of the run's choice of its best checkpoint."""
    lines = []
    if card.config.report is not None:
        lines += report_lines(Path(card.config.report))
    best = card.checkpoint.parent / BEST_FILE
    if best.is_file() and read_json(best, BestCheckpoint).checkpoint == card.checkpoint.name:
        distance = read_json(best, BestCheckpoint).distance
        lines += [f"Chosen by `evaluate --select` among the run's checkpoints: distance {distance:.5g}."]
    return ["## Figures\n\n" + "\n".join(lines).strip()] if lines else []


def report_lines(folder: Path) -> list[str]:
    """The candidates of a report of `evaluate`, a table for each size; ValueError if there is no report."""
    path = folder / "report.json"
    if not path.is_file():
        raise ValueError(f"report={folder}: holds no report.json; name the folder of evaluate")
    try:
        return candidate_tables(json.loads(path.read_bytes()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # damaged, or of another program
        raise ValueError(f"report={folder}: its report.json cannot be read ({error!r}); run evaluate again") from error


def candidate_tables(report: Mapping[str, Any]) -> list[str]:
    """The lines of `report_lines` for the content of report.json."""
    lines: list[str] = []
    for size, one in report.get("sizes", {"": report}).items():
        of_size = f" of {size}" if size else ""
        lines += [f"{one['count']} conditions{of_size}, seeds {', '.join(map(str, one['seeds']))}.", ""]
        lines += ["| candidate | distance to the teacher | times the floor |", "|---|---|---|"]
        for candidate in one["contestants"].values():
            distance, floors = candidate["frechet"]["mean"], candidate["times_floor"]
            lines.append(f"| {candidate['label']} | {distance:.5g} | {floors:.3g} |")
        lines.append("")
    return lines


def recipe(facts: StudentFacts) -> str:
    """The options of the distillation as YAML, without paths."""
    options = {name: value for name, value in facts.config.items() if name not in PRIVATE_OPTIONS}
    return str(yaml.safe_dump(options, sort_keys=False, allow_unicode=True))
