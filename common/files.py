"""Files and folders: written completely or not at all, parsed into records, and owned by one run at a time.

The rule of every command: a run checks its inputs and its output folder, then takes the folder's lock; under torchrun
rank 0 does so and the other ranks wait for it. It writes beside what is there, and renames when everything is complete.
"""

import errno
import fcntl
import logging
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Annotated, Self, TypeVar

import msgspec

T = TypeVar("T")
# A number of bytes, records or elements. The bound keeps sums of such numbers within 64 bits.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**48)]

LOCK_FILE, UNFINISHED_FOLDER = "owner.lock", "unfinished"
OWN_NAMES = re.compile(rf"{LOCK_FILE}(\.\d+)*|{UNFINISHED_FOLDER}")  # may lie in the output folder of any command
SLOT_BYTES = 64  # of a lock file; they name the slot's last owner
POLL_SECONDS = 0.1  # between two tries for a slot that another process holds briefly
HELD_ERRORS = (errno.EAGAIN, errno.EACCES)  # which of the two depends on the system
NO_LOCK_ERRORS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # Lustre, NFS and FUSE, by their options
URL_PATTERN = re.compile(r"([^/]*)://|(s3|gs|hf):/", re.IGNORECASE)  # s3:/ is what pathlib makes of s3://
UPLOAD_COMMANDS = {"s3": "aws s3 cp --recursive", "gs": "gcloud storage cp -r", "hf": "hf upload"}


def check_local_path(name: str, path: str, *, is_output: bool) -> None:
    """Raise ValueError if an option's path is empty or the address of a store, which would become a local folder."""
    if not path.strip() or "\0" in path:
        raise ValueError(f"{name}={path!r}: is no path; name a file or folder")
    match = URL_PATTERN.match(path)
    if match is None:  # a colon alone is a part of a name
        return
    scheme = (match[1] or match[2] or "").lower()
    if scheme == "file":
        remedy = "give the path without file://"
    elif is_output:
        remedy = f"write into a local folder, then copy it, e.g. with {UPLOAD_COMMANDS.get(scheme, 'rclone copy')}"
    else:
        remedy = "copy it to this machine and give its path"
    raise ValueError(f"{name}={path}: only local files are {'written' if is_output else 'read'}; {remedy}")


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file completely or not at all: `.partial`, fsync, rename."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # before the rename, which may reach the disk first
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # on a full disk it would take the last space
        raise


def open_file(path: Path) -> FileIO:
    """A file, open for unbuffered reading; ValueError for a pipe or device, which would be waited for or never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe must not wait either
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return FileIO(descriptor)
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise ValueError(f"{path}: is a pipe or a device; copy its content into a file")


def check_no_pipe(name: str, path: Path) -> None:
    """Raise ValueError, which names an option, if its path is a pipe or a device: whoever reads it would wait.

    OSError if it is missing or a folder.
    """
    try:
        open_file(path).close()
    except ValueError as error:
        raise ValueError(f"{name}={error}") from error


def read_file(path: Path) -> bytes:
    """The bytes of a file, see `open_file`."""
    with open_file(path) as file:
        return file.readall()


@contextmanager
def report_write_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError while writing, for example of a full disk, into a ValueError of one line."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"out={folder}: {error.strerror}; fix this and rerun the same command") from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power failure; fsync of a file covers its data only."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def parse_json(data: bytes | memoryview, kind: type[T], where: object) -> T:
    """JSON as a record of type `kind`; ValueError that begins with `where` if it is not one.

    Types, required fields and bounds are those of the record's annotations and `__post_init__`; unknown fields, which
    a newer version may have written, are ignored.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:  # the latter for brackets nested a thousand times
        raise ValueError(f"{where}: is damaged or from another program ({error})") from error


