"""The lowering itself: fuse, prove, account."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from backends.gate import activations, difference, tolerance, uncoded
from backends.triton_gpu.decoding import StaticDecoder, check_inputs
from backends.triton_gpu.fuse import Site, fuse
from backends.triton_gpu.ops.embedding import PACKED_EMBEDDING
from backends.triton_gpu.ops.linear import PACKED_LINEAR, PACKED_LINEAR_INT8
from backends.triton_gpu.package import EAGER, TritonExecutable
from ir.errors import BackendError
from ir.match import operands
from ir.signature import Signature
from ir.sites import floats, quantized

FLOATING = "floating point, by torch"
UNPACKED = "fxpress.dequantize"
PACKED = (PACKED_LINEAR, PACKED_LINEAR_INT8, PACKED_EMBEDDING)
PROBE_LENGTH, STEPS = 12, 2  # tokens that steps are proven on


def lower(gm: GraphModule, probe: Sequence[Tensor], notes: list[str]) -> TritonExecutable:
    """See `Triton.lower`."""
    signature: Signature = gm.meta["signature"]
    fused, sites = fuse(gm, notes)
    executable = TritonExecutable(fused, signature, {})
    with torch.no_grad():
        oracle = uncoded(signature, gm(*probe))
    allowed = tolerance(activations(gm), oracle)
    measured = _prove(uncoded(signature, executable(*probe)), oracle, allowed)
    executable.facts = {"probe_difference": measured, "operators": _shares(fused, sites), "sites": [vars(site) for site in sites]}
    if signature.layers:
        executable.grows = _prove_decoding(executable, probe[0], allowed)
        executable.facts["decoding"] = f"a cache that grows: {executable.grows}" if executable.grows else "a cache of fixed size"
    _note(executable, notes)
    return executable


def _prove(ours: Sequence[Tensor], oracle: Sequence[Tensor], allowed: float) -> float:
    """The difference of the outputs from the graph's.

    Raises:
        BackendError: it is more than roundings can make.
    """
    found = difference(ours, oracle)
    if not found <= allowed:
        raise BackendError(
            f"the fused graph's outputs differ from the graph's by {found:.1e} relative on the probe, more than {allowed:.0e}",
            remedy="report the model and its pipeline; the reference backend runs the graph itself",
        )
    return found


def _prove_decoding(executable: TritonExecutable, tokens: Tensor, allowed: float) -> str:
    """Compare steps over a cache of fixed size with one call for all tokens; why there is no such cache, "" if there is."""
    signature = executable.signature
    try:
        check_inputs(signature)
        decoder = StaticDecoder(executable.gm, signature, tokens.shape[0], PROBE_LENGTH)
    except BackendError as error:
        return error.what
    ids = tokens.repeat(1, -(-PROBE_LENGTH // max(tokens.shape[1], 1)))[:, :PROBE_LENGTH]
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # a row that is padded
    whole = executable(*signature.bind(input_ids=ids, attention_mask=mask))[0]
    read = PROBE_LENGTH - STEPS
    ours = [decoder.prefill(ids[:, :read], mask[:, :read])]
    for place in range(read, PROBE_LENGTH):
        ours.append(decoder.step(ids[:, place : place + 1]).clone())
    found = difference([torch.stack(ours, 1)], [whole[:, read - 1 :]])
    return "" if found <= allowed else f"steps over one of fixed size differ by {found:.1e} relative, more than {allowed:.0e}"


def _shares(gm: GraphModule, sites: Sequence[Site]) -> list[dict[str, Any]]:
    """For each operator that reads weights: how many sites, and their share of the weight bytes before; a shared weight counts once."""
    rest = sum(tensor.nbytes for node, tensor in floats(gm) if not _is_part(node))
    unpacked = [(codes.numel() * node.args[4].itemsize, codes) for node, _, codes, _ in quantized(gm)]  # type: ignore[union-attr]
    total = rest + sum(size for size, _ in unpacked) + sum(site.bytes_before for site in sites if site.bytes_now)
    rows = [
        {
            "operator": operator,
            "sites": sum(site.operator == operator for site in sites),
            "share": sum(site.bytes_before for site in sites if site.operator == operator and site.bytes_now) / total,
            "bytes": sum(site.bytes_now for site in sites if site.operator == operator),
        }
        for operator in dict.fromkeys(site.operator for site in sites)
    ]
    if unpacked:
        size, stored = sum(size for size, _ in unpacked), sum(codes.nbytes for _, codes in unpacked)
        rows.append({"operator": UNPACKED, "sites": len(unpacked), "share": size / total, "bytes": stored})
    return [*rows, {"operator": FLOATING, "sites": 0, "share": rest / max(total, 1), "bytes": rest}]


def _is_part(node: Node) -> bool:
    """Whether a stored tensor belongs to a packed weight: only operators of ours read it, as planes, scales or zero points."""
    return all(user.target in PACKED and node not in (user.args[0], operands(user).get("bias")) for user in node.users)


def _note(executable: TritonExecutable, notes: list[str]) -> None:
    """State what users might not expect."""
    if executable.grows:
        notes.append(f"decoding appends to a cache that grows: {executable.grows}")
    for row in executable.facts["operators"]:
        if row["operator"] == UNPACKED:
            notes.append(f"{row['share']:.1%} of the weight bytes are dequantized at every call: what reads them takes no packed weights")
    if any(port.torch_dtype == torch.float32 for port in executable.signature.outputs):
        notes.append("the model computes in float32: on GPUs weights are dequantized whole at every call; load it in float16 or bfloat16")
    if executable.device.type == "cpu":
        notes.append(f"the triton backend was checked by {EAGER}")
