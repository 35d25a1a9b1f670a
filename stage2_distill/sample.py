"""A checkpoint and conditions in, latents out."""

from pathlib import Path

import torch
from torch import nn

from common.device import pick_device
from common.progress import Progress
from common.seed import generator, normal
from shards import latents
from shards.fingerprint import fingerprint, locate
from shards.manifest import check_manifest
from shards.read import DataSet, open_data_set
from shards.record import collate
from stage2_distill.checkpoint import StudentFacts, chosen, load, read_facts
from stage2_distill.config_sample import EvaluateConfig, SampleConfig
from stage2_distill.lora import load_merged, lora_of
from stage2_distill.rollout import rollout
from stage2_distill.wan import cast_parameters, denoiser
from stage2_distill.wan import load as load_network

GROUP = "sample"


def sample(config: SampleConfig, conditions: Path, out: Path) -> Path:
    """Sample a video for each record of the data set `conditions` into the zarr store `out`."""
    checkpoint = chosen(Path(config.checkpoint))
    facts = read_facts(checkpoint)
    data = open_data_set(str(conditions))
    encoders: dict[str, object] = {"vae": facts.vae, "text_encoder": facts.text_encoder}
    check_manifest(conditions, data.manifest, spec=facts.spec, encoder=encoders)
    net = load_student(config, checkpoint, facts).to(pick_device(config.device))
    write_samples(net, config, facts, data, out)
    return out


def load_student(config: SampleConfig | EvaluateConfig, checkpoint: Path, facts: StudentFacts) -> nn.Module:
    """The student's network; ValueError where MODEL is another base than it was distilled from."""
    model = locate(config.model, ("transformer",))
    if fingerprint(model / "transformer") != facts.transformer:
        raise ValueError(
            f"model={config.model}: not the model that {checkpoint} was distilled from, {facts.base_model}"
        )
    net = load_network(model, torch.float32).requires_grad_(False)
    lora = lora_of(facts.config)
    if lora is None:
        load(checkpoint, {f"{config.weights}.{name}": weight for name, weight in net.named_parameters()})
    else:
        load_merged(net, checkpoint, config.weights, lora)
    return cast_parameters(net, getattr(torch, config.dtype))


def write_samples(net: nn.Module, config: SampleConfig, facts: StudentFacts, data: DataSet, out: Path) -> None:
    """Run the student's ladder on every record and store the latents."""
    device = next(net.parameters()).device
    count = data.manifest.records
    records = [data.record(index) for index in range(count)]
    seeds = [config.seed if r.source.seed is None else r.source.seed for r in records]
    keys, prompts = tuple(r.key for r in records), tuple(r.source.prompt for r in records)
    latents.create(out, latents.LatentGroup(GROUP, facts.spec, keys, prompts, tuple(seeds)))
    sigmas = config.sigmas(facts.shift) or facts.sigmas
    with Progress(count, done=0, label="sample") as progress:
        for rows in batches([r.first_frame is not None for r in records], config.batch_size):
            condition = collate([records[row] for row in rows], text_rows=config.text_rows).condition.to(device)
            draws = [generator(seeds[row], 0, 0, "sample", device) for row in rows]
            with torch.no_grad():
                x0 = rollout(
                    denoiser(net, getattr(torch, config.dtype)),
                    normal(facts.spec.latent_shape, draws),
                    condition,
                    ladder=sigmas,
                    generators=draws,
                )
            latents.write(out, GROUP, rows, x0)
            progress.advance(count=len(rows))
    latents.finish(out, GROUP)


def batches(kinds: list[bool], size: int) -> list[list[int]]:
    """Rows in batches of at most `size`, those with and those without a first frame apart."""
    groups = ([row for row, kind in enumerate(kinds) if kind is wanted] for wanted in (True, False))
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]
