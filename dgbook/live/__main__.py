"""`python -m dgbook.live FOLDER`: bring the folder that the live page loads from up to date."""

import sys
from pathlib import Path

from dgbook.live.site import build

build(Path(sys.argv[1]))
