"""Which members and extraction each set has while it is segmented: other jobs may change the images meanwhile."""

from __future__ import annotations

import pyarrow.compute as pc

from pipelines.cosegment.sets import NoSuchSets, choose_sets, set_version
from pipelines.cosegment.tasks import PendingSet
from pipelines.store.schemas import IMAGES
from pipelines.store.snapshots import Snapshot
from pipelines.store.store import Store


class SetVersions:
    """The set_version of each set in a snapshot: as it was planned, and from the images again where they changed."""

    def __init__(self, store: Store, asked: str, pending: list[PendingSet]) -> None:
        self._store = store
        self._asked = asked
        self._of_version: dict[int | None, dict[str, str]] = {
            store.images.version: {one.set_id: one.version for one in pending}
        }

    def __call__(self, current: Snapshot) -> dict[str, str]:
        version = current.version("images")
        if version not in self._of_version:
            self._of_version = {version: self._look(current)}
        return self._of_version[version]

    def _look(self, current: Snapshot) -> dict[str, str]:
        table = current.table("images", IMAGES)
        if table is None:
            return {}
        images = table.read(["image_id", "label", "shard", "run_id"])
        images = images.filter(pc.is_valid(images["shard"])).sort_by("image_id").combine_chunks()
        try:
            chosen = choose_sets(self._asked, self._store.uri, images, self._store.config.storage.options)
        except NoSuchSets:
            # there were, when this run began
            return {}
        return {set_id: set_version(images, members) for set_id, members in chosen.members.items()}
