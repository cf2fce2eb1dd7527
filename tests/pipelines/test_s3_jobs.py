"""Every job with INPUT and STORE in a bucket: the same tables as on a disk, up to date afterwards, then incremental."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from deltalake import DeltaTable
from s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server
from small_runs import SMALL_MODEL, photo

pytestmark = pytest.mark.slow

JOBS: list[Any] = [
    {"index": {"name": "images"}},
    {"cluster": {"name": "words", "update": True, "settings": {"cluster": {"k": 5, "iterations": 5}}}},
    {"cosegment": {"name": "parts", "sets": "label", "settings": {"cosegment": {"num_parts": 2}}}},
    {"correspond": {"name": "nearest", "settings": {"correspond": {"pairs": "knn:2"}}}},
    "compact",
    "verify",
]
TABLES = {
    "images": ["image_id"],
    "patches": ["image_id", "row", "col"],
    "clusters/words/centroids": ["cluster_id"],
    "clusters/words/assignments": ["image_id", "row", "col"],
    "parts/parts/images": ["image_id"],
    "parts/parts/patches": ["image_id", "row", "col"],
    "matches/nearest/pairs": ["image_a", "image_b"],
    "matches/nearest/matches": ["image_a", "image_b", "rank"],
}
# where and when, not what
APART = ("uri", "source_version", "shard", "run_id", "run_id_a", "run_id_b", "extracted_at", "set_version")


def pipeline(file: Path, source: str, store: str) -> Path:
    settings: dict[str, Any] = {}
    for one in SMALL_MODEL:
        key, value = one.split("=", 1)
        section, name = key.split(".", 1)
        settings.setdefault(section, {})[name] = yaml.safe_load(value)
    content = {"store": store, "settings": settings, "jobs": [{"extract": {"input": source, "prune": True}}, *JOBS]}
    file.write_text(yaml.safe_dump(content))
    return file


def dinoray(*arguments: str, s3: S3Server, exit_code: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", "from pipelines.cli import main; main()", *arguments, "--json"],
        env=os.environ | s3.environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == exit_code, done.stderr
    for secret in (SECRET_KEY, ACCESS_KEY):
        assert secret not in done.stdout + done.stderr
    return json.loads(done.stdout)


def rows(store: str, table: str, options: dict[str, str]) -> list[dict[str, Any]]:
    """All rows in key order, without what says where and when."""
    found = pa.table(DeltaTable(f"{store}/{table}", storage_options=options).to_pyarrow_table())
    kept = found.drop_columns([name for name in APART if name in found.column_names])
    return kept.sort_by([(name, "ascending") for name in TABLES[table]]).to_pylist()


def test_all_jobs_in_a_bucket_as_on_a_disk(s3: S3Server, photos: Callable[..., Path], tmp_path: Path) -> None:
    import s3fs

    fs = s3fs.S3FileSystem(**s3.options, use_listings_cache=False)
    folder, bucket = photos(8), f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"
    fs.put(str(folder), f"{bucket}/photos", recursive=True)
    there = str(pipeline(tmp_path / "there.yaml", f"{bucket}/photos", f"{bucket}/store"))
    here = str(pipeline(tmp_path / "here.yaml", str(folder), str(tmp_path / "store")))
    reading = {**s3.environment, "AWS_ALLOW_HTTP": "true"}

    def statuses(result: dict[str, Any]) -> dict[str, str]:
        return {job["title"]: job["status"] for job in result["jobs"]}

    def compare() -> None:
        for table in TABLES:
            expected = rows(str(tmp_path / "store"), table, {})
            assert rows(f"{bucket}/store", table, reading) == expected and expected, table

    first = statuses(dinoray("run", there, s3=s3))
    assert set(first.values()) == {"done"}, first
    dinoray("run", here, s3=s3)
    compare()

    again = statuses(dinoray("run", there, s3=s3))
    assert again.pop("verify") == "done"
    assert set(again.values()) == {"unchanged"}, again

    photo(50).save(folder / "cat" / "new.jpg")
    (folder / "dog" / "0000.jpg").unlink()
    fs.put_file(str(folder / "cat" / "new.jpg"), f"{bucket}/photos/cat/new.jpg")
    fs.rm_file(f"{bucket}/photos/dog/0000.jpg")
    third = dinoray("run", there, s3=s3)
    dinoray("run", here, s3=s3)
    compare()
    assert statuses(third)["extract"] == "done", third

    found = dinoray("search", f"{bucket}/store", "images", str(folder / "cat" / "new.jpg"), "--top", "2", s3=s3)
    assert found["results"][0]["image_id"] == "cat/new.jpg"
    stats = dinoray("stats", f"{bucket}/store", s3=s3)
    assert stats["images"] == 8 and stats["clusters"]["words"]["clusters"] == 5
    assert dinoray("verify", f"{bucket}/store", s3=s3)["problems"] == []
