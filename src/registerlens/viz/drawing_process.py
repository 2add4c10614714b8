"""The program that `drawing` starts: kaleido, one browser, one picture.

It knows nothing of this package, so that it starts in a moment. kaleido waits without a limit for a browser that gives
no answer, in threads that nothing can end: hence a process.
"""

import asyncio
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from threading import Timer
from typing import Any


async def _draw(folder: Path) -> None:
    """The picture of what is asked for in a folder, there."""
    from choreographer.browsers.chromium import Chromium  # the extra that this is about
    from kaleido import Kaleido

    class InThisGroup(Chromium):
        """A browser that is killed together with this process; it would have a group of its own."""

        def get_popen_args(self) -> dict[str, Any]:
            return {**super().get_popen_args(), "start_new_session": False}

    asked = json.loads((folder / "asked").read_text())
    # Were mathjax not False, the page would ask a server for MathJax, and wait.
    async with Kaleido(mathjax=False, timeout=None, browser_cls=InThisGroup) as kaleido:
        (folder / "part").write_bytes(await kaleido.calc_fig(json.loads(asked["figure"]), opts=asked["options"]))
        (folder / "part").rename(folder / "picture")
        _end_after(10)  # closing is no reason to wait longer


def _end_after(seconds: float) -> None:
    """End this process and its browser then: who waits for it does so too, unless it was killed itself."""
    timer = Timer(seconds, os.killpg, (0, signal.SIGKILL))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    _end_after(float(sys.argv[2]) + 5)
    tempfile.tempdir = sys.argv[1]  # the profile of a browser that is killed is swept up with it
    try:
        asyncio.run(_draw(Path(sys.argv[1])))
    except Exception as error:  # kaleido's and choreographer's have no common base
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
