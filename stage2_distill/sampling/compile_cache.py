"""Where `--compile` keeps what it makes, so that a later process compiles nothing again."""

import errno
import logging
import os
import tempfile
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # torch reads it at the first compilation


def keep_compiled_code() -> None:
    """Let torch keep compiled code in the user's own cache, or where the variable says, and log the folder.

    torch's default is in the temporary folder, which a restart of the machine or of a container empties. The files are
    code that later processes run, so the folder is the user's alone. ValueError if the named folder cannot be written.
    """
    named = os.environ.get(VARIABLE)
    if named and Path(named).match(str(Path(tempfile.gettempdir(), "torchinductor_*"))):
        named = None  # torch itself has set it, when parts of it were imported
    try:
        folder = Path(named) if named else default_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_empty = not any(folder.iterdir())
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        if named:
            raise ValueError(f"{VARIABLE}={named}: cannot be written ({error}); name another folder") from error
        logging.warning("compiled code stays in torch's temporary folder (%s); to keep it set %s", error, VARIABLE)
        return
    os.environ[VARIABLE] = str(folder)
    used = "empty yet, so the first video takes up to a minute longer" if is_empty else "used again where it fits"
    logging.info("compiled code: kept in %s, %s", folder, used)


def default_folder() -> Path:
    """The folder in the user's cache; not in that of downloaded bytes, which has a limit."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ti2v-distill-compiled"
