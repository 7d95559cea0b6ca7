"""The files that the page at / is made of: plain modules, no build step. Each has one path, and nothing else is served."""

from __future__ import annotations

from pathlib import Path

TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}

# Path of the URL -> file.
FILES = {
    "/" if path.name == "index.html" else f"/web/{path.name}": path
    for path in sorted(Path(__file__).parent.iterdir())
    if path.suffix in TYPES
}
