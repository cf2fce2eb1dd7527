"""From bucket to bucket through a real S3 server: listing, fetching, whole runs, and what goes wrong."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import uuid
from pathlib import Path
from typing import Any

import extraction_here
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import ACCESS_KEY, BUCKET, REGION, SECRET_KEY, S3Server
from small_runs import SMALL_MODEL, as_options, photo

from pipelines.sources import Listing, fetch, list_images


@pytest.fixture
def fs(s3: S3Server) -> Any:
    import s3fs

    return s3fs.S3FileSystem(**s3.options, use_listings_cache=False)


@pytest.fixture
def place() -> str:
    """A prefix of its own for each test."""
    return f"{BUCKET}/{uuid.uuid4().hex[:12]}"


def rows_of(listing: Listing, s3: S3Server) -> dict[str, tuple[str | None, bytes | None]]:
    """image_id -> (label, what is fetched)."""
    table = listing.table
    fetched = [one.data for one in fetch(table, storage_options=s3.options, backoff_s=0.01)]
    return dict(zip(table["image_id"].to_pylist(), zip(table["label"].to_pylist(), fetched, strict=True), strict=True))


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    photo(seed).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def test_a_prefix_is_listed_with_labels_sizes_and_etags(s3: S3Server, fs: Any, place: str) -> None:
    files = {"top.jpg": b"1", "cat/a.jpg": b"22", "cat/deep/b.png": b"333", "dog/c.jpg": b"", "dog/notes.txt": b"x"}
    for name, data in files.items():
        fs.pipe_file(f"{place}/in/{name}", data)
    fs.pipe_file(f"{place}/input/other.jpg", b"a neighbour whose name begins alike")
    for asked in (f"s3://{place}/in", f"s3://{place}/in/"):
        listing = list_images(asked, storage_options=s3.options)
        assert listing.kind == "directory" and listing.skipped == {".txt": 1}
        assert rows_of(listing, s3) == {
            "cat/a.jpg": ("cat", b"22"),
            "cat/deep/b.png": ("deep", b"333"),
            "dog/c.jpg": ("dog", b""),
            "top.jpg": (None, b"1"),
        }
        for row in listing.table.to_pylist():
            info = fs.info(f"{place}/in/{row['image_id']}")
            assert (row["source_size"], row["source_version"]) == (info["size"], info["ETag"].strip('"'))
            assert row["uri"] == f"s3://{place}/in/{row['image_id']}"
    whole = list_images(f"s3://{place}", storage_options=s3.options, exclude=f"s3://{place}/in")
    assert whole.table["image_id"].to_pylist() == ["input/other.jpg"]


def test_what_was_added_or_changed_is_seen_by_the_same_process(s3: S3Server, fs: Any, place: str) -> None:
    fs.pipe_file(f"{place}/in/a.jpg", b"old")
    fs.pipe_file(f"{place}/in/t.tar", tar_of({"x.jpg": b"old"}))
    first = list_images(f"s3://{place}/in", storage_options=s3.options)
    assert rows_of(first, s3) == {"a.jpg": (None, b"old"), "t.tar/x.jpg": (None, b"old")}
    fs.pipe_file(f"{place}/in/a.jpg", b"newer")
    fs.pipe_file(f"{place}/in/b.jpg", b"added")
    fs.pipe_file(f"{place}/in/t.tar", tar_of({"x.jpg": b"newer", "y.jpg": b"z" * 20_000}))
    second = list_images(f"s3://{place}/in", storage_options=s3.options)
    assert rows_of(second, s3) == {
        "a.jpg": (None, b"newer"),
        "b.jpg": (None, b"added"),
        "t.tar/x.jpg": (None, b"newer"),
        "t.tar/y.jpg": (None, b"z" * 20_000),
    }
    assert first.table["source_version"][0] != second.table["source_version"][0]


def test_globs_braces_and_single_objects(s3: S3Server, fs: Any, place: str) -> None:
    for name in ("cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/deep/2.jpg", ".hidden/3.jpg"):
        fs.pipe_file(f"{place}/in/{name}", name.encode())
    for pattern, expected in {
        "in/*/*.jpg": ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg"],
        "in/**/*.jpg": ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/deep/2.jpg"],
        "in/cat/{0..1}.jpg": ["0.jpg", "1.jpg"],
        "in/{cat,dog}/*.jpg": ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg"],
        "in/{cat,dog/deep}": ["cat/0.jpg", "cat/1.jpg", "dog/deep/2.jpg"],
        "in/dog/0.jpg": ["0.jpg"],
    }.items():
        listing = list_images(f"s3://{place}/{pattern}", storage_options=s3.options)
        assert listing.table["image_id"].to_pylist() == expected, pattern
        uris = [uri.removeprefix(f"s3://{place}/in/").encode() for uri in listing.table["uri"].to_pylist()]
        assert [data for _, data in rows_of(listing, s3).values()] == uris, pattern


def test_hostile_keys_arrive_as_they_are_and_can_be_fetched(s3: S3Server, fs: Any, place: str) -> None:
    names = [
        'it\'s "quoted".jpg',
        "<script>.jpg",
        "new\nline.jpg",
        "#fragment?query=1&b%20c%+.jpg",
        "*.jpg",
        "[0].jpg",
        "{a,b}.jpg",
        "-rf.jpg",
        " spaces .jpg",
        "é.jpg",
        "e\u0301.jpg",
        "写真/\U0001f600.jpg",
        "x" * 240 + ".jpg",
    ]
    for name in names:
        fs.pipe_file(f"{place}/in/{name}", name.encode())
    listing = list_images(f"s3://{place}/in", storage_options=s3.options)
    assert listing.table["image_id"].to_pylist() == sorted(names, key=lambda name: name.encode())
    assert {name: data for name, (_, data) in rows_of(listing, s3).items()} == {name: name.encode() for name in names}


def test_shards_in_a_bucket(s3: S3Server, fs: Any, place: str) -> None:
    members = {f"{number:03d}.jpg": bytes([number]) * 40_000 for number in range(60)}
    labelled = {**members, "000.cls": b"7", "001.json": b"{}", "empty.jpg": b""}
    for shard in ("00", "01"):
        fs.pipe_file(f"{place}/shards/{shard}.tar", tar_of(labelled))
    fs.pipe_file(f"{place}/shards/02.tar", tar_of(members)[:1_000_000])
    listing = list_images(f"s3://{place}/shards/*.tar", storage_options=s3.options)
    found = rows_of(listing, s3)
    for shard in ("00", "01"):
        assert {name: found[f"{shard}.tar/{name}"][1] for name in [*members, "empty.jpg"]} == {
            **members,
            "empty.jpg": b"",
        }
        assert found[f"{shard}.tar/000.jpg"][0] == "7" and found[f"{shard}.tar/001.jpg"][0] is None
    assert listing.skipped == {".json": 2}
    assert [broken.uri for broken in listing.broken] == [f"s3://{place}/shards/02.tar"]
    whole = [name for name in found if name.startswith("02.tar/")]
    assert len(whole) == 24 and all(found[name][1] == members[name.removeprefix("02.tar/")] for name in whole)
    info = fs.info(f"{place}/shards/00.tar")
    assert listing.table["source_version"][0].as_py() == info["ETag"].strip('"')


@pytest.mark.parametrize("count", [5, 40], ids=["few, asked one by one", "many, their folder listed"])
def test_a_manifest_in_a_bucket(s3: S3Server, fs: Any, place: str, count: int) -> None:
    for number in range(count):
        fs.pipe_file(f"{place}/images/{number:02d}.jpg", b"%d" % number)
    fs.pipe_file(f"{place}/lists/own.jpg", b"own")
    lines = [f"../images/{number:02d}.jpg,image {number},{number % 2}" for number in range(count)]
    lines += [f"s3://{place}/lists/own.jpg,absolute,x", "own.jpg,relative,y", "../images/gone.jpg,gone,z"]
    fs.pipe_file(f"{place}/lists/m.csv", "\n".join(["uri,id,label", *lines]).encode())
    listing = list_images(f"s3://{place}/lists/m.csv", storage_options=s3.options)
    expected: dict[str, tuple[str, bytes | None]] = {
        f"image {number}": (str(number % 2), b"%d" % number) for number in range(count)
    }
    expected |= {"absolute": ("x", b"own"), "relative": ("y", b"own"), "gone": ("z", None)}
    assert rows_of(listing, s3) == expected
    by_id = {row["image_id"]: row for row in listing.table.to_pylist()}
    assert "gone.jpg" in by_id["gone"]["error"]
    assert by_id["image 0"]["source_version"] == fs.info(f"{place}/images/00.jpg")["ETag"].strip('"')


def test_images_inside_parquet_in_a_bucket(s3: S3Server, fs: Any, place: str) -> None:
    images = [bytes([number]) * 1000 for number in range(20)]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": images, "label": ["x"] * 20}), buffer, row_group_size=6)
    fs.pipe_file(f"{place}/in/train.parquet", buffer.getvalue())
    listing = list_images(f"s3://{place}/in", storage_options=s3.options)
    assert rows_of(listing, s3) == {f"train.parquet/{n:08d}": ("x", data) for n, data in enumerate(images)}


def test_an_object_that_vanished_is_an_error_without_waiting(s3: S3Server, fs: Any, place: str) -> None:
    for name in ("a.jpg", "b.jpg"):
        fs.pipe_file(f"{place}/in/{name}", b"abc")
    table = list_images(f"s3://{place}/in", storage_options=s3.options).table
    fs.rm_file(f"{place}/in/a.jpg")
    gone, kept = fetch(table, storage_options=s3.options, backoff_s=60)
    assert isinstance(gone.error, FileNotFoundError) and gone.attempts == 1 and kept.data == b"abc"


# the command line, in processes of its own


def dinoray(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return python("-c", "from pipelines.cli import main; main()", *arguments, environment=environment)


def dinoray_without_ray(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    program = (
        "from extraction_here import extraction_here\nfrom pipelines.cli import main\nwith extraction_here(): main()"
    )
    support = str(Path(extraction_here.__file__).parent)
    paths = os.pathsep.join([support, os.environ.get("PYTHONPATH", "")])
    return python("-c", program, *arguments, environment=environment | {"PYTHONPATH": paths})


def python(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """In a process that knows no other AWS configuration than this."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    clean |= {
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def result_of(process: subprocess.CompletedProcess[str], exit_code: int = 0) -> dict[str, Any]:
    assert process.returncode == exit_code, process.stderr
    assert "Traceback" not in process.stderr
    return json.loads(process.stdout)


