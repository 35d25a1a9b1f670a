"""Programs in forks of a process that has torch and both stages imported: processes of their own, without 5 s of start.

A fork has its own arguments, environment, working folder and output, ends like any interpreter, and shares nothing but
imports. For ranks, kills and exit codes; what tests imports, the memory of a process or torchrun itself starts anew.
This file is also the process that forks: it answers each line of its input, a request, with a line of exit codes.
"""

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from functools import cache
from importlib import import_module
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 600
IMPORTED = (
    "commands.evaluate",
    "commands.sample",
    "stage1_encode.encode",
    "stage2_distill.export.export",
    "stage2_distill.train",
)


def run_python(
    *words: object, ranks: int = 0, cwd: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS`, a file or `-m` a module; `ranks` are started as torchrun starts those of one host.

    As under torchrun, the exit code is 1 if a rank fails, and the others are ended then.
    """
    arguments = [str(word) for word in words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    with tempfile.TemporaryDirectory() as folder:
        request = {"words": arguments, "env": environment, "cwd": str(cwd), "folder": folder, "ranks": ranks}
        codes = ask_server(request)
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(arguments, int(any(codes)) if ranks else codes[0], out, err)


@cache  # one for all tests of this process
def start_server() -> "subprocess.Popen[str]":
    """Start the process that forks."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.forked"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def stop_server() -> None:
    """End the process that forks, if there is one."""
    if start_server.cache_info().currsize:
        start_server().communicate()  # closes its input
        start_server.cache_clear()


def ask_server(request: dict[str, object]) -> list[int]:
    """Exit codes of the processes of a request, negative if a signal ended one."""
    server = start_server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank: with a store that is not the first rank's, which may end before the others."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    values = {name: str(value) for name, value in numbers.items()}
    return values | {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}


def fork_store() -> tuple[int, int]:
    """Fork a process that holds the ranks' store, as its threads must not be forked; process and port."""
    ready, ready_to = os.pipe()
    child = os.fork()
    if not child:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(ready_to, str(store.port).encode())
        signal.pause()
    port = int(os.read(ready, 8))
    os.close(ready)
    os.close(ready_to)
    return child, port


def become(request: dict, environment: dict[str, str]) -> list[str]:
    """Make this fork the process of a request; its words."""
    signal.alarm(TIMEOUT_SECONDS)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(Path(request["folder"]) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["env"] | environment)
    os.chdir(request["cwd"])
    return request["words"]


def fork_all(request: dict) -> dict[int, int] | None:
    """Fork the processes of a request; exit codes by process, or None in a fork."""
    ranks, codes, children = request["ranks"], dict[int, int](), set[int]()
    store, port = fork_store() if ranks else (0, 0)
    for rank in range(max(ranks, 1)):
        child = os.fork()
        if not child:
            become(request, rank_environment(rank, ranks, port) if ranks else {})
            return None
        children.add(child)
    while running := children - codes.keys():
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        for other in running - {child} if codes[child] else ():
            os.kill(other, signal.SIGTERM)
    if ranks:
        os.kill(store, signal.SIGKILL)
        os.waitpid(store, 0)
    return codes


def serve() -> list[str]:
    """Answer requests until the input ends; in a fork, return the words of its program."""
    for line in sys.stdin:
        request = json.loads(line)
        codes = fork_all(request)
        if codes is None:
            return request["words"]
        print(json.dumps(list(codes.values())), flush=True)  # noqa: T201
    return []


def run_program(words: list[str]) -> None:
    """Run a file or `-m` a module with its arguments as the program of this process."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    gc.disable()  # what is imported stays, and forks must not write to it
    for name in IMPORTED:
        import_module(name)
    gc.freeze()
    gc.enable()
    if program := serve():
        run_program(program)
