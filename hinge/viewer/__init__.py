"""View a run in the browser: the slide at full resolution with spots, and layers side by side."""

from hinge.viewer.files import Viewer, write_viewer
from hinge.viewer.server import serve

__all__ = ["Viewer", "serve", "write_viewer"]
