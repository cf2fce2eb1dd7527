"""Which files are images by name, and how names become ids that every table can hold."""

from __future__ import annotations

IMAGE_EXTENSIONS = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".jif",
        ".png",
        ".apng",
        ".gif",
        ".webp",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
        ".jp2",
        ".j2k",
        ".j2c",
        ".jpc",
        ".jpx",
        ".jpf",
        ".jph",
        ".avif",
        ".avifs",
        ".heic",
        ".heics",
        ".heif",
        ".heifs",
        ".hif",
        ".jxl",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".pfm",
        ".tga",
        ".icb",
        ".vda",
        ".vst",
        ".ico",
        ".cur",
        ".icns",
        ".pcx",
        ".dcx",
        ".mpo",
        ".sgi",
        ".rgb",
        ".rgba",
        ".bw",
        ".ras",
        ".sun",
        ".qoi",
        ".psd",
        ".dds",
        ".im",
        ".msp",
        ".xbm",
        ".xpm",
        ".spi",
        ".spider",
        ".fli",
        ".flc",
        ".blp",
        ".ftc",
        ".ftu",
    }
)
ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def extension(name: str) -> str:
    """Lower-case extension with its dot; empty for none (and for names that only begin with a dot)."""
    stem, dot, tail = name.rpartition(".")
    return f".{tail.lower()}" if dot and stem else ""


def is_image_name(name: str) -> bool:
    """Whether the extension is that of an image format."""
    return extension(name) in IMAGE_EXTENSIONS


def is_hidden(name: str) -> bool:
    """Files and folders that tools leave behind: .DS_Store, ._photo.jpg, __MACOSX, a Delta log."""
    return name.startswith(".") or name in ("__MACOSX", "_delta_log")


def as_text(name: str) -> str:
    """A file name as valid Unicode: bytes that are not UTF-8 become \\xNN, so that tables can hold the name."""
    try:
        name.encode()
        return name
    except UnicodeEncodeError:
        return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
