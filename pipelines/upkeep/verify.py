"""verify: does a store hold what it says? Every images row has all its patches, no patch lacks its image, files and
logs agree, dimensions match the spec; every match has its pair; every index has its files, and the table's images."""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.errors import JobError, counted
from pipelines.results.all_kinds import all_results, check_result
from pipelines.results.stored import StoredResult
from pipelines.running.reports import JobResult, new_run_id, recorded
from pipelines.settings.sections import Config
from pipelines.store.parquet import DataFile, checked_parquet, open_parquet, why_unreadable
from pipelines.store.schemas import descriptor_columns
from pipelines.store.snapshots import snapshot
from pipelines.store.store import Store
from pipelines.store.table import Table

MOST_PROBLEMS_OF_A_KIND = 20
FILES_READ_AT_ONCE = 4
# FAISS raises RuntimeError.
UNREADABLE = (OSError, RuntimeError, pa.ArrowException, JobError)

RowsByVectorLength = dict[str, dict[str, Counter[int | None]]]
"""descriptor column -> patches file -> rows by length of vector"""


@dataclass
class Result(JobResult):
    """What verify found.

    problems: damage, a sentence each. messages: what is worth knowing and harmless. unreferenced_files: left by killed
    or replaced writes; they are harmless, and `compact` removes them.
    """

    images: int = 0
    patches: int = 0
    failures: int = 0
    files: int = 0
    unreferenced_files: int = 0
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"sound": not self.problems}


def run(config: Config, *, store: str, deep: bool = False) -> Result:
    """Check a store; reads every row of images, and the keys and descriptors of patches.

    deep: read every page of every table, and compare it with its checksum. Files written before 0.1.0 had checksums
    have none; what is damaged there is found where it cannot be unpacked.

    Raises RequestError when there is no store.
    """
    started = time.monotonic()
    opened = Store.open(store, config)
    result = Result(new_run_id(), opened.uri)
    with recorded(None, result, started):
        results = list(all_results(opened))
        _take_snapshot(opened, results, result)
        tables = {"images": opened.images, "patches": opened.patches, "failures": opened.failures}
        for one in results:
            tables |= {f"{one.path}/{name}": table for name, table in one.tables.items()}
        _check_files(tables, result)
        if deep:
            for name, table in tables.items():
                _some(result.problems, _damaged(table, name))
        # rows cannot be judged while files are missing or damaged
        if not result.problems:
            _check_rows(opened, results, result)
        result.exit_code = 1 if result.problems else 0
    return result


def _take_snapshot(store: Store, results: list[StoredResult], result: Result) -> None:
    """Have all tables as the newest transaction left them that is complete, so that rows of several can be compared."""
    listing = store.log.listing()
    if listing.newest not in listing.marked and (unfinished := store.log.read(listing.newest)):
        result.messages.append(
            f"Transaction {unfinished.number} ({unfinished.command}) is not completed: its writer is at work, or was "
            "killed, and then the next command that writes completes it."
        )
    current = snapshot(store.log)

    def taken(path: str, table: Table) -> Table:
        try:
            return current.table(path, table.schema) or table
        except JobError as error:
            result.problems.append(str(error))
            return table

    for name in store.schemas:
        store.take(name, taken(name, getattr(store, name)))
    for one in results:
        for name, table in one.tables.items():
            one.tables[name] = taken(f"{one.path}/{name}", table)


def _check_files(tables: dict[str, Table], result: Result) -> None:
    """Whether files and logs agree."""
    problems = result.problems
    for name, table in tables.items():
        files, present = table.files(), table.present_files()
        result.files += len(files)
        result.unreferenced_files += len(present.keys() - files.keys())
        missing = sorted(files.keys() - present.keys())
        _some(problems, (f"{name}: {path} is in the log, but the file is missing" for path in missing))
        _some(
            problems,
            (
                f"{name}: {path} has {present[path]} bytes, the log says {file.size}"
                for path, file in files.items()
                if present.get(path, file.size) != file.size
            ),
        )
        _some(problems, _unreadable(table, name, [file for path, file in files.items() if path in present]))


