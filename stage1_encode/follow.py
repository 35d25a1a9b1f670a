"""`decode --watch`: decodes the steps of a store that a training run still writes, as they appear."""

import time
from collections.abc import Iterator
from pathlib import Path

from common.options import write_config
from shards import latents
from stage1_encode.config import DecodeConfig
from stage1_encode.decode import CONFIG, CONTACT, check_folder, decode_step, load_vae

POLL_SECONDS = 5.0


def follow(config: DecodeConfig) -> Iterator[Path]:
    """Decode each finished step into a folder of its own and give its contact sheet, until the run says it has ended.

    A step whose contact sheet is there is not decoded again. The store may not be there yet.
    """
    store, out = Path(config.latents), Path(config.out)
    check_folder(out, there(store))
    model = load_vae(config)
    out.mkdir(parents=True, exist_ok=True)
    write_config(out / CONFIG, config)
    while True:
        ended = latents.complete(store)  # asked before looking, so that the last step is not missed
        for step in waiting(store, out):
            (out / step).mkdir(exist_ok=True)
            yield decode_step(config, model, latents.describe(store, step), out / step)[-1]
        if ended:
            return
        time.sleep(POLL_SECONDS)


def there(store: Path) -> list[str]:
    """Finished steps of the store; none where it is not there yet."""
    return latents.steps(store) if (store / "zarr.json").is_file() else []


def waiting(store: Path, out: Path) -> list[str]:
    """Finished steps of the store without a contact sheet."""
    return [step for step in there(store) if not (out / step / CONTACT).is_file()]
