"""Runs of the command line at the same time, each in a process of its own.

They are forked from a server that has imported the program and done nothing with it: a
fork of a process whose threads hold locks, as PyTorch's and tqdm's do, may never end.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from minidiff import cli

ROOT = Path(__file__).parents[1]
STDERR = "stderr"  # a file beside the folder that the children run in


def in_children(*runs: list[str], before: Callable[[], None] | None = None) -> list:
    """Run each command line, after ``before``: their exit statuses."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs processes of POSIX")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minidiff.cli.sample", "minidiff.engine.loading"])
    with contextlib.chdir(ROOT):
        forkserver.ensure_running()
    children = [context.Process(target=run, args=(words, before)) for words in runs]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return [child.exitcode for child in children]


def run(words: list[str], before: Callable[[], None] | None) -> None:
    """What a child does, with one thread: there may be many children."""
    torch.set_num_threads(1)
    os.dup2(os.open(f"../{STDERR}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    sys.argv = ["minidiff", *words]
    if before:
        before()
    cli.main()


def die_at_fsync() -> None:
    """The process is killed where it makes sure of a file."""
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)


def interrupt_after(moment: float) -> None:
    """Ctrl-C comes ``moment`` seconds after the program has begun."""
    plain = cli.run_program

    def wait() -> None:
        time.sleep(moment)
        os.kill(os.getpid(), signal.SIGINT)

    def interrupted(arguments: list[str]) -> tuple[int, str]:
        threading.Thread(target=wait, daemon=True).start()
        return plain(arguments)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    cli.run_program = interrupted