def _check_rows(store: Store, results: list[StoredResult], result: Result) -> None:
    """Whether rows agree with each other and with the spec."""
    problems = result.problems
    try:
        images = store.images.read(["image_id", "run_id", "shard", "grid_height", "grid_width"])
        failures = store.failures.read(["image_id"])["image_id"]
    except UNREADABLE as error:
        problems.append(f"images or failures cannot be read ({why_unreadable(error)})")
        return
    result.images, result.failures = len(images), len(failures)
    _some(problems, (f"images: {image_id} has {count} rows" for image_id, count in _repeated(images["image_id"])))
    _some(problems, (f"failures: {image_id} has {count} rows" for image_id, count in _repeated(failures)))
    both = failures.filter(pc.is_in(failures, value_set=images["image_id"]))
    _some(problems, (f"{image_id} is in images and in failures" for image_id in both.to_pylist()))

    patch_files = store.patches.files()
    by_shard = _images_by_shard(images)
    _some(
        problems,
        (
            f"images: {counted(len(rows), 'row')} {'names' if len(rows) == 1 else 'name'} shard {shard}, which patches "
            "does not have"
            for shard, rows in by_shard.items()
            if shard not in patch_files
        ),
    )
    lengths: RowsByVectorLength = {}
    for path, file in patch_files.items():
        result.patches += file.rows
        _some(problems, _check_shard(store.patches, file, by_shard.get(path, {}), store.config, lengths))
    _some(problems, _check_lengths(lengths, store.config))
    _some(problems, _check_embeddings(store.images, store.config))
    if store.config.store.patches == "all":
        without = images.filter(pc.is_null(images["shard"]))
        _some(problems, (f"images: {image_id} has no patches" for image_id in without["image_id"].to_pylist()))
    for one in results:
        found = check_result(store, one, images)
        _some(problems, (f"{one.path}: {problem}" for problem in found.problems))
        result.messages += found.notes
        result.files += found.files
        result.unreferenced_files += found.unreferenced_files


def _unreadable(table: Table, name: str, files: list[DataFile]) -> Iterator[str]:
    """Files whose footer cannot be read, or says other than the log and the spec do."""
    expected = _columns(_schema_as_parquet(table.schema))
    for file in files:
        fs, path = storage.filesystem(storage.join(table.uri, file.path), table.options)
        try:
            with fs.open(path, "rb") as source:
                footer = checked_parquet(source).metadata
        except UNREADABLE as error:
            yield f"{name}: {file.path} cannot be read as Parquet ({why_unreadable(error)})"
            continue
        if footer.num_rows != file.rows:
            yield f"{name}: {file.path} has {counted(footer.num_rows, 'row')}, the log says {file.rows:,}"
        columns = _columns(footer)
        if columns != expected:
            differing = ", ".join(sorted({*columns, *expected} - {*columns}.intersection(expected)))
            yield f"{name}: {file.path} has other columns than the store's spec ({differing})"
            continue
        low, high = _key_range(footer) or (file.min_id, file.max_id)
        if not file.min_id <= low <= high <= file.max_id:
            # readers skip files by this range
            yield f"{name}: {file.path} has keys {low!r} to {high!r}, the log says {file.min_id!r} to {file.max_id!r}"


def _damaged(table: Table, name: str) -> Iterator[str]:
    """Files of which a page is not what was written; those without a footer are told of elsewhere."""

    def found_in(path: str) -> str:
        try:
            with open_parquet(storage.join(table.uri, path), table.options) as parquet:
                for group in range(parquet.num_row_groups):
                    parquet.read_row_group(group)
        except UNREADABLE as error:
            return f"{name}: {path} is damaged ({why_unreadable(error)})"
        return ""

    with ThreadPoolExecutor(FILES_READ_AT_ONCE) as pool:
        yield from filter(None, pool.map(found_in, sorted(table.files().keys() & table.present_files().keys())))


def _schema_as_parquet(schema: pa.Schema) -> pq.FileMetaData:
    buffer = io.BytesIO()
    pq.write_table(schema.empty_table(), buffer)
    return pq.ParquetFile(buffer).metadata


def _columns(footer: pq.FileMetaData) -> list[str]:
    """Columns of a file with the type of their values, however lists are spelt."""
    leaves = [footer.schema.column(index) for index in range(footer.num_columns)]
    return [f"{leaf.path.partition('.')[0]} {leaf.physical_type}" for leaf in leaves]


def _key_range(footer: pq.FileMetaData) -> tuple[str, str] | None:
    """Smallest and largest image_id, from the statistics of the row groups; None for a file without rows."""
    statistics = [footer.row_group(index).column(0).statistics for index in range(footer.num_row_groups)]
    known = [one for one in statistics if one is not None and one.has_min_max]
    return (min(one.min for one in known), max(one.max for one in known)) if known else None