def read_json(path: Path, kind: type[T]) -> T:
    """The JSON file `path` as a record, see `parse_json`; ValueError that names the file if it cannot be read."""
    try:
        data = read_file(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    return parse_json(data, kind, path)


def refuse_foreign_files(folder: Path, is_own: Callable[[str], bool] = lambda name: False) -> None:
    """Raise ValueError if an output folder is a file, or holds names that `is_own` does not accept.

    The lock file is written first, so a folder that holds it is that of an earlier run, however that ended.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={folder}: is a file; give a folder")
    foreign = sorted(
        path.name for path in folder.glob("*") if not (OWN_NAMES.fullmatch(path.name) or is_own(path.name))
    )
    if foreign:
        raise ValueError(f"out={folder}: holds other files ({', '.join(foreign[:3])}); give a new folder")


@contextmanager
def staged_output(folder: Path, name: str = UNFINISHED_FOLDER) -> Iterator[Path]:
    """Yield an empty folder inside `folder`; at the end its files and folders replace those of the same names.

    After an error `folder` is as it was, and what was finished by then stays in the inner folder until the next run.
    """
    staging = folder / name
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        with suppress(OSError):  # it holds something: after an error for the user, else to be moved
            staging.rmdir()
    if staging.is_dir():
        move_into(staging, folder)


def move_into(staging: Path, folder: Path) -> None:
    """Move everything in a folder into the one around it and delete the inner one."""
    for path in sorted(staging.iterdir()):
        target = folder / path.name
        if target.is_dir():  # rename() replaces only an empty folder
            target.replace(staging / f"{path.name}.replaced")
        path.replace(target)
    shutil.rmtree(staging)


class FolderLock:
    """The open lock file of an output; a slot of it stands for what only one process at a time may write.

    The system releases the slots of a process that ends, however it ends. On a file system without locks a slot is a
    symbolic link beside the lock file that names its owner. The link of a process of this machine that has ended is
    replaced; whether one of another machine has ended cannot be known.

    The file is deleted at the end unless it is `permanent`, as several runs need that have a slot each.
    """

    def __init__(self, folder: Path, name: str = LOCK_FILE, *, permanent: bool = False) -> None:
        self.folder, self.path, self.permanent = folder, folder / name, permanent
        self.has_locks, self.is_held, self.is_shared, self.links = True, False, False, dict[int, Path]()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"out={folder}: is a file or below one; give a folder") from error
        except OSError as error:
            raise ValueError(f"out={folder}: {error.strerror}") from error

    def hold(self, slot: int = 0) -> None:
        """Hold a slot until the lock file is closed; ValueError if another process holds it."""
        if not self._try_slot(slot):
            raise ValueError(f"out={self.folder}: {self._describe_owner(slot)}; wait for it to end")
        if not (self.permanent or self._is_in_place()):
            raise ValueError(f"out={self.folder}: another process has just ended there; repeat the command")
        self.is_held = True

    def share(self) -> None:
        """Share slot 0 with the other ranks of this run, which call this too once the first one has held the slot."""
        self.is_shared = True
        if self.has_locks:  # else the first rank's link stands for all
            self._lock_slot(0, fcntl.LOCK_SH)

    @contextmanager
    def hold_briefly(self, slot: int) -> Iterator[None]:
        """Wait for a slot and hold it in the context."""
        while not self._try_slot(slot):
            time.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            if slot in self.links:
                self.links.pop(slot).unlink(missing_ok=True)
            else:
                fcntl.lockf(self.descriptor, fcntl.LOCK_UN, SLOT_BYTES, slot * SLOT_BYTES)

    def _try_slot(self, slot: int) -> bool:
        """Take a slot and write its owner's name; False if another process has it."""
        if self.has_locks and (is_locked := self._lock_slot(slot, fcntl.LOCK_EX)) is not None:
            owner = f"process {os.getpid()} on {socket.gethostname()}"[: SLOT_BYTES - 1]
            if is_locked:
                with suppress(OSError):  # a full disk: the lock holds without its owner's name
                    os.pwrite(self.descriptor, f"{owner:{SLOT_BYTES - 1}}\n".encode(), slot * SLOT_BYTES)
            return is_locked
        if slot not in self.links and claim_link(self._link_path(slot)):
            self.links[slot] = self._link_path(slot)
        return slot in self.links

    def _lock_slot(self, slot: int, kind: int) -> bool | None:
        """Lock a slot; False if another process has locked it, None if the file system has no locks."""
        try:  # lockf and not flock, which locks whole files only
            fcntl.lockf(self.descriptor, kind | fcntl.LOCK_NB, SLOT_BYTES, slot * SLOT_BYTES)
        except OSError as error:
            if error.errno in HELD_ERRORS:
                return False
            if error.errno not in NO_LOCK_ERRORS:
                raise ValueError(
                    f"out={self.folder}: cannot be locked ({error.strerror}); give a folder on another disk"
                ) from error
            logging.warning(
                "out=%s: has no file locks (%s); symbolic links stand for them", self.folder, error.strerror
            )
            self.has_locks = False
            return None
        return True

    def _is_in_place(self) -> bool:
        """Whether the open file still has its name, which the process before deletes when it ends."""
        with suppress(FileNotFoundError):
            return os.path.samestat(self.path.stat(), os.fstat(self.descriptor))
        return False

    def _link_path(self, slot: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{slot}")

    def _describe_owner(self, slot: int) -> str:
        owner, remedy = os.pread(self.descriptor, SLOT_BYTES, slot * SLOT_BYTES).decode(errors="replace"), ""
        if not self.has_locks:
            with suppress(FileNotFoundError):  # its owner has just ended
                host, number, *_ = str(self._link_path(slot).readlink()).split()
                owner, remedy = f"process {number} on {host}", f" (delete {self._link_path(slot)} if it has ended)"
        return f"{owner.strip() or 'another process'} is working on it{remedy}"

    def close(self, *, failed: bool = False) -> None:
        """Release all slots; `failed`: other ranks may still be at work, and the file stays for their sake."""
        for link in self.links.values():
            link.unlink(missing_ok=True)
        if self.permanent:
            with suppress(OSError):  # others hold slots, whose owners' names are kept
                fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.truncate(self.descriptor, 0)
        elif self.is_held and not (self.is_shared and failed):
            self.path.unlink(missing_ok=True)
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        self.close(failed=error_type is not None)


def claim_link(link: Path) -> bool:
    """Create a link that names this process, in place of one whose process has ended; False if that may be alive."""
    own = process_identity(os.getpid())
    for _ in range(2):
        with suppress(FileExistsError):
            link.symlink_to(own)  # created with its content, so that nobody sees it without
            return True
        with suppress(FileNotFoundError):  # its owner has just deleted it
            owner = str(link.readlink())
            host, number, *namespace = owner.split()[:3]
            is_decidable = [host, *namespace] == [own.split()[0], own.split()[2]]
            if not is_decidable or process_identity(int(number)) == owner:
                return False
            aside = link.with_name(f"{link.name}.{os.getpid()}")
            link.rename(aside)
            if str(aside.readlink()) != owner:  # another process was faster, and this is its link
                aside.rename(link)
                return False
            aside.unlink()
    return False


def process_identity(number: int) -> str:
    """Host, number, namespace of numbers, start and boot of a process of this machine; without a start if it ended."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = str(Path("/proc/self/ns/pid").readlink())
    start = "-"
    with suppress(OSError):  # there is no such process
        state, *fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        start = "-" if state in "ZX" else fields[18]  # Z, X: it has ended, and its parent has not asked yet
    return f"{socket.gethostname()} {number} {namespace} {start} {boot}"
