"""One self-contained HTML page: pictures inside, nothing loaded from elsewhere, light or dark as the reader likes."""

import base64
import html
import io
from collections.abc import Iterable

import numpy as np
from PIL import Image

# Dark to bright, evenly in lightness, readable without telling red from green.
_RAMP = np.array([(20, 12, 60), (92, 24, 112), (176, 48, 96), (235, 104, 54), (252, 178, 60), (252, 250, 170)])

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfbf9; --text: #1d1f23; --quiet: #5d626b; --line: #d8d9d5;
  --card: #ffffff; --accent: #0b57b0; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181c; --text: #e8e8e4; --quiet: #a2a7b0; --line: #363a42;
  --card: #1f2228; --accent: #8ab8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 92rem; padding: 1.5rem clamp(1rem, 3vw, 2.5rem) 4rem; background: var(--ground);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .25rem; } h2 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
h3 { font-size: .95rem; margin: 1.1rem 0 .4rem; }
p { margin: .25rem 0; max-width: 70ch; overflow-wrap: anywhere; } .quiet { color: var(--quiet); font-size: .9rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1.1rem 1.25rem 1.3rem;
  margin-top: 1.4rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 13rem), 1fr)); }
.small { gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(7.2rem, 1fr)); }
figure { margin: 0; min-width: 0; } figcaption { font-size: .85rem; line-height: 1.35; margin-top: .35rem;
  overflow-wrap: anywhere; }
.stack { position: relative; aspect-ratio: 1; border-radius: .3rem; overflow: hidden; background: #8884; }
.stack > * { position: absolute; inset: 0; width: 100%; height: 100%; }
.base { background: var(--picture) center / 100% 100%; }
.cells { image-rendering: pixelated; } .grey { filter: grayscale(1); }
.ramp { height: .5rem; border-radius: .25rem; margin-top: .4rem; }
.ends { display: flex; justify-content: space-between; font-size: .8rem; color: var(--quiet); }
"""


def page(title: str, body: Iterable[str], *, style: str = "", script: str = "") -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML whose texts are escaped.
        style: further CSS.
        script: JavaScript that makes the page livelier; it must be of use without.
    """
    # The page itself forbids whatever is not inside it.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}{style}.ramp {{ background: {ramp()}; }}</style>\n</head>\n"
        f"<body>\n{chr(10).join(body)}\n{f'<script>{script}</script>' if script else ''}\n</body>\n</html>\n"
    )


def text(value: str) -> str:
    """Text as HTML; control characters and what no font holds become visible escapes."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in value)
    return html.escape(shown, quote=True)


def picture_uri(picture: np.ndarray) -> str:
    """A picture (H, W, 3) uint8 as a data URI: JPEG, or PNG where it is small."""
    return _uri(picture, "PNG" if max(picture.shape[:2]) <= 128 else "JPEG")


def cells_uri(cells: np.ndarray) -> str:
    """Colours (rows, cols, 4) uint8 of the cells of a grid as a data URI, one pixel each."""
    return _uri(cells, "PNG")


def heat(values: np.ndarray, low: float, high: float, *, alpha: float = 0.68) -> np.ndarray:
    """Colours (rows, cols, 4) uint8 of values (rows, cols): dark at `low`, bright at `high`."""
    share = np.clip((np.nan_to_num(values) - low) / max(high - low, 1e-12), 0, 1)
    stops = np.linspace(0, 1, len(_RAMP))
    colour = np.stack([np.interp(share, stops, _RAMP[:, c]) for c in range(3)], axis=-1)
    return np.concatenate([colour, np.full((*share.shape, 1), 255 * alpha)], axis=-1).round().astype(np.uint8)


def ramp() -> str:
    """The colours of `heat` as a CSS gradient."""
    return f"linear-gradient(90deg, {', '.join(f'rgb({r} {g} {b})' for r, g, b in _RAMP.tolist())})"


def stack(*layers: tuple[str | None, str], alt: str) -> str:
    """Pictures one above the other, the lowest first.

    Args:
        layers: data URI and CSS classes of each; None stands for `--picture`, which an element around it sets, so that
            the page holds a picture once however often it is shown.
        alt: what is to be seen.
    """
    shown = "".join(
        f'<span class="base {classes}"></span>' if uri is None else f'<img src="{uri}" class="{classes}" alt="">'
        for uri, classes in layers
    )
    return f'<div class="stack" role="img" aria-label="{text(alt)}">{shown}</div>'


def figure(inner: str, caption: str) -> str:
    """A figure with its caption, both HTML."""
    return f"<figure>{inner}<figcaption>{caption}</figcaption></figure>"


def _uri(pixels: np.ndarray, form: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, form, **({"quality": 88} if form == "JPEG" else {}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
