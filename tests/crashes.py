"""Kills a process at its k-th change of the disk: each write, each flush to the disk, each rename and each removal, of every file.

A write that is killed has written half. Nothing of this is in the product: the functions are replaced in the child that is to die.
"""
import builtins
import os
import signal
from collections.abc import Callable
from pathlib import Path


class Changes:
    """Counts the changes below `folder` and dies at number `last`; None: only counts."""

    def __init__(self, folder: Path, last: int | None = None):
        self.folder, self.last, self.count = str(folder), last, 0

    def __call__(self, half: Callable[[], object] = lambda: None) -> None:
        self.count += 1
        if self.count == self.last:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> "Changes":
        """Replace what changes files, for the rest of this process."""
        opened, fds = builtins.open, set()

        def open_watched(file, mode="r", *args, **options):
            found = opened(file, mode, *args, **options)
            if set(mode) & set("wax+") and str(file).startswith(self.folder):
                fds.add(found.fileno())
                return Watched(found, self)
            return found

        def watched(function: Callable, below: Callable) -> Callable:
            def called(first, *args, **options):
                if below(first):
                    self()
                return function(first, *args, **options)
            return called

        builtins.open = open_watched
        os.fsync = watched(os.fsync, fds.__contains__)
        for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir"):
            setattr(os, name, watched(getattr(os, name), lambda path: str(path).startswith(self.folder)))
        return self


class Watched:
    """A file whose writes and truncations count; a write that dies has written half."""

    def __init__(self, file, changes: Changes):
        self._file, self._changes = file, changes

    def write(self, data):
        self._changes(lambda: (self._file.write(data[:len(data) // 2]), self._file.flush()))
        return self._file.write(data)

    def truncate(self, *size):
        self._changes()
        return self._file.truncate(*size)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


def dying(work: Callable[[], object], folder: Path, at: int | None) -> int:
    """Run `work` in a forked process that dies at change `at` below `folder`. Returns how many changes there were, or -1 if it died."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            changes = Changes(folder, at).watch()
            work()
            os.write(writes, str(changes.count).encode())
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0, "the training failed; what it said is in the captured output"
    return int(told) if told else -1
