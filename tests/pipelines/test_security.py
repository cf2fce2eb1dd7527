"""What strangers may hand us: names, archives, images, weights, settings and whole stores. Names stay text; nothing
runs code, writes outside STORE or takes memory without bounds.

A manifest is the user's own wish and not a stranger's: `file:///etc/passwd` in it is read as any other file is (and is
no image). Hostile pickles, listings and single members of tars have their tests beside what reads them, in
test_weights.py, test_listing.py, test_tars.py, test_decoding.py and test_settings.py.
"""

from __future__ import annotations

import ast
import io
import json
import os
import resource
import struct
import subprocess
import sys
import tarfile
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from hand_made import add_failure, add_images, source, write_shard
from repository import ROOT
from small_runs import photo, settings
from tables_by_hand import commit_by_hand
from typer.testing import CliRunner

from dino_ops.errors import ModelError
from dino_ops.weights import load_state_dict
from pipelines.cli import app
from pipelines.errors import JobError, RequestError
from pipelines.extract import job as extract
from pipelines.results.indices import read_manifest
from pipelines.running.terminal import printable
from pipelines.sources import fetch, list_images
from pipelines.store.parquet import DataFile
from pipelines.store.spec import fingerprint
from pipelines.store.store import Store
from pipelines.upkeep import verify

HOSTILE = [
    b"\x1b[2J\x1b]0;owned\x07.jpg",  # clears a terminal and names its window
    b"a\ndinoray: 0 problems.jpg",  # a line of our own
    b"b\rdone.jpg",
    b"<script>alert(1)<.jpg",
    b"'; drop table images; --.jpg",
    b'"quoted".jpg',
    b"[bold]not markup[",
    b"[",
    "\u202egpj.exe.jpg".encode(),  # turns the direction of writing
    b"not \xff\xfe text.jpg",
    b"$(touch owned).jpg",
    b"up%2f..%2f..%2f.jpg",
]


def names_in(folder: Path) -> list[bytes]:
    """Make photos with hostile names; those of them that this file system takes."""
    folder.mkdir()
    data = io.BytesIO()
    photo(1).save(data, "JPEG")
    for name in HOSTILE:
        with open(os.fsencode(folder) + b"/" + name.removesuffix(b".jpg") + b".jpg", "wb") as file:
            file.write(data.getvalue())
    (folder / "[").mkdir()
    (folder / "[" / "closes].jpg").write_bytes(b"no image")
    return os.listdir(os.fsencode(folder))


def is_clean(output: str) -> None:
    """Nothing that a terminal would obey."""
    for line in output.split("\n"):
        assert line.isprintable(), repr(line)


@pytest.mark.usefixtures("ray")
def test_hostile_names_reach_tables_and_output_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names, store = names_in(tmp_path / "in"), tmp_path / "store"
    result = extract.run(settings(), input=str(tmp_path / "in"), store=str(store))
    assert (result.extracted, result.failed) == (len(HOSTILE), 1)
    expected = {os.fsdecode(name).encode(errors="surrogateescape").decode(errors="backslashreplace") for name in names}
    files = [str(path) for path in (store / "images").glob("*.parquet")]
    found = duckdb.sql(f"select image_id, uri, label from read_parquet({files})").fetchall()
    assert {image_id for image_id, *_ in found} == expected - {"["}
    assert {label for *_, label in found} == {None}
    for _, uri, _ in found:
        (one,) = fetch(list_images(uri).table)
        assert one.data is not None and one.data[:2] == b"\xff\xd8", uri
    assert verify.run(settings(), store=str(store)).problems == []
    for command in (["verify"], ["stats"], ["compact"]):
        shown = CliRunner().invoke(app, [*command, str(store)])
        assert shown.exit_code == 0, shown.output
        is_clean(shown.stdout + shown.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "store"]


