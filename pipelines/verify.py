"""verify: does a store hold what it says? Every images row has all its patches, no patch lacks its image, files and
log agree, dimensions match the spec."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.config import Config
from pipelines.schemas import descriptor_columns, patches_schema
from pipelines.store import Store
from pipelines.tables import DataFile, Table

MOST_SHOWN = 20  # problems of one kind


@dataclass
class Result:
    """What verify found. `problems` is empty for a sound store."""

    store: str
    images: int = 0
    patches: int = 0
    failures: int = 0
    files: int = 0
    unreferenced_files: int = 0  # left by killed or replaced writes; harmless, vacuum removes them
    problems: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 1 if self.problems else 0

    def as_dict(self) -> dict[str, Any]:
        return self.__dict__ | {"sound": not self.problems}


def run(config: Config, *, store: str) -> Result:
    """Check a store; reads every row of images and the keys of patches. Raises RequestError when there is no store."""
    opened = Store.open(store, config)
    result = Result(opened.uri)
    problems = result.problems
    tables = {"images": opened.images, "patches": opened.patches, "failures": opened.failures}
    readable = {}
    for name, table in tables.items():
        files = table.files()
        result.files += len(files)
        present = _files_present(table)
        result.unreferenced_files += len(present.keys() - files.keys())
        readable[name] = [file for path, file in files.items() if path in present]
        _some(
            problems,
            (f"{name}: {p} is in the log, but the file is missing" for p in sorted(files.keys() - present.keys())),
        )
        _some(
            problems,
            (
                f"{name}: {path} has {present[path]} bytes, the log says {file.size}"
                for path, file in files.items()
                if present.get(path, file.size) != file.size
            ),
        )
        _some(problems, _unreadable(table, name, readable[name]))
    if problems:
        return result  # rows cannot be judged while files are missing or damaged

    images = opened.images.read(["image_id", "shard", "grid_width", "grid_height", "source_size", "source_version"])
    failures = opened.failures.read(["image_id"])["image_id"]
    result.images, result.failures = len(images), len(failures)
    _some(problems, (f"images: {image_id} has {count} rows" for image_id, count in _repeated(images["image_id"])))
    _some(problems, (f"failures: {image_id} has {count} rows" for image_id, count in _repeated(failures)))
    both = failures.filter(pc.is_in(failures, value_set=images["image_id"]))
    _some(problems, (f"{image_id} is in images and in failures" for image_id in both.to_pylist()))

    patch_files = opened.patches.files()
    by_shard = _images_by_shard(images)
    _some(
        problems,
        (
            f"images: {len(rows)} rows name shard {shard}, which patches does not have"
            for shard, rows in by_shard.items()
            if shard not in patch_files
        ),
    )
    for path, file in patch_files.items():
        result.patches += file.rows
        _some(problems, _check_shard(opened.patches, file, by_shard.get(path, {}), opened.config))
    if opened.config.store.patches == "all":
        without = images.filter(pc.is_null(images["shard"]))
        _some(problems, (f"images: {image_id} has no patches" for image_id in without["image_id"].to_pylist()))
    return result


def _files_present(table: Table) -> dict[str, int]:
    """Parquet files under a table, with their sizes."""
    fs, root = storage.filesystem(table.uri, table.options)
    found = fs.find(root, detail=True)
    return {
        path[len(root.rstrip("/")) + 1 :]: entry["size"]
        for path, entry in found.items()
        if path.endswith(".parquet") and "/_delta_log/" not in path
    }


def _unreadable(table: Table, name: str, files: list[DataFile]) -> Iterator[str]:
    for file in files:
        fs, path = storage.filesystem(storage.join(table.uri, file.path), table.options)
        try:
            with fs.open(path, "rb") as source:
                footer = pq.ParquetFile(source)
                rows, columns = footer.metadata.num_rows, footer.schema_arrow.names
        except (OSError, pa.ArrowException) as error:
            yield f"{name}: {file.path} cannot be read as Parquet ({str(error).splitlines()[0]})"
            continue
        if rows != file.rows:
            yield f"{name}: {file.path} has {rows} rows, the log says {file.rows}"
        if columns != table.schema.names:
            yield f"{name}: {file.path} has columns {columns}, the store's spec has {table.schema.names}"


def _images_by_shard(images: pa.Table) -> dict[str, dict[str, int]]:
    """shard -> image_id -> patches of its grid."""
    found: dict[str, dict[str, int]] = {}
    cells = pc.multiply(images["grid_width"], images["grid_height"])
    columns = (images["shard"].to_pylist(), images["image_id"].to_pylist(), cells.to_pylist())
    for shard, image_id, count in zip(*columns, strict=True):
        if shard is not None:
            found.setdefault(shard, {})[image_id] = count
    return found


def _check_shard(table: Table, file: DataFile, images: dict[str, int], config: Config) -> Iterator[str]:
    """Problems of one patches file: whose patches it holds, how many, once each, and how long their vectors are."""
    columns = descriptor_columns(config)
    lengths = [f"length_{column}" for column in columns]
    fs, path = storage.filesystem(storage.join(table.uri, file.path), table.options)
    groups = []
    previous = ""
    with fs.open(path, "rb") as source:
        parquet = pq.ParquetFile(source)
        for index in range(parquet.num_row_groups):
            rows = parquet.read_row_group(index, columns=["image_id", "row", "col", *columns])
            for column, length in zip(columns, lengths, strict=True):
                rows = rows.append_column(length, pc.list_value_length(rows[column]))
            groups.append(rows.select(["image_id", "row", "col", *lengths]))
            ids = pc.unique(rows["image_id"]).to_pylist()
            if ids != sorted(ids) or ids[0] <= previous:
                yield f"patches: {file.path} does not hold whole images in key order (row group {index})"
            previous = ids[-1]
    rows = pa.concat_tables(groups) if groups else patches_schema(config).empty_table()
    counted = rows.group_by("image_id").aggregate([("row", "count")])
    counts = dict(zip(counted["image_id"].to_pylist(), counted["row_count"].to_pylist(), strict=True))
    for image_id in sorted(counts.keys() - images.keys()):
        yield f"patches: {image_id} in {file.path} has patches, but no images row names this shard"
    for image_id, cells in images.items():
        expected, found = -(-cells // config.store.every), counts.get(image_id, 0)
        if found != expected if config.store.patches == "all" else not 0 < found <= expected:
            yield f"patches: {image_id} has {found} patches in {file.path}, its grid and the spec ask for {expected}"
    cells_seen = rows.group_by(["image_id", "row", "col"]).aggregate([("row", "count")])
    for row in cells_seen.filter(pc.greater(cells_seen["row_count"], 1)).to_pylist():
        yield f"patches: {row['image_id']} has patch ({row['row']}, {row['col']}) {row['row_count']} times"
    for column, length in zip(columns, lengths, strict=True):
        found_lengths = pc.unique(rows[length]).to_pylist()
        wanted = {config.store.pca} if config.store.pca else set(found_lengths[:1])
        if set(found_lengths) - wanted or None in found_lengths:
            yield f"patches: {column} in {file.path} has vectors of {sorted(map(str, found_lengths))} values"


def _repeated(ids: pa.ChunkedArray) -> Iterator[tuple[str, int]]:
    for entry in pc.value_counts(ids):
        if entry["counts"].as_py() > 1:
            yield entry["values"].as_py(), entry["counts"].as_py()


def _some(problems: list[str], found: Iterator[str]) -> None:
    """Add the first of many problems of a kind, and how many more there are."""
    more = 0
    for count, problem in enumerate(found):
        if count < MOST_SHOWN:
            problems.append(problem)
        else:
            more += 1
    if more:
        problems.append(f"... and {more} more like the last")
