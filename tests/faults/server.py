"""A process that has imported everything once and forks a child for each command: 0.05 s in place of seconds.

    python -m tests.faults.server DESCRIPTOR

- A request is a line of JSON on the socket DESCRIPTOR: {"start": {...}} answers with the child's process number,
  {"wait": number, "timeout": seconds} with how it ended.
- The child is what `python -m inl_cli ARGUMENTS` would be: it runs the same `main`, and an exception that nobody
  catches is a traceback on its stderr. Only Python's last act, which frees every module again (0.7 s), is left out.
- There is one thread when it forks; OMP_NUM_THREADS=1 in its environment sees to that.
"""

import atexit
import faulthandler
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

from tests.faults.inject import Fault, Faults

IMPORTED = (
    *("jinja2", "pandas", "pyarrow.parquet", "rich.console", "tokenizers", "torch._dynamo"),
    *(
        "torch.distributed.checkpoint",
        "inl_cli.app",
        "inl_cli.training_view",
        "inl_core.training.session",
        "inl_core.analysis.inspection",
    ),
    *("inl_core.analysis.parameters", "inl_core.inference.generate", "inl_core.inference.texts"),
)
_ADDRESS_SPACE = 12 << 30  # far above what is allowed: a bomb dies here, before it takes the machine down


def main(descriptor: int) -> NoReturn:
    """Serve until the other end is closed; a child leaves the loop and runs its command."""
    import_everything()
    channel = socket.socket(fileno=descriptor)
    with channel, channel.makefile("rw", encoding="utf-8") as stream:
        for line in stream:
            request = json.loads(line)
            if "start" in request:
                answer: Any = os.fork()
                if answer == 0:
                    break
            else:
                answer = wait(request["wait"], request["timeout"])
            stream.write(json.dumps(answer) + "\n")
            stream.flush()
        else:
            os._exit(0)  # freeing torch's modules takes a second, and some of them complain while it lasts
    run_command(**request["start"])


def import_everything() -> None:
    """What commands import in their bodies."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # a child need not copy every object's page for the collector's marks


def run_command(
    arguments: list[str],
    directory: str,
    streams: list[str],
    environment: dict[str, str],
    faults: list[dict[str, Any]],
    log: str | None,
) -> NoReturn:
    """Be the command line. streams: the files that are stdin, stdout and stderr; an empty name is a closed stream."""
    os.setsid()
    os.chdir(directory)
    for number, name in enumerate(streams):
        if name:
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            opened = os.open(name, flags)
            os.dup2(opened, number)
            os.close(opened)
        else:
            os.close(number)
    for number in range(1, signal.SIGSYS):  # a shell's background job, and nohup, would pass on what they ignore
        if signal.getsignal(number) == signal.SIG_IGN and number not in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    if streams[2]:
        faulthandler.enable()  # a crash, or our SIGABRT after a hang, says where
    Faults([Fault(**fault) for fault in faults], Path(log) if log else None).install()
    sys.argv = ["inl", *arguments]

    from inl_cli.app import main as run_inl

    try:
        run_inl()
        leave(0)
    except SystemExit as leaving:
        leave(leaving.code)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        leave(1)


def leave(code: object) -> NoReturn:
    """What Python does at its end, up to the point where it begins to free its modules."""
    threading._shutdown()  # pyright: ignore - it has no other name
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def wait(child: int, timeout: float) -> dict[str, Any]:
    """How a child ended: its exit code (minus the signal that killed it), and its peak of memory in bytes."""
    watched = os.pidfd_open(child)
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    is_late = not poll.poll(timeout * 1000)
    if is_late:
        os.kill(child, signal.SIGABRT)
        if not poll.poll(2000):
            os.kill(child, signal.SIGKILL)
    os.close(watched)
    _, status, used = os.wait4(child, 0)
    return {"code": os.waitstatus_to_exitcode(status), "memory": used.ru_maxrss * 1024, "is_late": is_late}


if __name__ == "__main__":
    main(int(sys.argv[1]))