def test_what_is_printed_of_a_name_is_one_line_and_moves_no_cursor(tmp_path: Path) -> None:
    assert printable("a\x1b[31m\nb\r\x07\u202ec\x9b\u2028d\x00") == r"a\x1b[31m\nb\r\x07\u202ec\x9b\u2028d\x00"
    assert printable("Kätzchen 写真 [x].jpg \U0001f600") == "Kätzchen 写真 [x].jpg \U0001f600"
    evil = "x\x1b[2J\ndinoray: all is well"
    store = Store.create(str(tmp_path / "store"), settings())
    add_images(store, "r1", [source(evil)])
    add_failure(store, "r2", "z", "Evil\x1b[2J\nError")
    report = write_shard(store, "r2", [source(evil)])
    assert report.images and report.patches
    commit_by_hand(store.patches, [report.patches], [], "r2")
    commit_by_hand(store.images, [report.images], [], "r2")
    shown = CliRunner().invoke(app, ["verify", store.uri])
    assert shown.exit_code == 1 and r"x\x1b[2J\ndinoray: all is well has 2 rows" in shown.stdout
    is_clean(shown.stdout + shown.stderr)
    shown = CliRunner().invoke(app, ["stats", store.uri])
    assert shown.exit_code == 0 and r"Evil\x1b[2J\nError" in shown.stdout
    is_clean(shown.stdout + shown.stderr)
    shown = CliRunner().invoke(app, ["extract", str(tmp_path / "in\x1b[2J\nput"), str(tmp_path / "other")])
    assert shown.exit_code == 2 and shown.stderr.count("\n") == 1
    is_clean(shown.stderr)


def test_hits_of_a_search_are_shown_as_they_are_spelt() -> None:
    hits = [
        {"image_id": name, "label": "[/bold]", "similarity": 0.5}
        for name in ("[/closes].jpg", "[bold]b.jpg", "\x1b[2Jc.jpg")
    ]
    program = "from types import SimpleNamespace\nfrom pipelines.cli_output import print_search\n"
    program += f"print_search(SimpleNamespace(of='images', results={hits!r}, saved=None))"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    for name in ("[/closes].jpg", "[bold]b.jpg", r"\x1b[2Jc.jpg", "[/bold]"):
        assert name in shown
    is_clean(shown)


# archives


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = size, kind, link
    return member.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 512) * 512, b"\0")


def test_members_of_a_tar_never_become_files(tmp_path: Path) -> None:
    """Absolute names, names that climb, links and devices: names are text, and only plain members are images."""
    content = b"image bytes"
    target = tmp_path / "secret.jpg"
    target.write_bytes(b"not for the tar's author")
    parts = [header(name, len(content)) + padded(content) for name in ("/etc/a.jpg", "../../b.jpg", "c/../../d.jpg")]
    parts += [
        header("link.jpg", kind=tarfile.SYMTYPE, link=str(target)),
        header("hard.jpg", kind=tarfile.LNKTYPE, link=str(target)),
        header("device.jpg", kind=tarfile.CHRTYPE),
        header("pipe.jpg", kind=tarfile.FIFOTYPE),
        header("folder.jpg", kind=tarfile.DIRTYPE),
    ]
    (tmp_path / "a.tar").write_bytes(b"".join(parts) + bytes(1024))
    before = sorted(tmp_path.rglob("*"))
    table = list_images(str(tmp_path / "a.tar")).table
    ids = table["image_id"].to_pylist()
    assert ids == sorted(["a.tar//etc/a.jpg", "a.tar/../../b.jpg", "a.tar/c/../../d.jpg"])
    assert [one.data for one in fetch(table)] == [content] * 3
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def little_memory() -> Iterator[int]:
    """MiB of address space that the programs below may take beyond what their imports took."""
    yield 700


