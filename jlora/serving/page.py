"""The page at `/`: one HTML file, and the policy under which a browser may run it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

PATH = Path(__file__).with_name("page.html")


def read_page() -> tuple[bytes, dict[str, str]]:
    """The page and the headers to send with it.

    Content-Security-Policy names the page's one script and one style sheet by their hashes, so that
    nothing else runs, whatever a model writes, and allows connections to this server alone.
    """
    page = PATH.read_bytes()
    script, style = (sources(page, tag) for tag in (b"script", b"style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def sources(page: bytes, tag: bytes) -> str:
    """The hashes of all inline elements of this kind, as a policy writes them."""
    found = re.findall(b"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
    hashes = (base64.b64encode(hashlib.sha256(text).digest()).decode() for text in found)
    return " ".join(f"'sha256-{each}'" for each in hashes)
