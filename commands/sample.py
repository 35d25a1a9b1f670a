"""The `sample` command: conditions and frames of stage one, the denoiser of stage two."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from common.device import pick_device
from common.files import LOCK_FILE, UNFINISHED_FOLDER, FolderLock, refuse_foreign_files, staged_output
from common.model_folder import locate_model
from common.options import write_config
from common.video import VideoSpec
from stage1_encode.decoders.load_decoder import check_decoder
from stage1_encode.decoders.split_decoder import decode_own_parts, share_decoder
from stage1_encode.generation.condition_encoder import ConditionEncoder, load_autoencoder, load_condition_encoder
from stage1_encode.generation.decode import VIDEO_FOLDER_FILES
from stage1_encode.generation.generate import (
    GenerationRequest,
    LatentSampler,
    choose_vram,
    generate_videos,
    report_full_memory,
)
from stage1_encode.generation.picture_sizes import group_rows_by_size
from stage1_encode.media.first_frame import read_first_frame
from stage1_encode.media.rows import locate_file, read_csv_rows
from stage1_encode.media.video_frame import UnreadableError
from stage1_encode.models.text_encoder import clean_prompt
from stage1_encode.models.vae import CHUNK_FRAMES
from stage2_distill.distributed.process_group import join_ranks, on_any_rank, own_folder, wait_for_ranks
from stage2_distill.offload.streamed_blocks import StreamedModule
from stage2_distill.sampling.config import SampleConfig
from stage2_distill.sampling.multi_gpu import LeaderSampler, follow_requests
from stage2_distill.sampling.student_sampler import StudentSampler, open_student, predict_seconds

SAMPLE_CONFIG_FILE = "sample.yaml"


def sample_videos(config: SampleConfig) -> list[Path]:
    """Encode the conditions and decode the frames (stage one), denoise in between (stage two); returns the files.

    The latents are also stored, in X.zarr beside the videos. Under torchrun the processes share the rows of a CSV, or
    denoise and decode the one video together.
    """
    check_inputs(config)
    check_output(config)
    is_single = config.prompt is not None
    vram = choose_vram(config.vram, pick_device(config.device))
    rank, world = join_ranks(config.device)
    shared_video = is_single and world > 1
    if shared_video and on_any_rank(vram == "12gb"):  # on a smaller card; all ranks decode the same frames at once
        vram = "12gb"
    student = open_student(config, streams=vram == "12gb")
    if shared_video and rank:
        follow_leader(config, student, rank, world, vram)
        return []
    encoder = open_encoder(config, student.device, vram)
    if shared_video:
        encoder = replace(encoder, vae=share_decoder(encoder.vae, rank, world))
        rank, world = 0, 1  # the leader alone writes the file
    with LeaderSampler(student) if shared_video else nullcontext(student) as sampler:
        return write_videos(config, student.spec, sampler, encoder, vram=vram, ranks=(rank, world), student=student)


def follow_leader(config: SampleConfig, student: StudentSampler, rank: int, world: int, vram: str) -> None:
    """Denoise the first rank's videos with it and decode this rank's part of them, until it ends.

    Neither the text encoder nor the encoder half of the VAE is kept.
    """
    device, folder = student.device, locate_model(config.model, ("vae",))
    autoencoder = load_autoencoder(
        folder, precision=config.vae_dtype, device=device, chunk_frames=decoded_frames(vram), decoder=config.decoder
    )
    autoencoder = share_decoder(autoencoder, rank, world)
    autoencoder.model.encoder = None
    with report_full_memory(student.spec, 1, vram):
        for x0 in follow_requests(student):
            if vram != "full":
                student.move_to(torch.device("cpu"))
            decode_own_parts(autoencoder, x0)
            if vram != "full":
                autoencoder.decoder.free_memory()
                student.move_to(device)


def decoded_frames(vram: str) -> int:
    """Return the latent frames that are decoded at once."""
    return 1 if vram == "12gb" else CHUNK_FRAMES


def open_encoder(config: SampleConfig, device: torch.device, vram: str) -> ConditionEncoder:
    """Load the VAE and the text encoder, which waits in host memory if not all models stay on the GPU."""
    encoder = load_condition_encoder(
        config.model, precision=config.vae_dtype, device=device, keep_text_on_device=vram == "full",
        condition_dtype=config.dtype, chunk_frames=decoded_frames(vram),
        decoder=config.decoder,
    )  # fmt: skip
    if vram != "12gb":
        return encoder
    text = encoder.text.model
    return replace(encoder, streamed_text=StreamedModule(text, text.encoder.block, device))


def write_videos(
    config: SampleConfig,
    spec: VideoSpec,
    sampler: LatentSampler,
    encoder: ConditionEncoder,
    *,
    vram: str,
    ranks: tuple[int, int] = (0, 1),
    student: StudentSampler | None = None,
) -> list[Path]:
    """Make the videos of this rank with models that are loaded already; returns the files.

    ranks: this rank and their number. student: says how long a video takes, and has the sizes of which each picture
    takes the nearest; None: all videos have the size of `spec`.
    """
    is_single = config.prompt is not None
    with TemporaryDirectory() as temporary, prepare_output(config, ranks[0]) as folder:
        table = Path(write_prompt_csv(Path(temporary) / "prompt.csv", config) if is_single else str(config.data))
        target = folder / Path(config.out).name if is_single else folder
        store = target.with_suffix(".zarr") if is_single else folder / latent_store_name(*ranks)
        request = GenerationRequest(
            table, target, store, spec, config.seed, config.segments, config.batch_size, *ranks, config.base_folder,
            Path(config.out), student.denoising_seconds if student else None,
            gpus_per_video=student.ranks if student else 1, decoder=config.decoder,
        )  # fmt: skip
        requests = [request] if student is None or not student.sizes else list(split_by_size(request, student))
        files = [file for one in requests for file in generate_videos(one, encoder, sampler, vram=vram)]
    return [(Path(config.out).parent if is_single else Path(config.out)) / path.name for path in files]


def split_by_size(request: GenerationRequest, student: StudentSampler) -> Iterator[GenerationRequest]:
    """Yield the parts of a request that have one size each; in a folder each has its own store and contact sheet."""
    rows_of = group_rows_by_size(request.csv_path, student.sizes, request.base_folder)
    for size, row_numbers in rows_of.items():
        spec = student.check_size(size)
        seconds = None if student.denoising_seconds is None else predict_seconds(student, spec)
        part = replace(request, spec=spec, row_numbers=row_numbers, denoising_seconds=seconds)
        if request.out.suffix != ".mp4":
            store = request.store.with_name(f"{request.store.stem}-{size}.zarr")
            part = replace(part, store=store, sheet_suffix=f"-{size}")
        yield part


def check_inputs(config: SampleConfig) -> None:
    """Raise ValueError for a wrong prompt, picture, CSV or decoder, before gigabytes of weights are read."""
    check_prompt(config.prompt)
    if config.image is not None:
        check_image(config.image)
    table = None if config.data is None else Path(config.data)
    if table is not None and (table.is_file() or not table.exists()):  # a pipe can be read only once
        next(read_csv_rows(table, text_only=True))
    check_decoder(config.decoder, config.model)


def check_prompt(prompt: str | None) -> None:
    """Raise ValueError if nothing is left of a prompt when it is cleaned, as a text of HTML spaces."""
    if prompt is not None and not clean_prompt(prompt):
        raise ValueError(f"prompt={prompt}: nothing is left after HTML is unescaped; describe the video")


def check_image(image: str) -> None:
    """Raise ValueError if a first frame cannot be read."""
    try:
        read_first_frame(locate_file(Path("prompt.csv"), image), height=VideoSpec.height, width=VideoSpec.width)
    except UnreadableError as error:
        raise ValueError(f"image={image}: {error}; name a picture or a video") from error


def latent_store_name(rank: int, world: int) -> str:
    """File name of the latents of one rank of `sample --data`."""
    return f"latents-{rank}.zarr" if world > 1 else "latents.zarr"


def check_output(config: SampleConfig) -> None:
    """Raise ValueError if an output of `sample` would replace what is not one: a folder, or files of others in it."""
    out = Path(config.out)
    if config.prompt is None:
        if not (out / SAMPLE_CONFIG_FILE).is_file():
            is_marked = any((out / name).exists() for name in (LOCK_FILE, UNFINISHED_FOLDER))  # a run that did not end
            refuse_foreign_files(out, lambda name: is_marked and VIDEO_FOLDER_FILES.fullmatch(name) is not None)
        return
    if out.parent.exists() and not out.parent.is_dir():
        raise ValueError(f"out={out}: {out.parent} is a file; give a folder")
    if out.is_dir():
        raise ValueError(f"out={out}: is a folder; give a file in it, such as {out / 'video.mp4'}")
    store, configs = out.with_suffix(".zarr"), (f"{out.name}.yaml", f"{out.stem}.yaml")  # the second: before 0.2
    if store.exists() and not any((out.parent / name).is_file() for name in configs):
        raise ValueError(f"out={out}: {store.name} beside it is not of an earlier sample; give another name")


@contextmanager
def prepare_output(config: SampleConfig, rank: int) -> Iterator[Path]:
    """Own the output of `sample` and yield the folder into which all ranks write; its files are moved at the end.

    ValueError if the output folder holds other files or another process writes there.
    """
    check_output(config)
    out = Path(config.out)
    if config.prompt is not None:
        with FolderLock(out.parent, f"{out.name}.lock") as lock:
            lock.hold()
            with staged_output(out.parent, f"{out.name}.{UNFINISHED_FOLDER}") as staging:
                yield staging
                write_config(staging / f"{out.name}.yaml", config)
        return
    with own_folder(out), staged_output(out) if rank == 0 else nullcontext(out / UNFINISHED_FOLDER) as staging:
        wait_for_ranks()  # the first one has emptied the folder
        yield staging
        if rank == 0:
            write_config(staging / SAMPLE_CONFIG_FILE, config)
        wait_for_ranks()  # nothing is moved before all are complete


def write_prompt_csv(path: Path, config: SampleConfig) -> str:
    """Write a CSV of one row for the prompt of a single video; returns its path."""
    # absolute, because a path in a CSV starts at the CSV's folder
    image = "" if config.image is None else locate_file(Path("prompt.csv"), config.image)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "image", "seed"), (config.prompt, image, config.seed)])
    return str(path)
