"""A picture of a comparison: the tuned model's images under the base model's."""

from __future__ import annotations

import textwrap

from PIL import Image, ImageDraw, ImageFont


# Sides of a shown image in pixels: smaller ones are enlarged by whole factors, larger ones shrunk.
SMALLEST, LARGEST = 96, 256
GAP, MARGIN, FONT_SIZE = 6, 120, 13


def shown_size(width: int, height: int) -> tuple[int, int]:
    """The size at which an image is shown."""
    if max(width, height) > LARGEST:
        scale = LARGEST / max(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))
    factor = -(-SMALLEST // max(width, height))
    return width * factor, height * factor


def image_grid(rows: list[tuple[str, list[Image.Image]]], columns: list[str]) -> Image.Image:
    """
    Labelled rows of images under labelled columns.

    Args:
        rows (`list[tuple[str, list[PIL.Image.Image]]]`):
            R labels, each with C images. All images are shown at the size of the first.
        columns (`list[str]`):
            C labels, usually prompts; long ones are wrapped to four lines and cut.
    """
    if not rows or any(len(images) != len(columns) for _, images in rows):
        raise ValueError(f"Rows of {[len(images) for _, images in rows]} images do not fit {len(columns)} columns.")
    font = ImageFont.load_default(size=FONT_SIZE)
    width, height = shown_size(*rows[0][1][0].size)
    letter = font.getlength("abcdefghijklmnopqrstuvwxyz ") / 27
    per_line = max(6, int(width / letter))
    labels = ["\n".join(textwrap.wrap(label, per_line, max_lines=4, placeholder="...")) for label in columns]
    line = FONT_SIZE + 4
    header = GAP + line * max(label.count("\n") + 1 for label in labels)

    size = (MARGIN + len(columns) * (width + GAP), header + len(rows) * (height + GAP))
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for column, label in enumerate(labels):
        draw.multiline_text((MARGIN + column * (width + GAP), GAP // 2), label, "black", font=font, spacing=4)
    for row, (label, images) in enumerate(rows):
        top = header + row * (height + GAP)
        wrapped = "\n".join(textwrap.wrap(label, int((MARGIN - 2 * GAP) / letter)))
        draw.multiline_text((GAP, top + height // 2 - line), wrapped, "black", font=font, spacing=4)
        for column, image in enumerate(images):
            # Nearest neighbour keeps the pixels of tiny images crisp; shrinking wants a filter.
            how = Image.Resampling.NEAREST if max(image.size) <= LARGEST else Image.Resampling.LANCZOS
            shown = image.convert("RGB").resize((width, height), how)
            left = MARGIN + column * (width + GAP)
            # A frame, or images on white paper have no edge.
            draw.rectangle((left - 1, top - 1, left + width, top + height), outline="lightgrey")
            grid.paste(shown, (left, top))
    return grid
