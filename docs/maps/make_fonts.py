"""Makes rewardmap/assets/fonts: subsets of free fonts with the characters that maps need, and kerning they can use.

Run from the repository root, with fonttools and uharfbuzz installed and Debian's packages fonts-inter, fonts-noto-core
and fonts-noto-cjk unpacked under ROOT (``dpkg-deb -x PACKAGE ROOT``): python docs/maps/make_fonts.py ROOT
"""

from __future__ import annotations

import io
import string
import sys
from pathlib import Path

import uharfbuzz
from fontTools import subset
from fontTools.ttLib import TTFont, newTable
from fontTools.ttLib.tables._k_e_r_n import KernTable_format_0

from rewardmap.transit.names import characters

SOURCES = {
    "inter-regular": ("opentype/inter/Inter-Medium.otf", 0),
    "inter-bold": ("opentype/inter/Inter-Bold.otf", 0),
    "noto-regular": ("truetype/noto/NotoSans-Regular.ttf", 0),
    "noto-bold": ("truetype/noto/NotoSans-Bold.ttf", 0),
    "han-regular": ("opentype/noto/NotoSansCJK-Regular.ttc", 2),
    "han-bold": ("opentype/noto/NotoSansCJK-Bold.ttc", 2),
}
"""Our name -> file under ROOT/usr/share/fonts and number of the face in it (2: Simplified Chinese)."""
MORE = string.ascii_letters + string.digits + string.punctuation + " –—’·×→←↑↓°©"
LATIN = "".join(map(chr, (*range(0xC0, 0x180), *range(0x410, 0x450), 0x401, 0x451)))
MAP_WORDS = "号线轨道交通线网示意图机场火车站公园河铁路停车图例票价区"


def main() -> None:
    """Writes the six files."""
    root, target = Path(sys.argv[1]) / "usr/share/fonts", Path("rewardmap/assets/fonts")
    for name, (file, number) in SOURCES.items():
        han = name.startswith("han")
        wanted = MORE + (characters() + MAP_WORDS if han else characters() + LATIN)
        font = TTFont(root / file, fontNumber=number)
        wanted = "".join(c for c in sorted(set(wanted)) if ord(c) in font.getBestCmap())
        options = subset.Options(layout_features=["kern", "mark", "ccmp"], name_IDs=[0, 1, 2, 3, 4, 5, 6, 13, 14])
        options.hinting = True
        maker = subset.Subsetter(options)
        maker.populate(text=wanted)
        maker.subset(font)
        _kern(font, [c for c in wanted if ord(c) < 0x2000])
        for table in ("GPOS", "GSUB", "GDEF", "BASE", "DSIG", "vhea", "vmtx", "VORG"):
            if table in font:
                del font[table]
        font["head"].modified = font["head"].created
        font.recalcTimestamp = False
        font.save(target / f"{name}.otf")
        print(name, len(wanted), (target / f"{name}.otf").stat().st_size)


def _kern(font: TTFont, wanted: list[str]) -> None:
    """Pairs of GPOS as an old ``kern`` table, the only one that Pillow's basic layout reads."""
    buffer = io.BytesIO()
    font.save(buffer)
    shaper = uharfbuzz.Font(uharfbuzz.Face(buffer.getvalue()))
    names, pairs = font.getBestCmap(), {}
    letters = [c for c in wanted if c.isalpha()]
    for a in letters:
        for b in letters:
            text = uharfbuzz.Buffer()
            text.add_str(a + b)
            text.guess_segment_properties()
            uharfbuzz.shape(shaper, text, {"kern": True})
            if len(text.glyph_infos) == 2:
                shift = text.glyph_positions[0].x_advance - font["hmtx"][names[ord(a)]][0]
                if abs(shift) >= 0.008 * font["head"].unitsPerEm:
                    pairs[names[ord(a)], names[ord(b)]] = shift
    strongest = sorted(pairs, key=lambda pair: (-abs(pairs[pair]), pair))[:10_000]
    if strongest:
        table = newTable("kern")
        table.version, part = 0, KernTable_format_0()
        part.version, part.coverage, part.kernTable = 0, 1, {pair: pairs[pair] for pair in strongest}
        table.kernTables = [part]
        font["kern"] = table


if __name__ == "__main__":
    main()
