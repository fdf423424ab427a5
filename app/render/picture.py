"""An answer as a picture for the previews of links: the verdict, the bar against the card, what was asked."""

from __future__ import annotations

import io
import re
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from ..resources import folder
from . import words
from .html import WHAT, View, bar, glued, said

STATIC = folder("static")
SIZE = (1200, 630)
"""Pixels: what previews are cut to, 1.91 to 1."""
_LEFT, _RIGHT = 72, 1128
_HEIGHTS = {1: 76, 2: 64, 3: 54}
"""Of the verdict's letters, by the lines that it takes; more lines are not shown."""


def png(view: View) -> bytes:
    """1200 × 630 pixels."""
    image = Image.new("RGB", SIZE, _colour("paper"))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, SIZE[0], 14), _colour("k-weights"))
    answer = view.answer
    state = words.state(answer) if answer else "does_not_fit"
    _paragraph(draw, glued(said(view)), 56, {"fits": "ok", "tight": "tight", "does_not_fit": "bad"}.get(state, "ink"))
    if answer:
        _bar(draw, answer)
        name = f"{words.model_name(answer)}, {words.number(answer['model']['parameters'])} parameters"
        draw.text((_LEFT, 452), _cut(name, _font(36, 600)), _colour("ink"), _font(36, 600))
        draw.text((_LEFT, 502), _cut(words.settings(answer), _font(26, 400)), _colour("soft"), _font(26, 400))
    draw.text((_LEFT, 566), "vramplan", _colour("ink"), _font(28, 700))
    draw.text((_RIGHT, 570), WHAT, _colour("soft"), _font(22, 400), "ra")
    out = io.BytesIO()
    image.quantize(64).save(out, "PNG", optimize=True)
    return out.getvalue()


def _paragraph(draw: ImageDraw.ImageDraw, text: str, top: int, colour: str) -> None:
    for count, height in _HEIGHTS.items():
        font = _font(height, 700)
        lines = _lines(text, font)
        if len(lines) <= count:
            break
    for i, line in enumerate(lines[:3]):
        draw.text((_LEFT, top + i * height * 1.2), line, _colour(colour), font)


def _lines(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > _RIGHT - _LEFT:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _cut(text: str, font: ImageFont.FreeTypeFont) -> str:
    while font.getlength(text) > _RIGHT - _LEFT:
        text = text[:-2].rstrip(" ·,") + "…"
    return text


def _bar(draw: ImageDraw.ImageDraw, answer: dict) -> None:
    drawn, top, bottom = bar(answer), 300, 372
    at = lambda percent: _LEFT + (_RIGHT - _LEFT) * percent / 100  # noqa: E731
    draw.rounded_rectangle((_LEFT, top, _RIGHT, bottom), 10, _colour("line"))
    for segment in drawn.segments:
        draw.rectangle((at(segment.x), top, at(segment.x + segment.width), bottom), _colour(f"k-{segment.kind}"))
    taken = f"{words.size(answer['peak']['process'])} taken"
    draw.text((_LEFT, bottom + 14), taken, _colour("soft"), _font(26, 500))
    if drawn.card is not None:
        card = answer["fits"][0]
        draw.line((at(drawn.card), top - 12, at(drawn.card), bottom + 12), _colour("ink"), 4)
        room = f"{card['name']}: {words.size(card['memory_bytes'])}"
        draw.text((_RIGHT, bottom + 14), room, _colour("soft"), _font(26, 500), "ra")


@lru_cache(maxsize=16)
def _font(height: int, weight: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(STATIC / "vendor" / "inter.woff2", height)
    font.set_variation_by_axes([weight])
    return font


@lru_cache(maxsize=64)
def _colour(name: str) -> str:
    """A colour of the page by daylight, from its stylesheet."""
    found = re.search(rf"--{name}: (#[0-9a-f]+);", _stylesheet())
    return found[1] if found else _colour("soft")


@lru_cache(maxsize=1)
def _stylesheet() -> str:
    return (STATIC / "page.css").read_text(encoding="utf-8")
