"""A store: its spec, its three extraction tables, and what is left to do for a listing."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import re
from collections.abc import Iterator
from functools import cached_property
from importlib import metadata
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.errors import JobError, RequestError
from pipelines.settings.loading import make_config
from pipelines.settings.sections import Config
from pipelines.storage.errors import explain_write_error
from pipelines.store.extraction import Plan
from pipelines.store.failures import STORAGE_ERROR
from pipelines.store.mending import mend
from pipelines.store.new_tables import make_tables
from pipelines.store.publishing import complete_properties
from pipelines.store.schemas import FAILURES, IMAGES, SCHEMA_VERSION, descriptor_columns, patches_schema
from pipelines.store.spec import fingerprint, make_spec, spec_differences
from pipelines.store.table import Table, open_table
from pipelines.store.transaction_log import TransactionLog
from pipelines.store.transactions import open_for_writing

# delta-rs decodes the first, takes the second for a slash and refuses the others; in a URL, # and ? end the path.
_AMBIGUOUS_LOCALLY = re.compile(r"%[0-9A-Fa-f]{2}|\\|[\x00-\x1f\x7f]")
_AMBIGUOUS_REMOTELY = re.compile(rf"{_AMBIGUOUS_LOCALLY.pattern}|[#?]")


class Store:
    """An open store. `images`, `patches` and `failures` are Delta tables at the version last refreshed."""

    def __init__(self, uri: str, config: Config, description: dict[str, Any]) -> None:
        self.uri = uri
        self.config = config
        self.spec: dict[str, Any] = description["spec"]
        self.fingerprint: str = description["fingerprint"]
        self._opened: dict[str, Table] = {}
        self._stale: set[str] = set()

    # opened on demand: jobs that read embeddings never need patches, and one that checks a store or repairs it goes on
    # without a table whose log is lost

    @property
    def images(self) -> Table:
        return self._table("images")

    @property
    def patches(self) -> Table:
        return self._table("patches")

    @property
    def failures(self) -> Table:
        return self._table("failures")

    @cached_property
    def schemas(self) -> dict[str, pa.Schema]:
        """Of the tables of the extraction, by name."""
        return {"patches": patches_schema(self.config), "images": IMAGES, "failures": FAILURES}

    def take(self, name: str, table: Table) -> None:
        """Have a table at another version, such as that of a snapshot, until the next refresh."""
        self._opened[name] = table
        self._stale.discard(name)

    def refresh(self) -> None:
        """See what others committed: tables are brought up to date when they are next asked for."""
        self._stale = set(self._opened)

    def _table(self, name: str) -> Table:
        """Raises JobError for one that is not there."""
        if name in self._stale:
            self._opened[name].refresh()
            self._stale.discard(name)
        if name not in self._opened:
            table = open_table(storage.join(self.uri, name), self.schemas[name], self.config.storage.options)
            if table is None:
                raise JobError(
                    f"The store {self.uri} has no table {name}: its log is gone, or the first run was killed before it "
                    f"made it. Restore it from a copy, or run `dinoray extract INPUT {self.uri}`."
                )
            self._opened[name] = table
        return self._opened[name]

    @cached_property
    def log(self) -> TransactionLog:
        """What `transact` writes changes of this store to."""
        return _log_of(self.uri, self.config)

    @classmethod
    def open_existing(cls, uri: str, config: Config) -> Store | None:
        """The store at `uri`, whose spec must be that of `config`; None when there is none yet.

        Raises:
            RequestError: a store with another spec, a place that holds something else, weights that do not exist.
        """
        uri = storage.normalise(uri)
        refuse_memory(uri, "STORE")
        _refuse_ambiguous(uri)
        spec = make_spec(config)
        stored = read_description(uri, config)
        if stored is None:
            _refuse_other_content(uri, config)
            return None
        if differing := spec_differences(stored["spec"], spec):
            raise RequestError(
                f"The store {uri} was made with another spec ({'; '.join(differing)}): "
                "give the stored settings again, or another STORE for these."
            )
        return cls(uri, config, stored)

    @classmethod
    def create(cls, uri: str, config: Config) -> Store:
        """A new store at `uri`; of two runs that create one together the first decides the spec.

        Raises JobError for a place that cannot be written.
        """
        uri = storage.normalise(uri)
        spec = make_spec(config)
        description = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": fingerprint(spec),
            "spec": spec,
            "created_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "created_by": f"dinoray {metadata.version('dinoray')}",
        }
        try:
            data = json.dumps(description, indent=2).encode()
            storage.write_once(storage.join(uri, "store.json"), data, config.storage.options)
        except OSError as error:
            explained = explain_write_error(error, uri) or storage.explain_failed_storage(error, uri)
            raise explained or JobError(f"The store {uri} cannot be created: {error}.") from None
        store = cls.open_existing(uri, config)
        assert store is not None
        store.make_tables()
        return store

    @classmethod
    def open(cls, uri: str, config: Config) -> Store:
        """An existing store, read with its own spec; `config` gives the storage options.

        Raises RequestError when there is no store at `uri`.
        """
        uri = storage.normalise(uri)
        refuse_memory(uri, "STORE")
        _refuse_ambiguous(uri)
        stored = read_description(uri, config)
        if stored is None:
            raise RequestError(
                f"There is no store at {uri} (no store.json): make one with `dinoray extract INPUT {uri}`."
            )
        return cls(uri, config_of(stored, config), stored)

    @classmethod
    def open_for_writing(cls, uri: str, config: Config) -> Store:
        """As `open`, for a job that changes the store: what a dead writer left half published is published first.

        Raises RequestError when there is no store at `uri`, JobError where it cannot be written.
        """
        store = cls.open(uri, config)
        store.complete()
        return store

    def complete(self) -> None:
        """Publish what a dead writer left half published; nothing is written to a store that is well.

        Raises JobError where it cannot be written, RequestError where a newer dinoray wrote the last transaction.
        """
        with self._write_errors_explained():
            open_for_writing(self.log)
            self.refresh()

    def make_tables(self) -> None:
        """Make the tables that are not there: other tools are to find every one, even an empty one.

        Raises JobError for a table whose log is gone while its files are there, or where the store cannot be written.
        """
        with self._write_errors_explained():
            make_tables(self.log, self.schemas, "extract")

    @contextlib.contextmanager
    def _write_errors_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            explained = explain_write_error(error, self.uri) or storage.explain_failed_storage(error, self.uri)
            raise explained or error from None

    def requires(
        self,
        what: str,
        *,
        images: bool = False,
        patches: bool = False,
        whole_grid: bool = False,
        saliency: bool = False,
        embedding: bool = False,
        descriptor: tuple[str, str] | None = None,
        instead: str = "",
    ) -> None:
        """Refuse what this store cannot be used for, in the same words for every job.

        Args:
            what: needs it, as a sentence calls it: "matching", "cluster.salient_only".
            images: at least one. patches: some of every image. whole_grid: all of them. saliency: of patches.
            embedding: of images.
            descriptor: a setting and the column that it asks for, such as ("cluster.descriptor", "descriptor_key9").
            instead: another way out than extracting again, such as "give --of embeddings".

        Raises RequestError for the first thing that is lacking.
        """
        lacking = next(self._lacking(patches, whole_grid, saliency, embedding), None)
        if lacking:
            has_not, needs, setting = lacking
            again = f"{instead + ', or ' if instead else ''}extract into another store with {setting}"
            raise RequestError(f"The store {self.uri} {has_not}, but {what} needs {needs}: {again}.")
        if descriptor and descriptor[1] not in (columns := descriptor_columns(self.config)):
            raise RequestError(
                f"{descriptor[0]} is {descriptor[1]}, but the store's patches have {', '.join(columns)}: give one of "
                "these, or extract into another store with features.extra."
            )
        if images and not self.images.files():
            raise RequestError(f"The store {self.uri} has no images yet: run `dinoray extract INPUT {self.uri}` first.")

    def _lacking(
        self, patches: bool, whole_grid: bool, saliency: bool, embedding: bool
    ) -> Iterator[tuple[str, str, str]]:
        """(what the store has not, how that is called, the setting with which it would)."""
        stored, features = self.config.store, self.config.features
        if patches and stored.patches == "none":
            yield "has no patches (store.patches=none)", "patches", "store.patches=all"
        if whole_grid and (stored.patches != "all" or stored.every > 1):
            kept = f"store.patches={stored.patches}" if stored.patches != "all" else f"store.every={stored.every}"
            yield f"does not hold the whole grid of patches ({kept})", "it", "store.patches=all and store.every=1"
        if saliency and not features.saliency:
            yield "has no saliency (features.saliency=false)", "saliency", "features.saliency=true"
        if embedding and not features.embedding:
            yield "has no embeddings (features.embedding=false)", "embeddings", "features.embedding=true"

    def repair(self, run_id: str) -> dict[str, int]:
        """Publish what a dead writer left, and mend what kills left before there were transactions; see `mend`."""
        complete_properties(self.log, ["images", "patches", "failures"])
        self.refresh()
        return mend(self, run_id)

    def failed_in_listing(self) -> set[str]:
        """image_ids of failures from the time of listing: files that were missing, tars that were damaged."""
        failed = self.failures.read(["image_id", "stage"])
        return set(failed["image_id"].filter(pc.equal(failed["stage"], "list")).to_pylist())

    def plan(self, listing: pa.Table, *, retry_failed: bool = False, limit: int | None = None) -> Plan:
        """What `listing` (sources.LISTING_SCHEMA) asks of this store: the anti-join with what is done."""
        images = self.images.read(["image_id", "source_size", "source_version"])
        at = pc.index_in(listing["image_id"], value_set=images["image_id"])
        known = pc.is_valid(at)
        same = pc.and_(
            pc.equal(images["source_size"].take(at), listing["source_size"]),
            pc.equal(images["source_version"].take(at), listing["source_version"]),
        )
        done = pc.fill_null(pc.and_(known, same), False)

        failures = self.failures.read(["image_id", "source_version", "error"])
        recorded = failures["image_id"]
        failures = failures.filter(pc.not_equal(failures["error"], STORAGE_ERROR))
        at_failure = pc.index_in(listing["image_id"], value_set=failures["image_id"])
        same_failure = pc.equal(failures["source_version"].take(at_failure), listing["source_version"])
        failed = pc.and_(pc.fill_null(same_failure, False), pc.invert(done))

        left = pc.invert(done) if retry_failed else pc.invert(pc.or_(done, failed))
        pending = listing.filter(left)
        changed = listing["image_id"].filter(pc.and_(left, known))
        if limit is not None:
            pending = pending.slice(0, limit)
            changed = changed.filter(pc.is_in(changed, value_set=pending["image_id"]))
        pending = pending.append_column("position", pa.array(range(len(pending)), pa.int64()))
        listed = listing["image_id"]
        return Plan(
            pending=pending,
            changed=set(changed.to_pylist()),
            done=pc.sum(done).as_py() or 0,
            failed_before=pc.sum(failed).as_py() or 0,
            gone=[
                *images["image_id"].filter(pc.invert(pc.is_in(images["image_id"], value_set=listed))).to_pylist(),
                *recorded.filter(pc.invert(pc.is_in(recorded, value_set=listed))).to_pylist(),
            ],
            seen=frozenset(self.images.files()),
        )


def _log_of(uri: str, config: Config) -> TransactionLog:
    return TransactionLog(uri, config.storage.options, retention_hours=config.compact.retention_hours)


def read_description(uri: str, config: Config) -> dict[str, Any] | None:
    """store.json, or None.

    Raises JobError when it is damaged, RequestError where no store can be or when a newer dinoray wrote it.
    """
    try:
        stored = storage.read_json(storage.join(uri, "store.json"), config.storage.options)
    except NotADirectoryError:
        fs, path = storage.filesystem(uri, config.storage.options)
        what = "is a file" if fs.isfile(path) else "lies below a file"
        raise RequestError(f"STORE {uri} {what}: give a folder or prefix for the store.") from None
    except PermissionError:
        raise RequestError(f"STORE {uri} cannot be read (permission denied): check the permissions.") from None
    if stored is None:
        return None
    if not {"spec", "fingerprint", "schema_version"} <= stored.keys():
        raise JobError(f"{uri}/store.json is not a store's description: it was damaged or written by something else.")
    if stored["schema_version"] > SCHEMA_VERSION:
        raise RequestError(
            f"The store {uri} was written by a newer dinoray (schema {stored['schema_version']}, this one knows "
            f"{SCHEMA_VERSION}): update dinoray."
        )
    if fingerprint(stored["spec"]) != stored["fingerprint"]:
        raise JobError(
            f"{uri}/store.json is damaged (its spec has another fingerprint than it says): restore it from a copy."
        )
    return stored


def config_of(stored: dict[str, Any], config: Config) -> Config:
    """The configuration that made a store, with the run and storage settings of `config`."""
    spec = {section: dict(values) for section, values in stored["spec"].items()}
    spec["features"].pop("rope", None)
    if not spec["image"].get("shorter_side"):
        spec["image"].pop("shorter_side", None)
    return make_config({**spec, **config.model_dump(include={"run", "storage", "compact"})})


def refuse_memory(uri: str, what: str) -> None:
    if uri.startswith("memory://"):
        raise RequestError(
            f"{what} {uri} exists only inside one process, and Ray's workers are other processes: give a folder or a "
            "bucket."
        )


def _refuse_ambiguous(uri: str) -> None:
    """Paths that fsspec and delta-rs read differently: files and logs would lie in different folders."""
    unsafe = _AMBIGUOUS_LOCALLY if storage.is_local(uri) else _AMBIGUOUS_REMOTELY
    if found := unsafe.search(uri.partition("://")[2] or uri):
        raise RequestError(
            f"STORE {uri!r} has {found[0]!r} in its path, which not every reader of tables takes literally: give a "
            "path without it."
        )


def _refuse_other_content(uri: str, config: Config) -> None:
    """A folder that is not a store is not written into: it may be INPUT given in the wrong place."""
    fs, path = storage.filesystem(uri, config.storage.options)
    try:
        if fs.isfile(path):
            raise RequestError(f"STORE {uri} is a file: give a folder or prefix for the store.")
        content = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return
    except PermissionError:
        raise RequestError(f"STORE {uri} cannot be read (permission denied): check the permissions.") from None
    content = [name for name in content if not name.endswith(".partial") and name != path.rsplit("/", 1)[-1]]
    if content:
        raise RequestError(
            f"STORE {uri} is not empty and is not a dinoray store (it holds {', '.join(sorted(content)[:3])}"
            f"{', ...' if len(content) > 3 else ''}): give an empty or new place."
        )
