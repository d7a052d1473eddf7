"""Import this to have all operators registered: before a graph that calls them is made or loaded."""

from backends.triton_gpu.ops import cache, embedding, linear, rows, static

__all__ = ["cache", "embedding", "linear", "rows", "static"]
