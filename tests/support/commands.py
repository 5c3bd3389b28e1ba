"""Commands in processes of their own, without the seconds that a new interpreter needs to import torch."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

import vlm  # noqa: F401  (before lightning)
import lightning.pytorch.cli  # noqa: F401  (this and the next two: what every stage needs, in place in the fork server)
import tensorboard.summary  # noqa: F401
import torch

import cli
import tests.support.probe  # noqa: F401
from tests.conftest import PATIENCE
from tests.support.ranks import SERVER, group_of_ranks

ROOT = Path(__file__).parents[2]


class Command:
    """`vlm ARGUMENTS` as a process that leads its group; what can be asked of it is what `subprocess.Popen` has.

    Args:
        arguments: of the command line.
        world: ranks; with more than one they find each other as those of a launcher do, and the first one leads.
        environment: the whole of it; by default that of this process.
        cwd: where it runs.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        world: int = 1,
        environment: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> None:
        self._store = tempfile.TemporaryDirectory()
        self._output, theirs = SERVER.Pipe(duplex=False)
        job = (list(arguments), world, dict(os.environ if environment is None else environment), str(cwd))
        self._process = SERVER.Process(target=_lead, args=(theirs, job, f"{self._store.name}/store"))
        self._process.start()
        theirs.close()
        self.pid: int = self._output.recv()  # it leads its group from now on

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("vlm", timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, None]:
        """What it and all that it started have printed, when all have ended."""
        end, parts = time.monotonic() + timeout, [b""]
        while wait([self._output], max(0.0, end - time.monotonic())):
            parts.append(os.read(self._output.fileno(), 1 << 16))
            if not parts[-1]:
                self.wait()
                self._store.cleanup()
                return b"".join(parts).decode(), None
        raise subprocess.TimeoutExpired("vlm", timeout, b"".join(parts))


def run_forked(command: list[str]) -> tuple[int, int | None]:
    """In the place of `vlm.recipes.child.run_child`, for recipes of real nodes: `[python, "-m", "cli", *arguments]`."""
    process = Command(command[3:], cwd=Path.cwd())
    output, _ = process.communicate(4 * PATIENCE)
    print(output)
    status = process.wait()
    return (128 - status if status < 0 else status), None


def _lead(output: Connection, job: tuple[list[str], int, dict[str, str], str], store: str) -> None:
    arguments, world, environment, cwd = job
    os.setsid()
    output.send(os.getpid())
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # the server has asked for it under another environment
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.argv = ["vlm", *arguments]
    others = []
    for rank in range(1, world):
        if (pid := os.fork()) == 0:
            os._exit(_run(arguments, rank, world, store))
        others.append(pid)
    ended = [_run(arguments, 0, world, store)]
    ended += [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in others]
    sys.exit(next((status for status in ended if status), 0))


def _run(arguments: list[str], rank: int, world: int, store: str) -> int:
    try:
        with group_of_ranks(rank, world, store, PATIENCE) if world > 1 else contextlib.nullcontext():
            return int(cli.main(arguments))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
