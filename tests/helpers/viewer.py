"""Names in the run that the tests of the viewer show, and looks at its page."""

import contextlib
import io
import threading

import numpy as np
from PIL import Image

from hinge.viewer.server import ViewerServer

HOSTILE_GENE = "<img src=x onerror=alert(1)>"
HOSTILE_SPOT = '"><script>alert(2)</script>'
N_DRAWS = 20


@contextlib.contextmanager
def serving(viewer):
    """A server of the viewer that runs in a thread."""
    with ViewerServer(viewer) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield running
        finally:  # a failed test would leave a thread that keeps the process alive
            running.shutdown()
            thread.join()


def is_complaint(message) -> bool:
    """Whether a message on the console is a fault; OpenSeadragon reports tiles that come late on a busy machine."""
    return message.type != "log" and not message.text.startswith("Ignoring tile")


def middle(page, pane: int = 0) -> tuple[float, float]:
    box = page.locator(".pane .view").nth(pane).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def pixels(page, pane: int) -> np.ndarray:
    """What a pane shows."""
    return np.asarray(Image.open(io.BytesIO(page.locator(".pane .view").nth(pane).screenshot())).convert("RGB"), float)