def run_within(mib: int, program: str, *arguments: object) -> str:
    """Run a program whose address space may grow by `mib` after its imports."""
    text = """
        import io, re, resource, sys
        from pathlib import Path
        import numpy, PIL.Image, pyarrow.parquet
        from dino_ops.decoding import decode_image
        from dino_ops.errors import ImageError
        from pipelines.sources import fetch, list_images
        decode_image(Path(sys.argv[1]).read_bytes(), 1_000_000)
        size = int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (size + {mib} * 2**20,) * 2)
    """
    script = textwrap.dedent(text).replace("{mib}", str(mib)) + textwrap.dedent(program)
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_archives_and_files_that_claim_or_have_terabytes_take_no_memory(tmp_path: Path, little_memory: int) -> None:
    good = tmp_path / "good.jpg"
    photo(1).save(good)
    folder = tmp_path / "in"
    folder.mkdir()
    with open(folder / "sparse.jpg", "wb") as file:  # a hole: it takes no disk either
        file.truncate(1 << 40)
    with open(folder / "longname.tar", "wb") as file:  # the name of a member is a terabyte, and the file has it
        file.write(header("././@LongLink", (1 << 40) - 4096, tarfile.GNUTYPE_LONGNAME))
        file.truncate(1 << 40)
    with open(folder / "pax.tar", "wb") as file:
        file.write(header("pax", (1 << 39) - 4096, tarfile.XHDTYPE))
        file.truncate(1 << 40)
    with open(folder / "member.tar", "wb") as file:
        file.write(header("huge.jpg", 1 << 39))
        file.truncate(1 << 40)
    lying = header("lying.jpg", 1 << 50) + padded(b"few")
    (folder / "lying.tar").write_bytes(lying + bytes(1024))
    output = run_within(
        little_memory,
        """
        listing = list_images(sys.argv[2])
        for one, image_id in zip(fetch(listing.table), listing.table["image_id"].to_pylist()):
            assert one.data is None, image_id
            print(image_id, type(one.error).__name__, one.error)
        for broken in listing.broken:
            print(broken.image_id, broken.error, broken.message)
        """,
        good,
        folder,
    )
    said = dict(line.split(" ", 1) for line in output.splitlines())
    assert said.keys() == {
        "sparse.jpg",
        "member.tar/huge.jpg",
        "longname.tar",
        "pax.tar",
        "member.tar",
        "lying.tar",
    } - (set() if "member.tar" in said else {"member.tar"})
    for name in ("sparse.jpg", "member.tar/huge.jpg"):
        assert said[name].startswith("ValueError the file has ") and "run.max_file_mb" in said[name]
    for name in ("longname.tar", "pax.tar"):
        assert "a header claims to have" in said[name]
    assert "it ends inside lying.jpg" in said["lying.tar"]


@pytest.mark.parametrize("kind", ["plain", pytest.param("struct", marks=pytest.mark.slow)])
def test_an_image_repeated_in_a_parquet_file_takes_the_place_of_one(
    tmp_path: Path, little_memory: int, kind: str
) -> None:
    """Two gigabytes of rows in a file of kilobytes, since Parquet stores equal values once."""
    good, path = tmp_path / "good.jpg", tmp_path / "bomb.parquet"
    photo(1).save(good)
    values = pa.array([bytes(900_000)])
    indices = pa.array([0] * 2400, pa.int32())
    column: Any = pa.DictionaryArray.from_arrays(indices, values)
    if kind == "struct":
        column = pa.StructArray.from_arrays([column, pa.nulls(2400, pa.string())], ["bytes", "path"])
    pq.write_table(pa.table({"image": column}), path, store_schema=False)
    assert path.stat().st_size < 200_000
    output = run_within(
        little_memory,
        """
        table = list_images(sys.argv[2]).table
        print(len(table), {len(one.data) for one in fetch(table.slice(1000, 16))})
        """,
        good,
        path,
    )
    assert output.split() == ["2400", "{900000}"]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes) -> bytes:
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return start + b"".join(extra) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def image_bombs() -> dict[str, bytes]:
    """Files of kilobytes that ask for gigabytes."""
    zeros = zlib.compressobj(1)
    bomb = b"".join(zeros.compress(bytes(1 << 20)) for _ in range(1024)) + zeros.flush()  # a gigabyte
    large = struct.pack("<II", 60_000, 60_000)
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", 9)
    for tag, value in ((256, 60_000), (257, 60_000), (258, 8), (259, 8), (262, 1), (273, 200), (277, 1), (278, 60_000)):
        tiff += struct.pack("<HHII", tag, 4, 1, value)
    tiff += struct.pack("<HHII", 279, 4, 1, 1000) + bytes(4)
    bmp = b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<I", 40) + large
    bmp += struct.pack("<HHI", 1, 24, 0) + bytes(20)
    gif = b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\x80\0\0" + bytes(6) + b","
    gif += struct.pack("<HHHH", 0, 0, 65_535, 65_535) + b"\0\x02\x02\x4c\x01\0;"
    jpeg = b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 11, 8, 65_000, 65_000, 1) + bytes([1, 0x11, 0]) + b"\xff\xd9"
    return {
        "png pixels": png(60_000, 60_000),
        "png text": png(64, 64, chunk(b"zTXt", b"Comment\0\0" + bomb)),
        "png itxt": png(64, 64, chunk(b"iTXt", b"Comment\0\1\0\0\0" + bomb)),
        "png profile": png(64, 64, chunk(b"iCCP", b"icc\0\0" + bomb)),
        "bmp": bmp,
        "gif": gif,
        "ppm": b"P6 60000 60000 255\n" + bytes(100),
        "tiff": tiff.ljust(200, b"\0") + zlib.compress(bytes(1 << 20)),
        "tga": bytes([0, 0, 10]) + bytes(9) + struct.pack("<HH", 65_535, 65_535) + bytes([24, 0]) + bytes(100),
        "qoi": b"qoif" + struct.pack(">II", 60_000, 60_000) + bytes([3, 0]) + bytes(100),
        "jpeg": jpeg,
    }


