"""A run in the browser: the slide at full resolution, spots over it, layer beside layer."""

from hinge.viewer.content import Viewer, write_viewer
from hinge.viewer.server import serve

__all__ = ["Viewer", "serve", "write_viewer"]
