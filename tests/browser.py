"""A headless Chromium that asks for nothing by itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from selenium import webdriver

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")


def open_browser(profile: Path) -> webdriver.Chrome:
    """Start it with a new profile in the folder `profile`; the log "performance" has its requests."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    quiet = ("disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update")
    for word in ("headless", "no-sandbox", "disable-dev-shm-usage", "disable-sync", *quiet):
        options.add_argument(f"--{word}")
    options.add_argument("--window-size=1400,1800")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
