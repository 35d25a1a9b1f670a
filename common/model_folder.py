"""Locating a model by its folder or hub name, and fingerprints that tell models apart without loading them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

MODEL_PARTS = ("vae", "text_encoder", "tokenizer", "transformer")
BLOCK_BYTES, MAX_BLOCKS = 4096, 256  # of a weight file, up to this many evenly spaced blocks are hashed


def locate_model(model: str, parts: Sequence[str]) -> Path:
    """Local folder of `model`, a folder in the layout of Wan-AI/Wan2.2-TI2V-5B-Diffusers or a hub name.

    Only the `parts` of a hub name are downloaded. ValueError naming the first part that is missing.
    """
    folder = Path(model)
    if not folder.exists() and model.count("/") == 1 and not model.startswith((".", "/", "~")):
        try:
            folder = Path(snapshot_download(model, allow_patterns=["*.json", *(f"{part}/*" for part in parts)]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"model={model}: no such folder, and the hub has no such model ({reason})") from error
    if not folder.is_dir():
        raise ValueError(f"model={model}: no such folder, and not a hub name of the form OWNER/NAME")
    for part in parts:
        config = f"{part}/tokenizer_config.json" if part == "tokenizer" else f"{part}/config.json"
        if not (folder / config).is_file():
            raise ValueError(f"model={model}: {config} is missing; a model folder holds {', '.join(MODEL_PARTS)}")
        if part != "tokenizer" and not list((folder / part).glob("*.safetensors")):
            raise ValueError(f"model={model}: {part}/ holds no .safetensors weights")
    return folder


def fingerprint_folder(folder: Path) -> str:
    """Hex digest (32 digits) of the names, sizes and contents of one part of a model; large files are sampled."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.model"), *folder.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            if size <= BLOCK_BYTES * MAX_BLOCKS:
                digest.update(file.read())
                continue
            # Fine-tuning changes every block, so 1 MB of a weight file tells it apart from any other.
            for block in range(MAX_BLOCKS):
                file.seek(block * (size - BLOCK_BYTES) // (MAX_BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:32]
