"""The size of an image file from its first bytes, in a fraction of the time that opening it as a picture takes."""

import os
import stat
import struct
from pathlib import Path

from .errors import UnreadableImage
from .image import read_header

UNKNOWN = (1, 1)
"""(height, width) of an image whose file cannot be read: whoever checks the files says so, or leaves it out."""

_HEAD = 512  # bytes; what lies further on, behind metadata, is read where it is needed
_PNG = b"\x89PNG\r\n\x1a\n"
# Texts of a PNG that may hold an orientation.
_TELLING = (b"Raw profile type", b"XML:com.adobe.xmp")


def upright_size(path: str) -> tuple[int, int]:
    """(height, width) of the picture in a file, turned upright as its metadata say.

    DataError where there is no file, UnreadableImage where it is no picture.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or a pipe would wait for its other end
    except OSError:
        return read_header(Path(path))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UnreadableImage(f"{path}: is no file; put the image there")
        head = os.pread(descriptor, _HEAD, 0)
        size = None
        if head.startswith(b"\xff\xd8"):
            size, _, telling = jpeg_frame(descriptor, head)
            size = None if telling else size
        elif head.startswith(_PNG) and not _telling_png(descriptor):
            width, height = struct.unpack(">II", head[16:24])
            size = height, width
    except (OSError, struct.error):
        size = None
    finally:
        os.close(descriptor)
    return size if size is not None and 0 not in size else read_header(Path(path))


def jpeg_frame(descriptor: int, head: bytes) -> tuple[tuple[int, int] | None, int, bool]:
    """(height, width) as stored in an open JPEG file, None where it has no header; head: its first bytes.

    Also where its segments have been followed to, and whether one of them may hold an orientation.
    """

    def read(count: int, at: int) -> bytes:
        return head[at : at + count] if at + count <= len(head) else os.pread(descriptor, count, at)

    at, telling = 2, False
    while len(segment := read(9, at)) == 9 and segment[0] == 0xFF:
        marker, length, height, width = struct.unpack(">xBHxHH", segment)
        if marker == 0xFF:  # padding
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return (height, width), at + 2 + length, telling
        else:
            telling = telling or marker == 0xE1  # EXIF and XMP
            at += 2 + length
    return None, at, telling


def _telling_png(descriptor: int) -> bool:
    """Whether a chunk of an open PNG file may hold an orientation; they may lie behind the pixels."""
    at = len(_PNG)
    while len(chunk := os.pread(descriptor, 8 + 20, at)) >= 8:
        length, kind = struct.unpack(">I4s", chunk[:8])
        if kind == b"eXIf" or (kind in (b"tEXt", b"zTXt", b"iTXt") and chunk[8:].startswith(_TELLING)):
            return True
        if kind == b"IEND":
            return False
        at += 12 + length
    return True  # cut off