def test_a_store_in_a_bucket_lives_as_one_on_a_disk_and_keeps_no_secret(
    s3: S3Server, fs: Any, place: str, tmp_path: Path
) -> None:
    """extract, nothing to do, a changed object with credentials that Ray's workers get as settings, verify."""
    for number in range(6):
        fs.pipe_file(f"{place}/in/{'cat' if number % 2 else 'dog'}/{number}.jpg", jpeg(number))
    fs.pipe_file(f"{place}/in/dog/broken.jpg", b"this is not an image")
    source, store = f"s3://{place}/in", f"s3://{place}/store"
    asked = ["extract", source, store, *as_options("run.max_failed_fraction=0.5"), "--json"]
    outputs: list[str] = []

    def run(arguments: list[str], environment: dict[str, str], with_ray: bool = True) -> dict[str, Any]:
        process = (dinoray if with_ray else dinoray_without_ray)(*arguments, environment=environment)
        outputs.extend([process.stdout, process.stderr])
        return result_of(process)

    first = run(asked, s3.environment, with_ray=False)
    assert (first["listed"], first["extracted"], first["failed"]) == (7, 6, 1)
    again = run(asked, s3.environment)
    assert (again["already_done"], again["failed_before"], again["pending"]) == (6, 1, 0)

    fs.pipe_file(f"{place}/in/cat/1.jpg", jpeg(50))
    options = {"endpoint_url": s3.endpoint, "key": ACCESS_KEY, "secret": SECRET_KEY}
    as_settings = [part for key, value in options.items() for part in ("--set", f"storage.options.{key}={value}")]
    third = run([*asked, *as_settings], {"AWS_REGION": REGION})
    assert (third["pending"], third["changed"], third["extracted"]) == (1, 1, 1)
    assert run(["verify", store, "--json"], s3.environment)["problems"] == []

    # other readers see what the listing says
    import duckdb
    from deltalake import DeltaTable

    table = DeltaTable(f"{store}/images", storage_options={**s3.environment, "AWS_ALLOW_HTTP": "true"})
    images = {row["image_id"]: row for row in table.to_pyarrow_table().to_pylist()}
    listed = {row["image_id"]: row for row in list_images(source, storage_options=s3.options).table.to_pylist()}
    assert images.keys() == listed.keys() - {"dog/broken.jpg"}
    for image_id, row in images.items():
        assert row["source_version"] == listed[image_id]["source_version"]
        assert (row["uri"], row["label"]) == (listed[image_id]["uri"], image_id.split("/")[0])
    fs.get(f"{place}/store", str(tmp_path / "store"), recursive=True)
    patches = [str(path) for path in (tmp_path / "store" / "patches").glob("*.parquet")]
    assert duckdb.sql(f"select count(distinct image_id) from read_parquet({patches})").fetchall() == [(6,)]

    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert len(files) > 10 and any(path.parent.name == "runs" for path in files)
    for path in files:
        assert SECRET_KEY.encode() not in path.read_bytes() and ACCESS_KEY.encode() not in path.read_bytes(), path
    for output in outputs:
        assert SECRET_KEY not in output and ACCESS_KEY not in output


