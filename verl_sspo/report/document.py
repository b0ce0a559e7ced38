"""A Markdown report and the same as one HTML file that needs nothing else."""

import base64
import re
from collections.abc import Sequence
from pathlib import Path

from markdown import markdown

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1, h2 { line-height: 1.25; } h2 { margin-top: 2em; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto; }
th, td { padding: .3em .7em; border-bottom: 1px solid #ddd; } 
th { border-bottom: 2px solid #333; vertical-align: bottom; }
code { background: #f3f3f3; padding: .1em .3em; }
pre { background: #f3f3f3; padding: .8em; overflow-x: auto; } pre code { padding: 0; }
p:has(> em:only-child) { font-size: 14px; color: #444; }
@media print { body { max-width: none; margin: 0; } img, table { break-inside: avoid; } }
"""
_IMAGE = re.compile(r'(<img [^>]*src=")([^"]+\.svg)(")')


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '∣') for cell in line)} |" for line in lines)


def picture(path: Path, output: Path, alt: str, caption: str) -> str:
    """A picture with its caption, as Markdown."""
    return f"![{alt}]({path.relative_to(output)})\n\n*{caption}*"


def write(parts: list[str], output: Path, title: str) -> tuple[Path, Path]:
    """Writes report.md and report.html.

    Args:
        parts: blocks of Markdown; pictures by paths relative to `output`.
        output: folder.
        title: of the HTML page.

    Returns:
        Both files.
    """
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    output.mkdir(parents=True, exist_ok=True)
    source, page = output / "report.md", output / "report.html"
    source.write_text(text, encoding="utf-8")
    body = markdown(text, extensions=["tables", "fenced_code"])

    def embed(match: re.Match) -> str:
        data = base64.b64encode((output / match[2]).read_bytes()).decode()
        return f"{match[1]}data:image/svg+xml;base64,{data}{match[3]}"

    page.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>\n{_IMAGE.sub(embed, body)}\n</body></html>\n",
        encoding="utf-8",
    )
    return source, page
