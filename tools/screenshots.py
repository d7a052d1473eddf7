"""Screenshots of reports in a headless Chromium: wide and light, dark, and as wide as a phone.

    python tools/screenshots.py OUT/report.html --name report --into tools/results

It needs the program `chromium` (Debian: `apt-get install chromium`), or another one by `--browser`. Pictures are cut to `--height`; where
Pillow is installed they get a palette, at a third of the size.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LOOKS = {"light": (1100, "1"), "dark": (1100, "0"), "phone": (390, "1")}  # width in pixels, and Blink's number of the colour scheme

COLOURS = 256  # of a palette


def shoot(browser: str, page: Path, picture: Path, width: int, height: int, scheme: str) -> None:
    """Write a picture of a page. A profile of its own, so that a browser that is open is left alone."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless=new", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        command += ["--no-sandbox"] * (hasattr(os, "geteuid") and os.geteuid() == 0)  # which Chromium refuses to root
        command += [f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={width},{height}"]
        command += [f"--screenshot={picture.resolve()}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    try:
        from PIL import Image  # noqa: PLC0415 (optional)
    except ImportError:
        return
    with Image.open(picture) as whole:
        whole.convert("RGB").quantize(COLOURS, kmeans=2, dither=Image.Dither.NONE).save(picture, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--into", type=Path, default=Path())
    parser.add_argument("--name", default="report")
    parser.add_argument("--height", type=int, default=1800)
    parser.add_argument("--browser", default="chromium")
    parser.add_argument("--looks", nargs="+", choices=LOOKS, default=list(LOOKS))
    options = parser.parse_args()
    browser = shutil.which(options.browser)
    if browser is None or not options.page.is_file():
        sys.exit(f"there is no browser {options.browser!r}" if browser is None else f"there is no page {options.page}")
    for look in options.looks:
        width, scheme = LOOKS[look]
        picture = options.into / f"{options.name}-{look}.png"
        shoot(browser, options.page, picture, width, options.height, scheme)
        print(f"{picture}: {picture.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
