"""The page as one HTML file: styles and scripts stand in it, each allowed by its hash and nothing else."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

STATIC = Path(__file__).resolve().parent / "static"
LIBRARY = ("uplot/uPlot.iife.min.js", "uplot/uPlot.min.css")
MODULES = (
    "text",
    "source",
    "table",
    "chart",
    "charts",
    "lineage",
    "details",
    "prompt",
    "page",
)  # none imports a later one
IMPORT = re.compile(r"^import \{[^}]*\} from \"\./\w+\.js\";\n", re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const|let|class) )", re.MULTILINE)


def page(held: Any = None) -> tuple[str, str]:
    """Return the page and its Content-Security-Policy. With `held`, the data of a report, it asks no server for anything."""
    styles = [read(LIBRARY[1]), read("page.css")]
    scripts = [read(LIBRARY[0]), joined()]
    policy = security_policy(styles, scripts, connect="'none'" if held is not None else "'self'")
    parts = {
        "policy": "" if held is None else f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        "styles": "".join(f"<style>{text}</style>" for text in styles),
        "data": "" if held is None else f'<script type="application/json" id="held">{in_html(held)}</script>',
        "scripts": f'<script>{scripts[0]}</script><script type="module">{scripts[1]}</script>',
    }
    html = re.sub(r"<!-- (policy|styles|data|scripts) -->", lambda place: parts[place[1]], read("page.html"))
    return html, policy + "; frame-ancestors 'none'"  # which only a header may have


def read(name: str) -> str:
    """Return the text of a file of the page."""
    return (STATIC / name).read_text(encoding="utf-8")


def joined() -> str:
    """Return the modules as one: a file that stands alone can import no other."""
    return "".join(EXPORT.sub("", IMPORT.sub("", read(f"{name}.js"))) for name in MODULES)


def security_policy(styles: list[str], scripts: list[str], *, connect: str) -> str:
    """Return a policy that allows these texts by their sha256, requests only to `connect`, and no text as HTML."""
    rules = {
        "default-src": "'none'",
        "script-src": " ".join(map(source_hash, scripts)),
        "style-src": " ".join(map(source_hash, styles)),
        "connect-src": connect,
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def source_hash(text: str) -> str:
    """Return the sha256 of a text as a policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def in_html(value: Any) -> str:
    """Return a value as JSON that ends no element of HTML, whatever its texts hold."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