def _images_by_shard(images: pa.Table) -> dict[str, dict[str, tuple[int, int]]]:
    """shard -> image_id -> (grid height, grid width)."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    columns = (images[name].to_pylist() for name in ("shard", "image_id", "grid_height", "grid_width"))
    for shard, image_id, height, width in zip(*columns, strict=True):
        if shard is not None:
            found.setdefault(shard, {})[image_id] = (height or 0, width or 0)
    return found


def _check_shard(
    table: Table, file: DataFile, images: dict[str, tuple[int, int]], config: Config, lengths: RowsByVectorLength
) -> Iterator[str]:
    """Problems of one patches file: whose patches it holds, how many, where, and once each; fills in `lengths`."""
    columns = descriptor_columns(config)
    fs, path = storage.filesystem(storage.join(table.uri, file.path), table.options)
    groups = []
    previous = ""
    try:
        with fs.open(path, "rb") as source:
            parquet = checked_parquet(source)
            for index in range(parquet.num_row_groups):
                rows = parquet.read_row_group(index, columns=["image_id", "row", "col", *columns])
                for column in columns:
                    length_counts = pc.value_counts(pc.list_value_length(rows[column])).to_pylist()
                    in_file = lengths.setdefault(column, {}).setdefault(file.path, Counter())
                    in_file.update({entry["values"]: entry["counts"] for entry in length_counts})
                groups.append(rows.select(["image_id", "row", "col"]))
                ids = _runs(rows["image_id"])
                if any(later <= earlier for earlier, later in zip([previous, *ids], ids, strict=False)):
                    yield f"patches: {file.path} does not hold whole images in key order (row group {index})"
                previous = ids[-1] if ids else previous
    except UNREADABLE as error:
        yield f"patches: {file.path} cannot be read ({why_unreadable(error)})"
        return
    rows = pa.concat_tables(groups) if groups else table.schema.empty_table()
    yield from _check_grids(rows, file, images, config)


def _check_lengths(lengths: RowsByVectorLength, config: Config) -> Iterator[str]:
    """Vectors of a column are all of one length: that of the PCA, else the commonest."""
    for column, files in lengths.items():
        total = sum(files.values(), Counter())
        commonest = max(total, key=lambda length: (length is not None, total[length]), default=None)
        wanted = config.store.pca or commonest
        for path, found in files.items():
            if found.keys() - {wanted}:
                shown = ", ".join(sorted(map(str, found)))
                yield f"patches: {column} in {path} has vectors of {shown} values, the store has {wanted}"


def _runs(ids: pa.ChunkedArray) -> list[str]:
    """The image_id of each stretch of rows that belong together."""
    return [image_id or "" for image_id in pc.run_end_encode(ids.combine_chunks()).values.to_pylist()]


def _check_grids(rows: pa.Table, file: DataFile, images: dict[str, tuple[int, int]], config: Config) -> Iterator[str]:
    patch_counts = pc.value_counts(rows["image_id"])
    counts = dict(zip(patch_counts.field("values").to_pylist(), patch_counts.field("counts").to_pylist(), strict=True))
    for image_id in sorted(str(image_id) for image_id in counts.keys() - images.keys()):
        yield f"patches: {image_id} in {file.path} has patches, but no images row names this shard"
    for image_id, (height, width) in images.items():
        expected, found = -(-height * width // config.store.every), counts.get(image_id, 0)
        if found != expected if config.store.patches == "all" else not 0 < found <= expected:
            yield (
                f"patches: {image_id} has {counted(found, 'patch', 'patches')} in {file.path}, its grid and the spec "
                f"ask for {expected:,}"
            )
    at = pc.index_in(rows["image_id"], value_set=pa.array(list(images), pa.string()))
    heights = pa.array([height for height, _ in images.values()], pa.int32()).take(at)
    widths = pa.array([width for _, width in images.values()], pa.int32()).take(at)
    inside = pc.and_(_between(rows["row"], heights), _between(rows["col"], widths))
    outside = rows["image_id"].filter(pc.and_(pc.is_valid(at), pc.invert(pc.fill_null(inside, False))))
    for image_id in sorted(pc.unique(outside).to_pylist()):
        yield f"patches: {image_id} has patches outside its grid in {file.path}"
    cells = rows.group_by(["image_id", "row", "col"]).aggregate([("row", "count")])
    for cell in cells.filter(pc.greater(cells["row_count"], 1)).to_pylist():
        yield f"patches: {cell['image_id']} has patch ({cell['row']}, {cell['col']}) {cell['row_count']} times"


def _between(values: pa.ChunkedArray, ends: pa.Array) -> pa.ChunkedArray:
    return pc.and_(pc.greater_equal(values, 0), pc.less(values, ends))


def _check_embeddings(images: Table, config: Config) -> Iterator[str]:
    """Embeddings are all of one length, and missing only where the spec leaves them out."""
    ids: dict[int | None, list[str]] = {}
    for path in images.files() if config.features.embedding else ():
        try:
            rows = images.read_file(path, ["image_id", "embedding"])
        except UNREADABLE as error:
            yield f"images: {path} cannot be read ({why_unreadable(error)})"
            continue
        lengths = pc.list_value_length(rows["embedding"]).to_pylist()
        for image_id, length in zip(rows["image_id"].to_pylist(), lengths, strict=True):
            ids.setdefault(length, []).append(image_id)
    wanted = max(ids, key=lambda length: (length is not None, len(ids[length])), default=None)
    for length in ids.keys() - {wanted} if wanted else ids.keys():
        for image_id in ids[length]:
            yield f"images: {image_id} has an embedding of {length or 0} values, the store has {wanted or 0}"


def _repeated(ids: pa.ChunkedArray) -> Iterator[tuple[str, int]]:
    for entry in pc.value_counts(ids):
        if entry["counts"].as_py() > 1:
            yield entry["values"].as_py(), entry["counts"].as_py()


def _some(problems: list[str], found: Iterable[str]) -> None:
    """Add the first of many problems of a kind, and how many more there are."""
    more = 0
    for count, problem in enumerate(found):
        if count < MOST_PROBLEMS_OF_A_KIND:
            problems.append(problem)
        else:
            more += 1
    if more:
        problems.append(f"... and {more} more like the last")
