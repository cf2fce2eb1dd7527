"""The first look: features of real photographs that installed packages carry, and a query over them.

    make demo

Uses DINO's own weights when the model hub can be reached. Without it the demo says so and goes on with dinoray_tiny,
the small weights that come with dinoray.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import duckdb
import skimage.data
import sklearn.datasets
from deltalake import DeltaTable

import dinoray

HERE = Path("demo")
PHOTOS = {
    "animal": ["chelsea.png", "horse.png"],
    "machine": ["motorcycle_left.png", "motorcycle_right.png", "rocket.jpg"],
    "person": ["astronaut.png", "camera.png"],
    "table": ["coffee.png", "coins.png", "clock_motion.png"],
    "texture": ["brick.png", "grass.png", "gravel.png"],
}

QUERY = """
    SELECT i.label, i.image_id, i.width, i.height, round(p.y) AS y, round(p.x) AS x
    FROM images AS i JOIN patches AS p USING (image_id)
    QUALIFY row_number() OVER (PARTITION BY image_id ORDER BY p.saliency DESC) = 1
    ORDER BY i.image_id
"""


def collect_photos(folder: Path) -> Path:
    """Copy photographs of scikit-image and scikit-learn into a folder per kind."""
    package = Path(skimage.data.__file__).parent
    for label, names in PHOTOS.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copy2(package / name, folder / label / name)
    package = Path(sklearn.datasets.__file__).parent / "images"
    (folder / "scene").mkdir(parents=True, exist_ok=True)
    for name in ("china.jpg", "flower.jpg"):
        shutil.copy2(package / name, folder / "scene" / name)
    return folder


def main() -> None:
    photos, store = collect_photos(HERE / "photos"), str(HERE / "store")
    if (HERE / "store").exists():
        shutil.rmtree(HERE / "store")  # the demo starts from nothing each time; a real store only ever grows
    asked: dict[str, str] = {}
    try:
        result = dinoray.extract(str(photos), store)
    except dinoray.ModelError as error:
        print(f"The model hub cannot be reached ({error}).")
        print(
            "Going on with dinoray_tiny: a small ViT-Ti/16 trained by `dinoray train` on 9,469 photos of ten kinds, "
            "good for trying things out and for testing, not for real work.\n"
        )
        asked = {"model.name": "dinoray_tiny"}
        result = dinoray.extract(str(photos), store, settings=asked)

    print(
        " ".join(
            [f"$ dinoray extract {photos} {store}", *(f"--set {setting}={value}" for setting, value in asked.items())]
        )
    )
    seconds = result.seconds["total"]
    print(f"{result.extracted} photographs, {result.failed} failures, {seconds:.0f} s ({result.device})")
    print(f"\n{store}/images    one row per photograph: sizes, label, embedding")
    print(f"{store}/patches   one row per patch: place, saliency, descriptor")
    print(f"\nWhere each photograph is most salient (images and patches are the store's tables in DuckDB):\n{QUERY}")
    database = duckdb.connect()
    for table in ("images", "patches"):
        # Through the table's log: a glob over its files would also find those that were replaced.
        database.register(table, DeltaTable(f"{store}/{table}").to_pyarrow_dataset())
    print(database.sql(QUERY))


if __name__ == "__main__":
    main()
