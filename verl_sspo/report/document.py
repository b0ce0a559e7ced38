"""A Markdown report, and the same as one HTML file that needs nothing else."""

import base64
import re
from pathlib import Path

from markdown import markdown

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto; }
th, td { padding: .3em .7em; border-bottom: 1px solid #ddd; }
pre { background: #f3f3f3; padding: .8em; overflow-x: auto; }
p:has(> em:only-child) { font-size: 14px; color: #444; }
@media print { img, table { break-inside: avoid; } }
"""


def picture(path: Path, output: Path, alt: str, caption: str) -> str:
    """A picture with its caption, as Markdown."""
    return f"![{alt}]({path.relative_to(output)})\n\n*{caption}*"


def write(parts: list[str], output: Path, title: str) -> tuple[Path, Path]:
    """Writes report.md and report.html.

    Args:
        parts: blocks of Markdown; pictures are SVG, by paths relative to `output`.
        output: folder.
        title: of the HTML page.

    Returns:
        Both files.
    """
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    output.mkdir(parents=True, exist_ok=True)
    source, page = output / "report.md", output / "report.html"
    source.write_text(text, encoding="utf-8")

    def embed(match: re.Match) -> str:
        return f"data:image/svg+xml;base64,{base64.b64encode((output / match[1]).read_bytes()).decode()}"

    body = re.sub(r'(?<=src=")([^"]+\.svg)', embed, markdown(text, extensions=["tables", "fenced_code"]))
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    html = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
    page.write_text(html, encoding="utf-8")
    return source, page
