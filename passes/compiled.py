"""`Compiled`: a model after its pipeline, callable like the model, saved to and loaded from a folder."""

import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ir.errors import DataError, OptionError
from ir.files import inside, read_json
from ir.signature import Signature
from ir.stated import signature_of
from passes import page, registry
from passes.backend import Backend, Executable, Movable
from passes.base import Record
from passes.calls import call_text
from passes.decoding import Choice, Decodes, Growing, decode
from passes.folders import MANIFEST, appearing_folder, temporary_files
from passes.page.saved import FILE as REPORT
from passes.recipe import Recipe
from passes.report import Report

FORMAT = 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt")


class Compiled:
    """A compressed model.

    Attributes:
        executable: the backend's result, with flat inputs and outputs.
        signature: what the inputs and outputs are called.
        graph: the quantized graph; None if loaded from a folder.
        trace: what each pass did.
    """

    def __init__(
        self,
        executable: Executable,
        signature: Signature,
        backend: str,
        graph: GraphModule | None = None,
        report: Report | None = None,
        recipe: Recipe | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.executable, self.signature, self.backend, self.graph = executable, signature, backend, graph
        self._report, self._recipe, self._tokenizer = report, recipe, tokenizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it like the model: the same argument names, the same outputs.

        Raises:
            DataError: an unknown or missing input, or one of a wrong shape or dtype.
        """
        return self.signature.wrap(self.executable(*self.signature.bind(*args, **kwargs)))

    def stream(
        self, input_ids: Tensor, tokens: int = 64, *, attention_mask: Tensor | None = None, end: int | None = None, **choice: Any
    ) -> Iterator[Tensor]:
        """Decode with the cache: yields the next token of every row, int64 `[batch]`, up to `tokens` times.

        Backends with a decoder of their own use it (`triton`: a cache of fixed size, on GPUs one captured step); others are called.

        Args:
            input_ids: the prompt, int64 `[batch, length]`; shorter rows are padded on the left.
            tokens: to make at most.
            attention_mask: int64 `[batch, length]`, 0 where padded; all ones if None.
            end: rows that have produced this token go on with it, and decoding stops once all have.
            choice: of the next token, as of `passes.decoding.Choice`: `temperature`, `top_k`, `seed`.

        Raises:
            OptionError: the model keeps no cache, or an option has no sense.
        """
        if not self.signature.causal:
            raise OptionError("the model keeps no cache: it is not a decoder", remedy="generate with causal language models")
        chosen, ids = Choice(**choice), input_ids.to(self.device)
        mask = None if attention_mask is None else attention_mask.to(self.device)
        made = self.executable.decoder(ids.shape[0], ids.shape[1] + tokens) if isinstance(self.executable, Decodes) else None
        return decode(made or Growing(self), ids, tokens, mask, end, chosen)

    def generate(self, input_ids: Tensor, tokens: int = 64, **options: Any) -> Tensor:
        """The prompt and what `stream` adds to it, int64 `[batch, length + added]`; options as of `stream`."""
        new = list(self.stream(input_ids, tokens, **options))
        return torch.cat([input_ids.to(self.device), *(token[:, None] for token in new)], -1)

    @property
    def device(self) -> torch.device:
        """Where inputs have to be."""
        return getattr(self.executable, "device", torch.device("cpu"))

    def to(self, device: str | torch.device) -> "Compiled":
        """Move the model to a device, in place, and return it.

        Raises:
            OptionError: the backend has no choice of devices, or there is no such device.
        """
        if not isinstance(self.executable, Movable):
            raise OptionError(f"what the {self.backend} backend makes has no choice of devices", where="Compiled.to")
        try:
            self.executable.to(torch.device(device))
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise OptionError(
                f"the model cannot move to {device}: {reason}", where="Compiled.to", remedy="name cpu, or a device"
            ) from error
        return self

    @property
    def trace(self) -> Sequence[Record]:
        """What each pass did: `.text`, `.effect`, `.sites`, `.seconds`, `.difference`."""
        return self.report().trace

    @property
    def coverage(self) -> float:
        """Share of the weight bytes that is compressed."""
        return self.report().coverage.share

    @property
    def effective_bits(self) -> float:
        """Bits per compressed weight, scales and zero points counted."""
        return self.report().coverage.effective_bits

    def report(self) -> Report:
        """The report of the compile; of a loaded model it is in the folder's `report.json`."""
        if self._report is None:
            raise OptionError("a loaded model has no report in memory", remedy="read report.json or report.html in its folder")
        return self._report

    def lowered(self, backend: "str | Backend") -> "Compiled":
        """The same quantized graph on another backend: the same integers, for a second folder.

        Raises:
            OptionError: the model was loaded, so that its graph is not known.
            BackendError, CoverageError: the backend cannot have it.
        """
        if self.graph is None or self._report is None:
            raise OptionError("a loaded model has no graph to lower", where="Compiled.lowered", remedy="call it on what compile returned")
        target: Backend = registry.backend(backend) if isinstance(backend, str) else backend
        of_passes = self._report.notes[: len(self._report.notes) - self._report.lowering]
        remarks: list[str] = []
        with temporary_files():
            executable = target.lower(self.graph, self.graph.meta["example"], remarks)
        notes = [*of_passes, *remarks]
        report = replace(self._report, backend=target.name, notes=notes, target=executable.report(), lowering=len(remarks))
        recipe = self._recipe and self._recipe.model_copy(update={"backend": call_text(target.name, target)})
        return Compiled(executable, self.signature, target.name, self.graph, report, recipe, self._tokenizer)

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write a folder that `passes.load` reads: the backend's files, recipe, report (data and page), and tokenizer files where known.

        The folder appears complete, or not at all.

        Raises:
            OptionError: the folder exists and `overwrite` is not set, or it holds something that fxpress did not write.
            DataError: it cannot be written.
        """
        directory = Path(directory).resolve()
        with appearing_folder(directory, overwrite) as partial:
            self.executable.save(partial)
            manifest = {"format": FORMAT, "backend": self.backend, "signature": self.signature.to_json()}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            if self._report is not None:
                self._report.target |= self.executable.report()
                (partial / REPORT).write_text(json.dumps(self._report.to_json(), indent=1, default=str), encoding="utf-8")
                _write_page(partial)
            if self._recipe is not None:
                self._recipe.write(partial / "recipe.yaml")
            _save_tokenizer(self._tokenizer, partial)
        return directory


def _write_page(directory: Path) -> None:
    """The report as a page; tables that it cannot draw, which passes of others may write, cost the page and not the model."""
    try:
        page.write_report(directory)
    except DataError as error:
        warnings.warn(f"{page.FILE} was not written: {error}", stacklevel=3)


def _save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write a tokenizer's files: a tokenizer object's own, or those in the folder it was given as."""
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(directory)
    elif tokenizer is not None:
        for name in TOKENIZER_FILES:
            if (Path(tokenizer) / name).is_file():
                shutil.copyfile(inside(Path(tokenizer), name), directory / name)


def load(directory: str | Path) -> Compiled:
    """The model that `Compiled.save` wrote. Nothing in the folder is executed.

    Raises:
        DataError: not such a folder, or a damaged one.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).exists():
        raise DataError(f"not a folder that fxpress saved: there is no {MANIFEST}", where=str(directory))
    try:
        manifest = read_json(inside(directory, MANIFEST))
        if manifest["format"] != FORMAT:
            raise DataError(f"the folder has format {manifest['format']}, this version reads {FORMAT}", where=str(directory))
        backend, signature = str(manifest["backend"]), signature_of(manifest["signature"])
        if not backend.isidentifier():  # options are the caller's, not the folder's
            raise DataError(f"{backend!r} is not the name of a backend", where=str(directory))
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise DataError(f"not a folder that fxpress saved: {error}", where=str(directory)) from error
    return Compiled(registry.backend(backend).load(directory), signature, backend)