@pytest.mark.slow  # test_decoding.py has two such files, in no time
def test_images_that_ask_for_gigabytes_take_no_memory(tmp_path: Path, little_memory: int) -> None:
    good = tmp_path / "good.jpg"
    photo(1).save(good)
    for name, data in image_bombs().items():
        (tmp_path / f"{name}.bomb").write_bytes(data)
    output = run_within(
        little_memory,
        """
        for path in sorted(Path(sys.argv[1]).parent.glob("*.bomb")):
            try:
                print(path.stem, "gives", decode_image(path.read_bytes(), 100_000_000).size)
            except ImageError as error:
                print(path.stem, "is refused:", error)
        """,
        good,
    )
    lines = output.splitlines()
    assert len(lines) == len(image_bombs()), output
    for line in lines:
        assert "is refused" in line or "gives (64, 64)" in line, line  # a profile or text may be left out
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 * 2**20  # KiB


# weights


@pytest.mark.parametrize("length", [1 << 30, 1 << 62, (1 << 64) - 1])
def test_a_header_of_weights_that_claims_to_be_huge_is_refused(tmp_path: Path, length: int) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b'{"a": 1}')
    with pytest.raises(ModelError, match="cannot be read"):
        load_state_dict(file)


def test_tensors_that_reach_beyond_their_file_are_refused(tmp_path: Path) -> None:
    about = {"w": {"dtype": "F32", "shape": [1 << 30, 1 << 10], "data_offsets": [0, 1 << 42]}}
    text = json.dumps(about).encode()
    file = tmp_path / "weights.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(ModelError, match="cannot be read"):
        load_state_dict(file)


# settings


