"""A file layer that fails at a chosen operation: every write, fsync, rename, new folder and removal is counted."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest


class Cut(BaseException):
    """The process ends here; what follows in the code does not happen, least of all tidying up."""


class FaultyFiles:
    """Counts operations below `root` and fails at number `at`.

    `kind` is "cut" (half of the write is done, then nothing is any more, as after SIGKILL), or the name of an errno
    (half of the write is done and the operation raises; what the code does next is done).
    """

    def __init__(self, root: Path, at: int = -1, kind: str = "cut") -> None:
        self.root, self.at, self.kind = root, at, kind
        self.done: list[str] = []
        self.dead = False

    def step(self, what: str) -> bool:
        """Counts one operation; true when it is the one that fails. After a cut nothing is done any more."""
        if self.dead:
            raise Cut
        self.done.append(what)
        return len(self.done) - 1 == self.at

    def fail(self) -> None:
        if self.kind == "cut":
            self.dead = True
            raise Cut
        number = getattr(errno, self.kind)
        raise OSError(number, os.strerror(number))

    def below(self, path: Any) -> bool:
        return isinstance(path, str | Path) and self.root in Path(path).absolute().parents

    @contextmanager
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        layer = self
        plain_open, plain_fsync = io.open, os.fsync

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                if layer.step(f"write {Path(str(self.name)).name}"):
                    super().write(bytes(data)[: len(bytes(data)) // 2])
                    layer.fail()
                return super().write(data)

        def open_file(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
            if "b" in mode and "r" not in mode and layer.below(file):
                if layer.step(f"create {Path(file).name}"):
                    layer.fail()
                return File(str(file), mode.replace("b", ""))
            return plain_open(file, mode, *args, **more)

        def fsync(descriptor: int) -> None:
            if layer.step("fsync"):
                layer.fail()
            plain_fsync(descriptor)

        def named(name: str, plain: Any) -> Any:
            def call(path: Any, *args: Any, **more: Any) -> Any:
                if layer.below(path) and layer.step(f"{name} {Path(path).name}"):
                    layer.fail()
                return plain(path, *args, **more)

            return call

        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", open_file)
            patch.setattr(io, "open", open_file)
            patch.setattr(os, "fsync", fsync)
            for module, name in ((os, "rename"), (os, "replace"), (os, "mkdir"), (shutil, "rmtree"), (os, "unlink")):
                patch.setattr(module, name, named(name, getattr(module, name)))
            yield
