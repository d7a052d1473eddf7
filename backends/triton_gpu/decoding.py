"""Decode with a static cache: one step of fixed shapes, on NVIDIA GPUs captured once as a CUDA graph and replayed."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from backends.triton_gpu.static import static_step
from ir.errors import BackendError, OptionError
from ir.place import device_of, on
from ir.signature import CACHE, PRESENT, TOKENS, Signature

WARM_UPS = 3  # steps before the capture: kernels are compiled and libraries choose theirs in the first
ROUNDED_TO = 64  # capacities, so that prompts of about one length share a captured step
KNOWN = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


class StaticDecoder:
    """Decodes one batch at a time.

    Args:
        gm: a fused graph of a causal language model, on the device to decode on.
        signature: of the graph.
        batch: rows.
        capacity: tokens of each row that the cache has room for, prompt included; rounded up.

    Raises:
        BackendError: the graph has inputs that a step cannot make up, or does something else with its cache than to append to it.
    """

    def __init__(self, gm: GraphModule, signature: Signature, batch: int, capacity: int) -> None:
        check_inputs(signature)
        self.gm, self.signature, self.batch = gm, signature, batch
        self.capacity = -(-capacity // ROUNDED_TO) * ROUNDED_TO
        self._step, device = static_step(gm, signature), device_of(gm)
        self.device, self._filled = device, 0
        self._named = {
            "input_ids": torch.zeros(batch, 1, dtype=torch.int64, device=device),
            "attention_mask": torch.zeros(batch, self.capacity, dtype=torch.int64, device=device),
            "position_ids": torch.zeros(batch, 1, dtype=torch.int64, device=device),
            "token_type_ids": torch.zeros(batch, 1, dtype=torch.int64, device=device),
        }
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._caches = {port.name: self._room(port.shape, port.torch_dtype) for port in signature.inputs if port.cached}
        self.busy = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def _room(self, shape: Sequence[int | None], dtype: torch.dtype) -> Tensor:
        sizes = [{0: self.batch, TOKENS: self.capacity}.get(axis, size) for axis, size in enumerate(shape)]
        return torch.zeros([size or 0 for size in sizes], dtype=dtype, device=self.device)

    @torch.no_grad()
    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read a prompt, int64 `[batch, length]` with a mask of the same shape; returns the logits `[batch, vocabulary]` after it.

        Raises:
            OptionError: the prompt has other rows than the decoder, or no room.
        """
        if ids.shape[0] != self.batch or ids.shape[1] > self.capacity:
            raise OptionError(f"a prompt {list(ids.shape)} does not fit into {self.batch} rows of {self.capacity} tokens")
        with on(self.device):
            outputs = self.gm(*self.signature.bind(input_ids=ids, attention_mask=mask))
        for port, kept in zip(self.signature.outputs, outputs, strict=True):
            if port.cached:
                self._caches[port.name.replace(PRESENT, CACHE, 1)].zero_().narrow(TOKENS, 0, ids.shape[1]).copy_(kept)
        self._named["attention_mask"].zero_()[:, : ids.shape[1]] = mask
        self._named["position_ids"].copy_(mask.sum(-1, keepdim=True))
        self._slot.fill_(ids.shape[1])
        self._filled = ids.shape[1]
        logits: Tensor = outputs[0][:, -1]
        return logits

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Read one more token of every row, int64 `[batch, 1]`; returns the logits `[batch, vocabulary]` after it, until the next.

        Raises:
            OptionError: the cache is full.
        """
        if self._filled == self.capacity:
            raise OptionError(f"the cache is full: it has room for {self.capacity} tokens", remedy="ask for more when decoding starts")
        self._named["input_ids"].copy_(ids)
        self._filled += 1
        if self.device.type != "cuda":
            return self._advance()
        with on(self.device):
            if self._graph is None:
                self._capture()
            assert self._graph is not None and self._logits is not None
            self._graph.replay()
        return self._logits

    def release(self) -> None:
        """Let another generation have it."""
        self.busy = False

    def _advance(self) -> Tensor:
        """What is captured: the step, and the state moved on by one token."""
        self._named["attention_mask"].index_fill_(1, self._slot, 1)
        inputs = [self._caches.get(port.name, self._named.get(port.name)) for port in self.signature.inputs]
        logits: Tensor = self._step(*inputs, self._slot)[0][:, -1]
        self._slot += 1
        self._named["position_ids"] += 1
        return logits

    def _capture(self) -> None:
        """Record one step. What warm-ups write is undone, or written again by the first step."""
        state = [self._named["attention_mask"], self._named["position_ids"], self._slot]
        before = [tensor.clone() for tensor in state]

        def undo() -> None:
            for tensor, was in zip(state, before, strict=True):
                tensor.copy_(was)

        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._advance()
                undo()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._advance()
        self._graph = graph


def check_inputs(signature: Signature) -> None:
    """Return if a step can make up all inputs.

    Raises:
        BackendError: it is no causal language model, or has an input that is not known.
    """
    unknown = [port.name for port in signature.inputs if not port.cached and port.name not in KNOWN]
    if not signature.causal or unknown:
        raise BackendError(f"it has inputs that steps cannot make up: {unknown}" if unknown else "it is no causal language model")
