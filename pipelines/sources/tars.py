"""WebDataset shards: the images inside tars, by name and place, without reading their bytes."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

from pipelines.sources.listing import BrokenContainer, Rows
from pipelines.sources.names import as_text, extension, is_hidden, is_image_name
from pipelines.sources.walk import FileEntry
from pipelines.storage.errors import failed_storage

TARS_AT_ONCE = 8
MAX_LABEL_BYTES = 4096
# Names and records of pax never come near.
MAX_HEADER_BYTES = 16 * 2**20
# Headers are far apart: larger blocks would read the images too.
REMOTE_BLOCK_BYTES = 1 << 20


class _Member(NamedTuple):
    """A file inside a tar. offset: the first byte of its content."""

    name: str
    offset: int
    size: int
    sparse: bool


def list_tars(fs: Any, entries: Iterable[FileEntry], *, local: bool) -> Rows:
    """Members of tars that are images by name. Damaged tars give what is whole, and a BrokenContainer."""
    rows = Rows()
    with ThreadPoolExecutor(TARS_AT_ONCE) as pool:
        rows.extend(pool.map(lambda entry: _list_tar(fs, entry, local=local), entries))
    return rows


def _list_tar(fs: Any, entry: FileEntry, *, local: bool) -> Rows:
    rows = Rows()
    members: list[_Member] = []
    labels: dict[str, str] = {}
    options = {} if local else {"block_size": REMOTE_BLOCK_BYTES}
    damage = ""
    with fs.open(entry.path, "rb", **options) as file:
        try:
            headers: Any = _Headers(file)
            with tarfile.open(fileobj=headers, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    vars(archive)["members"] = []  # otherwise it keeps every header
                    if not member.isreg():
                        continue
                    if member.size < 0:  # some versions of tarfile would go backwards forever
                        damage = f"{as_text(member.name)} has a negative size"
                        break
                    if not member.issparse() and member.offset_data + member.size > entry.size:
                        damage = f"it ends inside {as_text(member.name)}"
                        break
                    if extension(member.name) == ".cls":
                        labels[_sample_key(member.name)] = _read_label(file, member, archive)
                    else:
                        members.append(_Member(member.name, member.offset_data, member.size, member.issparse()))
                damage = damage or _wrong_end(file, archive.offset)
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            if failed_storage(error):
                raise
            damage = str(error) or type(error).__name__
    for found in members:
        _add_member(rows, entry, found, labels)
    if damage:
        sentence = f"{damage}; whole images found before that: {len(rows):,}"
        rows.broken.append(BrokenContainer(entry.uri, entry.key, entry.version, "DamagedTar", sentence))
    return rows


class _Headers:
    """A tar as tarfile sees it: a header that claims to be huge is damage, and is not read into memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims to have {size} bytes")
        return self._file.read(size)


def _wrong_end(file: BinaryIO, offset: int) -> str:
    """What is wrong where tarfile found no further member: it is silent about headers that it cannot read."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return "it ends without the end-of-archive mark"
    return f"there is neither a member nor the end at byte {offset}" if any(block) else ""


def _add_member(rows: Rows, entry: FileEntry, member: _Member, labels: dict[str, str]) -> None:
    text = as_text(member.name)
    folder, _, base = text.rpartition("/")
    if any(is_hidden(part) for part in text.split("/") if part not in (".", "..")):
        return
    if not is_image_name(base):
        rows.skipped[extension(base)] += 1
        return
    parent = folder.rpartition("/")[2]
    label = labels.get(_sample_key(member.name)) or (parent if parent not in (".", "..") else None) or None
    rows.add(
        f"{entry.key}/{text}",
        f"{entry.uri}/{text}",
        label,
        member.size,
        entry.version,
        container=entry.uri,
        offset=member.offset,
        error=f"{text} is stored sparse, in pieces: pack {entry.key} again without --sparse" if member.sparse else None,
    )


def _sample_key(name: str) -> str:
    """What the members of one sample share: the path up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _read_label(file: BinaryIO, member: tarfile.TarInfo, archive: tarfile.TarFile) -> str:
    file.seek(member.offset_data)
    return file.read(min(member.size, MAX_LABEL_BYTES)).decode(errors="replace").strip()
