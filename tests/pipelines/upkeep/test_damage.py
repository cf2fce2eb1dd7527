"""Every kind of file of a store, with a bit that flipped, cut short, or gone: nobody is served another value, `verify
--deep` finds whatever changes one, and after `repair` and the jobs' own commands the store is as it was.

Read means: every row of every table, the patches of images as jobs read them, models, and a search with every image.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_clusters import use_local_workers
from small_runs import settings
from whole_stores import contents, extract, make_results, whole_store

from pipelines.errors import DinorayError
from pipelines.upkeep import repair, verify

# Of five trials three flip a bit.
WAYS = ("flip", "flip", "flip", "cut", "gone")
FOOTER_SHARE = 0.3
# Nothing reads these to answer a question.
LEFT_OUT = re.compile(r"runs/.*|.*\.published")


@dataclass(frozen=True)
class Trial:
    """What was done to a file, and its kind: its path without what is of a run."""

    kind: str
    file: str
    way: str
    at: int


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A store, and what it holds."""
    with pytest.MonkeyPatch.context() as patch:
        use_local_workers(patch)
        store = whole_store(tmp_path_factory.mktemp("template") / "store")
    return Path(store), contents(store)


def kinds_of_files(store: Path) -> dict[str, list[str]]:
    found = defaultdict(list)
    for path in sorted(one for one in store.rglob("*") if one.is_file()):
        name = str(path.relative_to(store))
        if not LEFT_OUT.fullmatch(name):
            kind = re.sub(r"part-[\w-]+\.|\d{8}T\d{6}Z-[0-9a-f]{6}", "FILE.", name)
            found[re.sub(r"\d{20}|\d+(?=\.json)", "N", kind)].append(name)
    return found


def harm(store: Path, kind: str, files: list[str], random: np.random.Generator) -> Trial:
    """Do something to a file of a kind. Footers of Parquet files are hit more often than by their size."""
    name = files[int(random.integers(len(files)))]
    path = store / name
    data = bytearray(path.read_bytes())
    way = WAYS[int(random.integers(len(WAYS)))]
    at = int(random.integers(len(data)))
    if way == "gone":
        path.unlink()
    elif way == "cut":
        path.write_bytes(data[:at])
    else:
        if name.endswith(".parquet") and random.random() < FOOTER_SHARE:
            footer = int.from_bytes(data[-8:-4], "little") + 8
            at = len(data) - 1 - int(random.integers(footer))
        data[at] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
    return Trial(kind, name, way, at)


def read(store: Path) -> tuple[dict[str, Any] | None, str]:
    """What the store holds, or the sentence that a reader gets."""
    try:
        return contents(str(store)), ""
    except DinorayError as error:
        assert len(str(error).splitlines()) == 1
        return None, str(error)


def try_trial(store: Path, expected: dict[str, Any], trial: Trial) -> str:
    """What came of it: unharmed, mended or left. Fails where a promise is broken."""
    found, sentence = read(store)
    assert found is None or found == expected, f"another value is served: {trial}"
    if found is None:
        assert "dinoray repair" in sentence or "store.json" in sentence, f"{trial}: {sentence}"
    try:
        problems = verify.run(settings(), store=str(store), deep=True).problems
    except DinorayError as error:
        assert "store.json" in str(error), trial
        return "left"
    assert problems or found is not None, f"verify does not find {trial}, of which a reader says: {sentence}"
    result = repair.run(settings(), store=str(store))
    after = verify.run(settings(), store=str(store), deep=True).problems
    assert len(after) == len(result.left), f"{trial}: {after}"
    if result.left:
        return "left"
    extract(str(store))
    make_results(str(store))
    assert contents(str(store)) == expected, f"the store is not as it was: {trial}"
    assert verify.run(settings(), store=str(store), deep=True).problems == [], trial
    return "mended" if problems else "unharmed"


@pytest.mark.parametrize(
    ("trials", "seed"),
    [(28, 0), *(pytest.param(100, seed, marks=pytest.mark.slow) for seed in range(1, 11))],
)
def test_no_damage_is_served_as_a_value_and_repair_mends_it(
    trials: int,
    seed: int,
    template: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_local_workers(monkeypatch)
    sound, expected = template
    kinds = kinds_of_files(sound)
    names, random = sorted(kinds), np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    for number in range(trials):
        kind = names[(number + seed) % len(names)]
        store = Path(shutil.copytree(sound, tmp_path / "store"))
        trial = harm(store, kind, kinds[kind], random)
        counts[try_trial(store, expected, trial)] += 1
        shutil.rmtree(store)
    assert counts["mended"] > trials / 4
    with capsys.disabled():
        said = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
        print(f"\n{trials} trials on {len(names)} kinds of files (seed {seed}): {said}; none served as another value")
