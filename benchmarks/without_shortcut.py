"""app.py without its shortcut: every request goes through Flask."""

import runpy
from unittest.mock import patch

from engine.shortcut import Shortcut

if __name__ == "__main__":
    with patch.object(Shortcut, "is_for", lambda *_: False):
        runpy.run_path("app.py", run_name="__main__")
