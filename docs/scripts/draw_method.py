"""Draws docs/images/method.svg, the picture of the method: `python docs/scripts/draw_method.py`.

The card has its own background and follows the reader's colour scheme, so it can be read on a light or a dark page.
"""

from pathlib import Path

FILE = Path(__file__).parents[1] / "images" / "method.svg"
WIDTH, HEIGHT = 880, 372
TOKEN, GAP = 30, 6
# request, colour class, prompt tokens, generated tokens
REQUESTS = [("acme", "a", 4, 3), ("tax", "b", 2, 4), ("no adapter", "base", 3, 2)]
ROWS = [152, 206, 260]
PREFILL_X, CACHE_X, DECODE_X = 128, 390, 612
STYLE = """
  svg { font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
  .card { fill: #ffffff; stroke: #d0d7de; } text { fill: #1f2328; } .note { fill: #57606a; }
  .title { font-weight: 600; font-size: 15px; } .line { stroke: #57606a; stroke-width: 1.5; fill: none; }
  .head { fill: #57606a; } .panel { fill: none; stroke: #8c959f; stroke-dasharray: 4 4; }
  .a { fill: #7b4fb5; } .b { fill: #b0457a; } .base { fill: #8c959f; } .in { fill: #ffffff; font-size: 12px; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #161b22; stroke: #30363d; } text { fill: #e6edf3; } .note { fill: #9da7b1; }
    .line { stroke: #9da7b1; } .head { fill: #9da7b1; } .base { fill: #6e7681; }
    .a { fill: #8a5fc7; } .b { fill: #b9568a; } .in { fill: #ffffff; }
  }
"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, kind: str, words: str = "", width: float = TOKEN, height: float = TOKEN) -> str:
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" class="{kind}"/>'
    return shape + text(x + width / 2, y + height / 2 + 4, words, "in", "middle") if words else shape


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    across = to_x > x
    head = [(to_x, to_y), (to_x - 8, to_y - 5), (to_x - 8, to_y + 5)]
    if not across:
        head = [(to_x, to_y), (to_x - 5, to_y - 8), (to_x + 5, to_y - 8)]
    points = " ".join(f"{a:g},{b:g}" for a, b in head)
    end_x, end_y = (to_x - 8, to_y) if across else (to_x, to_y - 8)
    line = f'<path d="M{x:g} {y:g} L{end_x:g} {end_y:g}" class="line"/>'
    return f'{line}<polygon points="{points}" class="head"/>'


def panel(x: float, width: float) -> str:
    return f'<rect x="{x:g}" y="132" width="{width:g}" height="168" rx="8" class="panel"/>'


def picture() -> str:
    """Returns the picture as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-labelledby="title"><title id="title">Prompt tokens of a request pass through the request\'s '
        "adapter and fill the KV cache; the base model decodes all requests from that cache</title>",
        f"<style>{STYLE}</style>",
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="10" class="card"/>',
        text(PREFILL_X - 12, 36, "1  Prefill, once", "title"),
        text(PREFILL_X - 12, 57, "prompt tokens: base + adapter", "note"),
        text(CACHE_X - 12, 36, "2  KV cache", "title"),
        text(CACHE_X - 12, 57, "keys and values, adapted", "note"),
        text(DECODE_X - 12, 36, "3  Decode, every step", "title"),
        text(DECODE_X - 12, 57, "base model only, one step for all", "note"),
        box(PREFILL_X, 78, "a", "adapter acme", 104, 26),
        box(PREFILL_X + 112, 78, "b", "tax", 56, 26),
        arrow(PREFILL_X + 52, 104, PREFILL_X + 52, 131),
        arrow(PREFILL_X + 140, 104, PREFILL_X + 140, 131),
        panel(PREFILL_X - 12, 176),
        panel(CACHE_X - 12, 160),
        panel(DECODE_X - 12, 248),
    ]
    for (name, kind, prompt, generated), y in zip(REQUESTS, ROWS, strict=True):
        parts.append(text(PREFILL_X - 24, y + 20, name, "", "end"))
        parts += [box(PREFILL_X + (TOKEN + GAP) * i, y, kind, f"t{i + 1}") for i in range(prompt)]
        parts.append(arrow(PREFILL_X + 174, y + 15, CACHE_X - 14, y + 15))
        parts += [box(CACHE_X + (TOKEN + GAP) * i, y + 4, kind, "kv", height=22) for i in range(prompt)]
        parts.append(arrow(CACHE_X + 154, y + 15, DECODE_X - 14, y + 15))
        parts += [box(DECODE_X + (TOKEN + GAP) * i, y, "base", f"g{i + 1}") for i in range(generated)]
    parts += [
        text(PREFILL_X - 12, 330, "Rule: a token is adapted if its position is smaller than its prompt's length."),
        text(
            PREFILL_X - 12, 352, "A decode step is the base model's, with 1 adapter in the batch or with 512.", "note"
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    FILE.write_text(picture())
