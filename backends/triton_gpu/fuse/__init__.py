"""Turn a quantized graph into one of the operators in `backends.triton_gpu.ops`, one rewrite a file."""

from torch.fx import GraphModule

import backends.triton_gpu.ops.register  # noqa: F401 (registers the operators)
from backends.triton_gpu.fuse.cache import fuse_cache
from backends.triton_gpu.fuse.linears import Site, fuse_linears
from backends.triton_gpu.fuse.rows import fuse_rows
from ir import edit

__all__ = ["Site", "fuse"]


def fuse(gm: GraphModule, notes: list[str]) -> tuple[GraphModule, list[Site]]:
    """A copy of `gm` that runs packed weights, and its quantized sites; `gm` keeps its tensors and nodes.

    Args:
        gm: a quantized graph, with recorded values.
        notes: sentences for the user are appended: what is computed otherwise than its encoding suggests.

    Raises:
        BackendError: a site without a place in the packed layout.
    """
    fused = edit.copied(gm)
    edit.merge_attributes(fused)
    sites = fuse_linears(fused, notes)
    edit.clean(fused)
    fuse_rows(fused)
    fuse_cache(fused, notes)
    edit.clean(fused)
    return fused, sites