MAKE_STORE = "import sys; from pipelines.store import Store; from pipelines.settings import load_config; " \
    "Store.create(sys.argv[1], load_config([], sys.argv[2:]))"  # fmt: skip


@pytest.mark.parametrize("named_by", ["AWS_PROFILE", "AWS_PROFILE, endpoint apart", "a service of it", "a setting"])
def test_a_profile_is_enough_for_both_libraries(s3: S3Server, place: str, tmp_path: Path, named_by: str) -> None:
    """Of fsspec and delta-rs each reads other parts of AWS's configuration files."""
    credentials, config = tmp_path / "credentials", tmp_path / "config"
    credentials.write_text(f"[photos]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
    endpoint = f"endpoint_url = {s3.endpoint}"
    apart = named_by.endswith("apart")
    if named_by == "a service of it":
        config.write_text(f"[profile photos]\nregion = {REGION}\nservices = own\n[services own]\ns3 =\n  {endpoint}\n")
    else:
        config.write_text(f"[profile photos]\nregion = {REGION}\n{'' if apart else endpoint}\n")
    environment = {"AWS_CONFIG_FILE": str(config), "AWS_SHARED_CREDENTIALS_FILE": str(credentials)}
    environment |= {"AWS_ENDPOINT_URL": s3.endpoint} if apart else {}
    setting = ["storage.options.profile=photos"] if named_by == "a setting" else []
    environment |= {} if setting else {"AWS_PROFILE": "photos"}
    store = f"s3://{place}/store"
    process = python("-c", MAKE_STORE, store, *SMALL_MODEL, *setting, environment=environment)
    assert process.returncode == 0, process.stderr
    options = [part for one in setting for part in ("--set", one)]
    assert result_of(dinoray("verify", store, "--json", *options, environment=environment))["problems"] == []


@pytest.fixture
def refused_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("extract", "wrong secret"),
        ("extract", "no such bucket"),
        ("extract", "nobody answers"),
        ("extract", "no credentials"),
        ("extract to", "wrong secret"),
        ("extract to", "nobody answers"),
        ("verify", "no such bucket"),
        ("verify", "nobody answers"),
        ("stats", "no credentials"),
    ],
)
def test_what_is_wrong_with_a_bucket_is_one_sentence(
    s3: S3Server, fs: Any, place: str, tmp_path: Path, refused_port: int, command: str, problem: str
) -> None:
    fs.pipe_file(f"{place}/in/a.jpg", jpeg(1))
    photo(1).save(tmp_path / "a.jpg")
    environment = {**s3.environment, "AWS_MAX_ATTEMPTS": "1"}
    if problem == "wrong secret":
        environment["AWS_SECRET_ACCESS_KEY"] = "quite-another-secret"
    elif problem == "nobody answers":
        environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{refused_port}"
    elif problem == "no credentials":
        del environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]
    asked = "s3://no-such-bucket" if problem == "no such bucket" else f"s3://{place}"
    arguments = {
        "extract": ["extract", f"{asked}/in", str(tmp_path / "store"), *as_options()],
        "extract to": ["extract", str(tmp_path / "a.jpg"), f"{asked}/store", *as_options()],
        "verify": ["verify", f"{asked}/store"],
        "stats": ["stats", f"{asked}/store"],
    }[command]
    process = dinoray(*arguments, environment=environment)
    assert process.returncode in (1, 2), (process.returncode, process.stdout, process.stderr)
    assert "Traceback" not in process.stderr
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("dinoray: ") and asked in lines[0], process.stderr
    for secret in (SECRET_KEY, "quite-another-secret"):
        assert secret not in process.stdout + process.stderr
