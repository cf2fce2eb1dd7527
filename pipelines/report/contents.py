"""All that a report shows, read from the store's tables and the photos, before any of it becomes a page or a plot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from pipelines.report.choose import COLUMNS, Choice
from pipelines.report.clusterings import Clustering, read_clustering
from pipelines.report.crops import Crop, Crops, Place
from pipelines.report.glance import Glance, glance
from pipelines.report.layers import (
    Layer,
    cluster_layer,
    descriptor_layer,
    layers_in_order,
    saliency_layer,
    segment_layers,
)
from pipelines.report.live import Live, make_live
from pipelines.report.matched_pairs import MatchedPair, read_pairs
from pipelines.report.nearest_photos import Neighbours, nearest_photos, shown_besides
from pipelines.report.patches import read_patches
from pipelines.report.photos import Photo, PhotoSource, fitted, read_photos
from pipelines.report.segments import read_segments
from pipelines.results.clusters import ClusterTables
from pipelines.results.matches import MatchTables
from pipelines.results.parts import PartTables
from pipelines.settings.sections import Config
from pipelines.store.rows import rows_of
from pipelines.store.store import Store

# The kinds are clusters/NAME, parts/NAME and matches/NAME.
MAX_NAMES_PER_KIND = 4
# Photos that are only among the nearest of others are smaller.
NEIGHBOUR_SIDE_PIXELS = 160

_Tables = TypeVar("_Tables")


@dataclass(frozen=True)
class Results:
    """The results of jobs that a store has, by NAME."""

    clusters: dict[str, ClusterTables]
    parts: dict[str, PartTables]
    matches: dict[str, MatchTables]

    @classmethod
    def of(cls, store: Store) -> Results:
        options = store.config.storage.options
        return cls(
            _first(ClusterTables.all_in(store.uri, options)),
            _first(PartTables.all_in(store.uri, options)),
            _first(MatchTables.all_in(store.uri, options)),
        )


@dataclass(frozen=True)
class Shown:
    """An image of the report, with its size in pixels of the original."""

    image_id: str
    label: str | None
    width: int
    height: int
    photo: Photo


@dataclass(frozen=True)
class Contents:
    """Everything that the page and the plots show.

    images: those that were chosen, in order. others: those that are only among the nearest of some, by image_id.
    places: the boxes of the live view's grids, in pixels of the originals. step: every step-th row and column is left
    in the coarsest of these grids. most_clusters: how many clusters have a card. pairs: by NAME.
    """

    store: str
    how: str
    glance: Glance
    images: list[Shown]
    others: dict[str, Shown]
    layers: list[Layer]
    live: Live | None
    places: dict[str, tuple[float, float, float, float]]
    step: int
    clusterings: list[Clustering]
    most_clusters: int
    crops: dict[Place, Crop]
    pairs: dict[str, list[MatchedPair]]
    neighbours: list[Neighbours]

    @property
    def without_photo(self) -> int:
        return sum(one.photo.jpeg is None for one in self.images)


def read_contents(store: Store, config: Config, choice: Choice, results: Results) -> Contents:
    """Raises what reading tables raises; a photo that cannot be had is shown as missing."""
    settings, options = config.report, store.config.storage.options
    rows, ids = choice.rows, choice.image_ids
    about = {row["image_id"]: row for row in rows.drop_columns(["embedding"]).to_pylist()}
    patches = read_patches(store, rows, settings)
    grids = {one: (row["grid_height"], row["grid_width"]) for one, row in about.items()}
    clusterings = [
        found for name, tables in results.clusters.items() if (found := read_clustering(name, tables, grids))
    ]
    sizes = {one: (row["width"], row["height"]) for one, row in about.items()}
    small = {one: fitted(*size, settings.photo_side) for one, size in sizes.items()}
    layers: list[Layer | None] = [descriptor_layer(patches, settings.seed), saliency_layer(patches)]
    for at, (name, two) in enumerate(results.parts.items()):
        layers += segment_layers(at, name, read_segments(two, small), sizes)
    layers += [cluster_layer(at, one, patches) for at, one in enumerate(clusterings) if one.grids]
    pairs = {name: read_pairs(found, ids, settings.pairs) for name, found in results.matches.items()}
    neighbours = nearest_photos(store, rows, settings)

    crops = Crops(clusterings, settings.clusters, patches)
    most_pixels = store.config.image.max_pixels
    photos = read_photos(
        [_source(row) for row in about.values()], settings.photo_side, most_pixels, options, crops.look
    )
    besides = rows_of(store.images, shown_besides(neighbours, ids), COLUMNS[:-2]).to_pylist()
    others = read_photos([_source(row) for row in besides], NEIGHBOUR_SIDE_PIXELS, most_pixels, options)
    return Contents(
        store=store.uri,
        how=choice.how,
        glance=glance(store, config),
        images=[_shown(row, photo) for row, photo in zip(about.values(), photos, strict=True)],
        others={row["image_id"]: _shown(row, photo) for row, photo in zip(besides, others, strict=True)},
        layers=layers_in_order(layers),
        live=make_live(patches, {one: row["label"] for one, row in about.items()}, settings),
        places={one: found.thinned_place for one, found in patches.items()},
        step=max((one.step for one in patches.values()), default=1),
        clusterings=clusterings,
        most_clusters=settings.clusters,
        crops=crops.found,
        pairs=pairs,
        neighbours=neighbours,
    )


def _source(row: dict[str, Any]) -> PhotoSource:
    return PhotoSource(row["image_id"], row["uri"], row["width"], row["height"])


def _shown(row: dict[str, Any], photo: Photo) -> Shown:
    return Shown(row["image_id"], row["label"], row["width"], row["height"], photo)


def _first(found: dict[str, _Tables]) -> dict[str, _Tables]:
    return dict(list(found.items())[:MAX_NAMES_PER_KIND])
