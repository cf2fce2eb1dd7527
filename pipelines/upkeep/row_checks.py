"""Whether the rows of images, patches and failures agree with each other and with the spec."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import counted
from pipelines.settings.sections import Config
from pipelines.store.findings import Finding, Mend, Reconcile, RemoveFile, RemoveRows
from pipelines.store.parquet import DataFile, open_parquet
from pipelines.store.schemas import descriptor_columns
from pipelines.store.store import Store
from pipelines.store.table import Table

IMAGE_COLUMNS = ["image_id", "run_id", "shard", "grid_height", "grid_width"]

RowsByVectorLength = dict[str, dict[str, Counter[int | None]]]
"""descriptor column -> patches file -> rows by length of vector"""


def check_rows(store: Store, images: pa.Table) -> Iterator[Finding]:
    """What is wrong with the rows of a store whose files can be read. images: IMAGE_COLUMNS of every image."""
    failures = store.failures.read(["image_id"])["image_id"]
    for image_id, count in _repeated(images["image_id"]):
        yield _image(f"images: {image_id} has {count} rows", image_id)
    for image_id, count in _repeated(failures):
        yield _failure(f"failures: {image_id} has {count} rows", image_id)
    both = failures.filter(pc.is_in(failures, value_set=images["image_id"]))
    for image_id in both.to_pylist():
        yield _failure(f"{image_id} is in images and in failures", image_id)

    patch_files = store.patches.files()
    by_shard = _images_by_shard(images)
    for shard, rows in by_shard.items():
        if shard not in patch_files:
            name = f"{counted(len(rows), 'row')} {'names' if len(rows) == 1 else 'name'} shard {shard}"
            yield Finding("rows", "images", f"images: {name}, which patches does not have", Reconcile("images"))
    lengths: RowsByVectorLength = {}
    for path, file in patch_files.items():
        yield from _check_shard(store.patches, file, by_shard.get(path, {}), store.config, lengths)
    yield from _check_lengths(lengths, store.config)
    yield from _check_embeddings(store.images, store.config)
    if store.config.store.patches == "all":
        without = images.filter(pc.is_null(images["shard"]))
        for image_id in without["image_id"].to_pylist():
            yield _image(f"images: {image_id} has no patches", image_id)


def _image(sentence: str, image_id: str) -> Finding:
    return Finding("rows", "images", sentence, RemoveRows("images", frozenset([image_id])))


def _failure(sentence: str, image_id: str) -> Finding:
    return Finding("rows", "failures", sentence, RemoveRows("failures", frozenset([image_id])))


def _patches(sentence: str, mend: Mend) -> Finding:
    return Finding("rows", "patches", f"patches: {sentence}", mend)


def _patches_of(image_id: str, sentence: str) -> Finding:
    return _patches(f"{image_id} {sentence}", RemoveRows("patches", frozenset([image_id])))


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
) -> Iterator[Finding]:
    """Problems of one patches file: whose patches it holds, how many, where, and once each; fills in `lengths`."""
    columns = descriptor_columns(config)
    groups = []
    previous = ""
    with open_parquet(table.place(file.path), table.options) as parquet:
        for index in range(parquet.num_row_groups):
            rows = parquet.read_row_group(index, columns=["image_id", "row", "col", *columns])
            for column in columns:
                length_counts = pc.value_counts(pc.list_value_length(rows[column])).to_pylist()
                in_file = lengths.setdefault(column, {}).setdefault(file.path, Counter())
                in_file.update({entry["values"]: entry["counts"] for entry in length_counts})
            groups.append(rows.select(["image_id", "row", "col"]))
            ids = _runs(rows["image_id"])
            if any(later <= earlier for earlier, later in zip([previous, *ids], ids, strict=False)):
                sentence = f"{file.path} does not hold whole images in key order (row group {index})"
                yield _patches(sentence, RemoveFile("patches", file.path))
            previous = ids[-1] if ids else previous
    rows = pa.concat_tables(groups) if groups else table.schema.empty_table()
    yield from _check_grids(rows, file, images, config)


def _check_lengths(lengths: RowsByVectorLength, config: Config) -> Iterator[Finding]:
    """Vectors of a column are all of one length: that of the PCA, else the commonest."""
    for column, files in lengths.items():
        total = sum(files.values(), Counter())
        commonest = max(total, key=lambda length: (length is not None, total[length]), default=None)
        wanted = config.store.pca or commonest
        for path, found in files.items():
            if found.keys() - {wanted}:
                shown = ", ".join(sorted(map(str, found)))
                sentence = f"{column} in {path} has vectors of {shown} values, the store has {wanted}"
                yield _patches(sentence, RemoveFile("patches", path))


def _runs(ids: pa.ChunkedArray) -> list[str]:
    """The image_id of each stretch of rows that belong together."""
    return [image_id or "" for image_id in pc.run_end_encode(ids.combine_chunks()).values.to_pylist()]


def _check_grids(
    rows: pa.Table, file: DataFile, images: dict[str, tuple[int, int]], config: Config
) -> Iterator[Finding]:
    patch_counts = pc.value_counts(rows["image_id"])
    counts = dict(zip(patch_counts.field("values").to_pylist(), patch_counts.field("counts").to_pylist(), strict=True))
    for image_id in sorted(str(image_id) for image_id in counts.keys() - images.keys()):
        sentence = f"{image_id} in {file.path} has patches, but no images row names this shard"
        yield _patches(sentence, Reconcile("patches"))
    for image_id, (height, width) in images.items():
        expected, found = -(-height * width // config.store.every), counts.get(image_id, 0)
        if found != expected if config.store.patches == "all" else not 0 < found <= expected:
            held = f"has {counted(found, 'patch', 'patches')} in {file.path}"
            yield _patches_of(image_id, f"{held}, its grid and the spec ask for {expected:,}")
    at = pc.index_in(rows["image_id"], value_set=pa.array(list(images), pa.string()))
    heights = pa.array([height for height, _ in images.values()], pa.int32()).take(at)
    widths = pa.array([width for _, width in images.values()], pa.int32()).take(at)
    inside = pc.and_(_between(rows["row"], heights), _between(rows["col"], widths))
    outside = rows["image_id"].filter(pc.and_(pc.is_valid(at), pc.invert(pc.fill_null(inside, False))))
    for image_id in sorted(pc.unique(outside).to_pylist()):
        yield _patches_of(image_id, f"has patches outside its grid in {file.path}")
    cells = rows.group_by(["image_id", "row", "col"]).aggregate([("row", "count")])
    for cell in cells.filter(pc.greater(cells["row_count"], 1)).to_pylist():
        yield _patches_of(cell["image_id"], f"has patch ({cell['row']}, {cell['col']}) {cell['row_count']} times")


def _between(values: pa.ChunkedArray, ends: pa.Array) -> pa.ChunkedArray:
    return pc.and_(pc.greater_equal(values, 0), pc.less(values, ends))


def _check_embeddings(images: Table, config: Config) -> Iterator[Finding]:
    """Embeddings are all of one length, and missing only where the spec leaves them out."""
    ids: dict[int | None, list[str]] = {}
    for path in images.files() if config.features.embedding else ():
        rows = images.read_file(path, ["image_id", "embedding"])
        lengths = pc.list_value_length(rows["embedding"]).to_pylist()
        for image_id, length in zip(rows["image_id"].to_pylist(), lengths, strict=True):
            ids.setdefault(length, []).append(image_id)
    wanted = max(ids, key=lambda length: (length is not None, len(ids[length])), default=None)
    for length in ids.keys() - {wanted} if wanted else ids.keys():
        for image_id in ids[length]:
            yield _image(
                f"images: {image_id} has an embedding of {length or 0} values, the store has {wanted or 0}", image_id
            )


def _repeated(ids: pa.ChunkedArray) -> Iterator[tuple[str, int]]:
    counts: Iterable[dict[str, int]] = pc.value_counts(ids).to_pylist()
    for entry in counts:
        if entry["counts"] > 1:
            yield str(entry["values"]), entry["counts"]
