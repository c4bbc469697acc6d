"""Where converted and downloaded models are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$SSLC_CACHE`, or `sslc-export` in the user's cache folder."""
    if folder := os.environ.get("SSLC_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sslc-export"
