"""Models a disk after a power failure: synced data is there; other data is there, gone or torn."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.shared.registry.faults import Operation


@dataclass
class _File:
    content: bytes = b""
    synced: bytes = b""


@dataclass
class _Folder:
    """The node under each name now, at the last sync, and at any time since."""

    entries: dict[str, "_Node"] = field(default_factory=dict)
    synced: dict[str, "_Node"] = field(default_factory=dict)
    since: dict[str, list["_Node | None"]] = field(default_factory=dict)

    def put(self, name: str, node: "_Node | None") -> None:
        self.since.setdefault(name, []).append(node)
        if node is None:
            del self.entries[name]
        else:
            self.entries[name] = node


_Node = _File | _Folder

# A tree of files: the content of each file, None for a folder.
Image = Mapping[Path, bytes | None]


@dataclass(frozen=True)
class Survival:
    """Which unsynced changes survive.

    names, contents: True for all of them, False for none, None for a random choice.
    """

    names: bool | None
    contents: bool | None
    seed: int = 0


class Disk:
    """A folder on a disk, fully synced at first, and the operations on it."""

    def __init__(self, folder: Path) -> None:
        self._root = _scan(folder)

    def apply(self, operation: Operation) -> None:
        """Applies an operation, whose paths are relative to the folder."""
        path = operation.path
        match operation.name:
            case "create":
                self._folder(path.parent).put(path.name, _File())
            case "mkdir":
                self._folder(path.parent).put(path.name, _Folder())
            case "unlink":
                self._folder(path.parent).put(path.name, None)
            case "rename":
                node = self._node(path)
                self._folder(operation.target.parent).put(operation.target.name, node)
                self._folder(path.parent).put(path.name, None)
            case "link":
                self._folder(operation.target.parent).put(operation.target.name, self._node(path))
            case "sync":
                self._sync(self._node(path))
            case "write" | "truncate":
                file = self._node(path)
                assert isinstance(file, _File)
                start, end = operation.offset, operation.offset + len(operation.data)
                rest = file.content[end:] if operation.name == "write" else b""
                file.content = file.content[:start].ljust(start, b"\0") + operation.data + rest
            case name:
                raise AssertionError(name)

    def image(self, survival: Survival) -> Image:
        """Returns the files after a power failure."""
        image: dict[Path, bytes | None] = {}
        _survive(self._root, Path(), survival, random.Random(survival.seed), image)
        return image

    def _sync(self, node: _Node) -> None:
        if isinstance(node, _File):
            node.synced = node.content
        else:
            node.synced, node.since = dict(node.entries), {}

    def _node(self, path: Path) -> _Node:
        node: _Node = self._root
        for part in path.parts:
            assert isinstance(node, _Folder)
            node = node.entries[part]
        return node

    def _folder(self, path: Path) -> _Folder:
        node = self._node(path)
        assert isinstance(node, _Folder)
        return node


def write_image(image: Image, folder: Path) -> None:
    """Writes an image into a new folder."""
    for path, content in image.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)


def _scan(path: Path) -> _Folder:
    folder = _Folder()
    for child in path.iterdir():
        content = b"" if child.is_dir() else child.read_bytes()
        folder.entries[child.name] = _scan(child) if child.is_dir() else _File(content, content)
    folder.synced = dict(folder.entries)
    return folder


def _survive(
    node: _Node, path: Path, survival: Survival, chance: random.Random, image: dict[Path, bytes | None]
) -> None:
    if isinstance(node, _File):
        image[path] = _content(node, survival.contents, chance)
        return
    image[path] = None
    for name in sorted({*node.entries, *node.synced, *node.since}):
        candidates = [node.synced.get(name), *node.since.get(name, [])]
        child = chance.choice(candidates) if survival.names is None else candidates[-1 if survival.names else 0]
        if child is not None:
            _survive(child, path / name, survival, chance, image)


def _content(file: _File, survives: bool | None, chance: random.Random) -> bytes:
    if survives is not None or file.content == file.synced:
        return file.content if survives else file.synced
    place = chance.randrange(len(file.content) + 1)
    # A hole is read as zeros.
    torn = (file.content[:place], file.content[:place].ljust(len(file.content), b"\0"))
    return chance.choice((file.content, file.synced, *torn))
