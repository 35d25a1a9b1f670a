"""A ready workflow for ComfyUI that loads an exported file: drag the JSON onto the canvas, or post it to /prompt.

It is in ComfyUI's API format, {node's number: class and inputs}; an input is a value or [node, output].
"""

from collections.abc import Sequence
from typing import Any

from stage2_distill.checkpointing.format import StudentFacts

VAE_FILE, TEXT_FILE = "wan2.2_vae.safetensors", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"  # of Comfy-Org's repackaging
BASE_FILE = "wan2.2_ti2v_5B_fp16.safetensors"
SAMPLER = "lcm"  # x0, then fresh noise at the next sigma
SIMPLE_STEPS = 1000  # entries of the table from which the scheduler `simple` takes every N-th


def is_simple(timesteps: Sequence[float]) -> bool:
    """Whether ComfyUI's scheduler `simple` visits exactly these timesteps (before the shift)."""
    count = len(timesteps)
    uniform = [SIMPLE_STEPS - SIMPLE_STEPS * step // count for step in range(count)]
    return SIMPLE_STEPS % count == 0 and list(timesteps) == uniform


def build_workflow(facts: StudentFacts, name: str, *, with_image: bool, is_lora: bool = False) -> dict[str, Any]:
    """The workflow of a file `name` in ComfyUI's models folder, from a first frame or from the prompt alone."""
    spec = facts.spec
    size = {"width": spec.width, "height": spec.height, "length": spec.num_frames, "batch_size": 1}
    latent = {"vae": ["3", 0], **size} | ({"start_image": ["8", 0]} if with_image else {})
    graph = {
        "1": node("UNETLoader", unet_name=BASE_FILE if is_lora else f"{name}.safetensors", weight_dtype="default"),
        "2": node("CLIPLoader", clip_name=TEXT_FILE, type="wan", device="default"),
        "3": node("VAELoader", vae_name=VAE_FILE),
        "4": node("CLIPTextEncode", text="Describe the video here.", clip=["2", 0]),
        "5": node("CLIPTextEncode", text="", clip=["2", 0]),  # has no effect at cfg 1
        "6": node("ModelSamplingSD3", model=["9" if is_lora else "1", 0], shift=facts.shift),
        "7": node("Wan22ImageToVideoLatent", **latent),
        **sampling_nodes(facts),
        "20": node("VAEDecode", samples=["10", 0], vae=["3", 0]),
        "21": node("CreateVideo", images=["20", 0], fps=float(spec.fps)),
        "22": node("SaveVideo", video=["21", 0], filename_prefix=f"video/{name}", format="auto", codec="auto"),
    }
    if facts.sizes or facts.lengths:  # a node's title is the only text that the format has
        graph["7"]["_meta"] = {"title": f"Size and length, trained on {facts.video_text}"}
    if with_image:
        graph["8"] = node("LoadImage", image="first_frame.png")
    if is_lora:
        graph["9"] = node(
            "LoraLoaderModelOnly", model=["1", 0], lora_name=f"{name}.safetensors", strength_model=1.0
        )  # fmt: skip
    return graph


def sampling_nodes(facts: StudentFacts) -> dict[str, Any]:
    """The sampler, node 10: the usual one if its scheduler `simple` hits the student's timesteps, else by sigmas."""
    shared: dict[str, Any] = {"model": ["6", 0], "positive": ["4", 0], "negative": ["5", 0], "latent_image": ["7", 0]}
    if is_simple(facts.ladder):
        settings = {"seed": 0, "steps": len(facts.ladder), "cfg": 1.0, "sampler_name": SAMPLER}
        return {"10": node("KSampler", **shared, **settings, scheduler="simple", denoise=1.0)}
    sigmas = ", ".join(f"{sigma:.7g}" for sigma in (*facts.sigmas, 0))
    settings = {"add_noise": True, "noise_seed": 0, "cfg": 1.0, "sampler": ["11", 0], "sigmas": ["12", 0]}
    return {
        "10": node("SamplerCustom", **shared, **settings),
        "11": node("KSamplerSelect", sampler_name=SAMPLER),
        "12": node("ManualSigmas", sigmas=sigmas),
    }


def node(class_type: str, **inputs: object) -> dict[str, Any]:
    """One node."""
    return {"class_type": class_type, "inputs": inputs}
