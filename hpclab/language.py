"""The reader's language: English messages are the keys, `zh.json` holds their Chinese.

Use: `from hpclab.language import translate as _`, then `_("...")` with a literal, which a test collects.
"""

import json
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

LANGUAGES = ("en", "zh")
CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "SimHei",
)


def language() -> str:
    """Language of the reader: `HPCLAB_LANG`, else "zh" in a folder of that name (the notebooks'), else "en".

    Raises
    ------
    ValueError
        If `HPCLAB_LANG` names a language that isn't there.
    """
    chosen = os.environ.get("HPCLAB_LANG")
    if chosen and chosen not in LANGUAGES:
        raise ValueError(f"HPCLAB_LANG (={chosen}) isn't a language of hpclab; use one of {', '.join(LANGUAGES)}.")
    return chosen or ("zh" if _folder() == "zh" else "en")


def _folder() -> str:
    """Name of the current folder; "" if it was removed, which is no reason to say nothing."""
    try:
        return Path.cwd().name
    except FileNotFoundError:
        return ""


def translate(message: str, **values: object) -> str:
    """Message in the reader's language (English if it has no Chinese), with `values` as in `str.format`.

    Examples
    --------
    >>> translate("{ranks} ranks", ranks=2)
    '2 ranks'
    """
    if language() == "zh":
        message = _chinese().get(message, message)
    return message.format(**values)


def translate_drawn(message: str, **values: object) -> str:
    """As `translate`, for figures: English if this machine has no font for the language, rather than empty boxes."""
    return translate(message, **values) if cjk_font() else message.format(**values)


@cache
def cjk_font() -> str | None:
    """Name of a font on this machine that has Chinese characters; None if there is none.

    matplotlib keeps a list of the fonts that were there when it first looked: a font that came later is added to it,
    and one whose file has gone doesn't count.
    """
    from matplotlib import font_manager

    fonts = font_manager.fontManager

    def found() -> str | None:
        there = {font.name for font in fonts.ttflist if os.path.exists(font.fname)}
        return next((font for font in CJK_FONTS if font in there), None)

    if font := found():
        return font
    for path in set(font_manager.findSystemFonts()) - {font.fname for font in fonts.ttflist}:
        with suppress(RuntimeError, OSError):  # FreeType can't read it
            fonts.addfont(path)
    return found()


@cache
def _chinese() -> dict[str, str]:
    return json.loads(Path(__file__).with_name("zh.json").read_text(encoding="utf-8"))
