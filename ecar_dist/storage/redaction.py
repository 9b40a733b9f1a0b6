"""Messages without secrets: URLs lose user, password and query string, foreign words lose what looks like a key."""

from __future__ import annotations

import os
import re
from pathlib import Path

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://[^\s'\"<>\]]+")
_ASSIGNED = re.compile(r"(?i)([\w-]*(?:signature|token|secret|password|credential|accesskey)\w*)\s*[=:]\s*[^\s&,;]+")
_SECRET_NAME = re.compile(r"(?i)key|secret|token|password|credential")


def redact(url: str | Path) -> str:
    """The URL without user, password and query string. A local path stays as it is."""
    text = str(url)
    scheme, mark, rest = text.partition("://")
    if not mark:
        return text
    rest = rest.partition("?")[0]
    authority = rest.partition("/")[0]
    port = authority.partition(":")[2]
    # a secret key may hold an unquoted slash: then what looks like the port is no number
    if "@" in authority or (port and not port.isdigit() and "@" in rest):
        rest = rest.rpartition("@")[2]
    return f"{scheme}://{rest}"


def scrub(text: str) -> str:
    """Another library's words without secrets in URLs, assigned secrets and values of secret environment variables."""
    secrets = (value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 8)
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _ASSIGNED.sub(r"\1=***", _URL.sub(lambda match: redact(match.group()), text))
