"""What `estimate` says against what `extract` then takes: bytes, and the time of the whole command.

    python -m benchmarks.estimate            (ten minutes on two cores)

Apart from `make bench`, like scale and pretrained, for its time.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from benchmarks.photos import describe_sources, photo_folder
from benchmarks.results import Row, report
from pipelines import extract
from pipelines.extract import estimate
from pipelines.settings.loading import load_config
from pipelines.store.store import Store

WORK = Path(__file__).with_name("work") / "estimate"
# what -> (images, settings): descriptors that compress well and badly, a model that is slow and one that is quick
CASES: dict[str, tuple[int, list[str]]] = {
    "ViT-S/16": (1200, ["model.name=dino_vits16"]),
    "ViT-Ti/16, stride 8, int8": (600, ["model.name=dinoray_tiny", "features.stride=8", "store.dtype=int8"]),
    "ViT-Ti/16, pca 64, salient patches": (
        3000,
        ["model.name=dinoray_tiny", "store.pca=64", "store.patches=salient"],
    ),
}
BYTES_OFF, SECONDS_OFF = 0.2, 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="an eighth of the images: to see that it runs")
    share = 8 if parser.parse_args().quick else 1
    rows = [row for name, (images, settings) in CASES.items() for row in _compare(name, images // share, settings)]
    shutil.rmtree(WORK, ignore_errors=True)
    report(f"estimate against extract, |said / taken - 1| ({describe_sources()})", rows)


def _compare(name: str, images: int, settings: list[str]) -> list[Row]:
    shutil.rmtree(WORK, ignore_errors=True)
    weights = "pretrained" if "model.name=dinoray_tiny" in settings else "random"
    config = load_config(overrides=[f"model.weights={weights}", "model.device=cpu", *settings])
    folder, uri = photo_folder(WORK / "photos", images), str(WORK / "store")
    said = estimate.run(config, input=str(folder), store=uri)
    taken = extract.run(config, input=str(folder), store=uri)
    store = Store.open(uri, config)
    size = sum(file.size for table in (store.images, store.patches) for file in table.files().values())
    promised, seconds = sum(said.bytes.values()), taken.seconds["total"]
    return [
        Row(
            f"bytes, {name}",
            abs(promised / size - 1),
            f"<= {BYTES_OFF}",
            f"said {promised / 2**20:.1f} MiB, taken {size / 2**20:.1f} MiB, {images:,} images",
        ),
        Row(
            f"seconds, {name}",
            abs(said.hours * 3600 / seconds - 1),
            f"<= {SECONDS_OFF}",
            f"said {said.hours * 3600:.0f} s, taken {seconds:.0f} s; "
            f"{said.images_per_second:.1f} and {taken.steady_images_per_second:.1f} images/s",
        ),
    ]


if __name__ == "__main__":
    main()