@pytest.mark.parametrize(
    "text",
    [
        "run: !!python/object/apply:os.mkdir [owned]",
        "run: {workers: !!python/object/new:os.mkdir [owned]}",
        "!!python/module:os ",
    ],
)
@pytest.mark.parametrize("command", ["extract", "run"])
def test_yaml_makes_no_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    arguments = ["extract", "in", "store", "-c", "a.yaml"] if command == "extract" else ["run", "a.yaml"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 2 and shown.stderr.startswith("dinoray: "), shown.output
    assert not (tmp_path / "owned").exists()


# stores of strangers


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store.create(str(tmp_path / "store"), settings())
    add_images(made, "20200101T000000Z-000001", [source("a")])
    return made


def test_a_log_that_names_files_elsewhere_is_not_followed(store: Store, tmp_path: Path) -> None:
    secret = tmp_path / "secret.parquet"
    secret.write_bytes(next((Path(store.uri) / "images").glob("*.parquet")).read_bytes())
    size = secret.stat().st_size
    commit_by_hand(store.images, [DataFile("../../secret.parquet", size, 1, "a", "a")], [], "r2")
    with pytest.raises(JobError, match=r"'\.\./\.\./secret\.parquet' as its file, which lies outside"):
        store.images.read(["image_id"])
    for command in ("stats", "verify", "compact"):
        shown = CliRunner().invoke(app, [command, store.uri])
        assert shown.exit_code == 1 and "Traceback" not in shown.output, (command, shown.output, shown.exception)
    assert secret.exists()


def test_a_row_that_names_a_shard_elsewhere_is_not_followed(store: Store, tmp_path: Path) -> None:
    secret = tmp_path / "secret.parquet"
    secret.write_bytes(next((Path(store.uri) / "patches").glob("*.parquet")).read_bytes())
    report = write_shard(store, "r2", [source("b")])
    assert report.images
    rows = store.images.read_file(report.images.path)
    rows = rows.set_column(rows.schema.get_field_index("shard"), "shard", pa.array(["../../secret.parquet"]))
    commit_by_hand(store.images, [store.images.write_file("evil.parquet", rows)], [], "r2")
    with pytest.raises(JobError, match="lies outside"):
        store.repair("r3")
    assert "../../secret.parquet" not in DeltaTable(store.patches.uri).file_uris()
    assert secret.exists()


@pytest.mark.parametrize("name", ["../../secret.faiss", "/etc/passwd", "s3://other/x.faiss", "secret.parquet"])
def test_an_index_that_names_files_elsewhere_is_refused(store: Store, name: str) -> None:
    folder = Path(store.uri) / "index" / "photos"
    folder.mkdir(parents=True)
    segment = {"kind": "flat", "first_id": 0, "images": 1, "vectors": 1, "files": {"vectors": name}}
    content = {
        **dict.fromkeys(("pooling", "descriptor")),
        **dict.fromkeys(("number", "dimension", "images_version", "images", "count", "dead", "next_id"), 1),
        **dict.fromkeys(("of", "why", "run_id"), "x"),
        "kind": "flat",
        "fingerprint": store.fingerprint,
        "images_files": [],
        "segments": [segment],
    }
    (folder / "manifest-1.json").write_text(json.dumps(content))
    with pytest.raises(JobError, match="names a file that no index has"):
        read_manifest(store, "photos")


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"name": "hf-hub:stranger/model"}},
        {"model": {"name": "local-dir:/tmp"}},
        {"model": {"unknown": 1}},
        {"image": {"max_pixels": "__import__('os').getpid()"}},
    ],
)
def test_a_description_is_checked_as_settings_are(store: Store, change: dict[str, Any]) -> None:
    path = Path(store.uri) / "store.json"
    content = json.loads(path.read_text())
    for section, values in change.items():
        content["spec"][section] |= values
    path.write_text(json.dumps(content | {"fingerprint": fingerprint(content["spec"])}))
    image = Path(store.uri).parent / "a.jpg"
    photo(1).save(image)
    with pytest.raises((RequestError, ModelError)):
        from pipelines.extract.layout import model_facts

        model_facts(Store.open(store.uri, settings()).config)


# what no line of ours does


def test_nothing_of_ours_runs_what_it_reads() -> None:
    """No eval, exec, shells or unsafe loaders; pickles only between our own stages, and torch.load of tensors alone."""
    forbidden = {"eval", "exec", "os.system", "os.popen", "pickle.load", "yaml.load", "yaml.unsafe_load"}
    seen = set()
    for path in sorted([*(ROOT / "pipelines").rglob("*.py"), *(ROOT / "dino_ops").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
                continue
            name = ast.unparse(node.func)
            where = f"{path.relative_to(ROOT)}:{node.lineno} calls {name}"
            assert name not in forbidden and not name.startswith("subprocess."), where
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert name != "torch.load" or options.get("weights_only") == "True", where
            assert name != "np.load" or options.get("allow_pickle", "False") == "False", where
            if name == "pickle.loads":
                seen.add(str(path.relative_to(ROOT)))
    assert seen <= {"pipelines/extract/stages.py"}
