"""Lines and plain text as a PNG, so that a plot needs no plotting library.

Each stroke is drawn by distance: a pixel's cover is how far it lies inside half the stroke's width, which gives
smooth edges without supersampling. Letters are strokes too, of a plotter's font on a 4 x 6 grid. Left out:
fills other than the background, and letters outside ASCII.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]

# Strokes of a glyph are separated by /, points are two digits x y; y grows downwards, 0 is the top of capitals,
# 2 of small letters, 6 the base line, 8 the foot of descenders.
_LETTERS = """
0=10 30 41 45 36 16 05 01 10|1=11 20 26|2=01 10 30 41 42 06 46|3=01 10 30 41 42 33 13/33 44 45 36 16 05|4=36 30 04 44
5=40 00 02 32 43 45 36 16 05|6=41 30 10 01 05 16 36 45 44 33 13 04|7=00 40 16|9=42 33 13 02 01 10 30 41 45 36 16 05
8=13 02 01 10 30 41 42 33 13 04 05 16 36 45 44 33|.=06 06|,=15 07|-=03 33|+=03 43/21 25|:=03 03/06 06|*=12 34/14 32
/=06 40|%=06 40/00 10 11 01 00/35 45 46 36 35|(=20 11 15 26|)=00 11 15 06|a=42 46/43 32 12 03 05 16 36 45|_=07 47
b=00 06/03 12 32 43 45 36 16 05|c=43 32 12 03 05 16 36 45|d=40 46/43 32 12 03 05 16 36 45|i=02 06/00 00|l=00 05 16
e=04 44 43 32 12 03 05 16 36 45|f=30 20 11 16/02 32|g=42 47 38 18 07/43 32 12 03 05 16 36 45|h=00 06/03 12 32 43 46
j=22 27 18 08/20 20|k=00 06/42 04/23 46|m=02 06/03 12 22 33 36/33 42 52 63 66|n=02 06/03 12 32 43 46|v=02 26 42
o=12 32 43 45 36 16 05 03 12|p=02 08/03 12 32 43 45 36 16 05|q=42 48/43 32 12 03 05 16 36 45|r=02 06/04 13 22 32
s=43 32 12 03 14 34 45 36 16 05|t=10 15 26 36/02 32|u=02 05 16 36 45/42 46|w=02 16 32 46 62|x=02 46/42 06|^=11 20 31
y=02 26/42 26 18 08|z=02 42 06 46|A=06 20 46/14 34|B=00 06 36 45 44 33 03/33 42 41 30 00|C=41 30 10 01 05 16 36 45
D=00 06 26 45 41 20 00|E=40 00 06 46/03 33|F=40 00 06/03 33|G=41 30 10 01 05 16 36 45 43 23|H=00 06/40 46/03 43
I=00 06|J=40 45 36 16 05|K=00 06/40 03 46|L=00 06 46|M=06 00 33 60 66|N=06 00 46 40|O=10 30 41 45 36 16 05 01 10
P=06 00 30 41 42 33 03|Q=10 30 41 45 36 16 05 01 10/34 46|R=06 00 30 41 42 33 03/23 46|T=00 40/20 26|V=00 26 40
S=41 30 10 01 02 13 33 44 45 36 16 05|U=00 05 16 36 45 40|W=00 16 32 46 60|X=00 46/40 06|Y=00 23 40/23 26|Z=00 40 06 46
"""
_GLYPHS = {
    entry[0]: [[(int(p[0]), int(p[1])) for p in stroke.split()] for stroke in entry[2:].split("/")]
    for entry in _LETTERS.strip().replace("\n", "|").split("|")
    if not entry.startswith("/")
} | {"/": [[(0, 6), (4, 0)]]}
_SPACE = 3
_GAP = 1.7  # between letters, in grid units


def text_width(text: str, size: float) -> float:
    """Width of a line of text whose capitals are 0.72 `size` high, in the units of `size`."""
    return sum(_advance(letter) for letter in text) * size * 0.12 - _GAP * size * 0.12


def text_strokes(text: str, x: float, y: float, size: float, *, upright: bool = True) -> list[list[Point]]:
    """The strokes of a line that begins at (x, y) on its base line; not `upright` runs upwards."""
    unit, strokes, at = size * 0.12, [], 0.0
    for letter in text:
        for stroke in _GLYPHS.get(letter, []):
            moved = [((px + at) * unit, (py - 6) * unit) for px, py in stroke]
            strokes.append([(x + dx, y + dy) if upright else (x + dy, y - dx) for dx, dy in moved])
        at += _advance(letter)
    return strokes


def _advance(letter: str) -> float:
    points = [x for stroke in _GLYPHS.get(letter, []) for x, _ in stroke]
    return (max(points) if points else _SPACE) + _GAP


class Canvas:
    """A white image of (height, width) pixels that strokes are drawn on."""

    def __init__(self, width: int, height: int) -> None:
        self.pixels: NDArray[np.float32] = np.full((height, width, 3), 255, np.float32)

    def draw(self, strokes: Sequence[Sequence[Point]], color: str, width: float, opacity: float = 1.0) -> None:
        """Draw polylines (one point is a dot) of a `width` in pixels; crossings within one call stay even."""
        reach = width / 2 + 1
        points = [point for stroke in strokes for point in stroke]
        rows, columns = self._box(points, reach)
        cover = np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.float32)
        for stroke in strokes:
            for start, end in zip(stroke, stroke[1:] or stroke, strict=False):
                across, down = self._box((start, end), reach)[::-1]
                (x0, y0), (sx, sy) = start, (end[0] - start[0], end[1] - start[1])
                dy = np.arange(down.start, down.stop, dtype=np.float32)[:, None] + (0.5 - y0)
                dx = np.arange(across.start, across.stop, dtype=np.float32) + (0.5 - x0)
                along = np.clip((dx * sx + dy * sy) / max(sx * sx + sy * sy, 1e-9), 0, 1)
                distance = np.hypot(dx - along * sx, dy - along * sy)
                part = cover[
                    down.start - rows.start : down.stop - rows.start,
                    across.start - columns.start : across.stop - columns.start,
                ]
                np.maximum(part, np.clip(width / 2 + 0.5 - distance, 0, 1), out=part)
        ink = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], np.float32)
        area = self.pixels[rows, columns]
        area += (ink - area) * (cover * opacity)[..., None]

    def _box(self, points: Sequence[Point], reach: float) -> tuple[slice, slice]:
        """Rows and columns within `reach` of the points, inside the image."""
        sides = []
        for limit, values in zip(self.pixels.shape, ([y for _, y in points], [x for x, _ in points]), strict=False):
            first = min(max(int(min(values, default=0) - reach), 0), limit)
            sides.append(slice(first, max(min(int(max(values, default=0) + reach) + 2, limit), first)))
        return sides[0], sides[1]

    def png(self) -> bytes:
        """The image as a PNG file (8 bits, RGB; W3C PNG specification, chunks IHDR, IDAT, IEND)."""
        height, width = self.pixels.shape[:2]
        rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row begins with its filter: none
        rows[:, 1:] = np.rint(self.pixels).astype(np.uint8).reshape(height, -1)
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b""))
        body = b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in parts
        )
        return b"\x89PNG\r\n\x1a\n" + body
