"""`OnnxExecutable`: a model file, its session and its report; and the folder they are saved as."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as onir
import onnxruntime
import torch
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from torch import Tensor

from backends.onnx_qdq.genai import genai_config
from backends.onnx_qdq.legal import INLINE
from backends.onnx_qdq.session import known_entries, open_session, run_flat
from ir.deferred import READ
from ir.errors import DataError
from ir.files import inside
from ir.signature import Signature
from ir.stated import signature_of
from ir.store import Store

MODEL, WEIGHTS, GENAI = "model.onnx", "model.onnx.data", "genai_config.json"
PROPERTY = "fxpress"  # the model's metadata entry that holds signature, session settings and report


def write(model: onir.Model, directory: Path, store: Store | None = None) -> Path:
    """Write a model and its weights, which are always external; both appear under their names only when they are complete.

    Args:
        model: its weights are made one by one.
        directory: of the files.
        store: that holds the tensors that they are made of.
    """

    def count(tensor: onir.TensorProtocol, *_: Any) -> None:
        if store is not None:
            store.count(READ * tensor.nbytes)

    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as scratch:
        onir.save(model, Path(scratch) / MODEL, external_data=WEIGHTS, size_threshold_bytes=INLINE, callback=count)
        _move(Path(scratch), directory)
    return directory / MODEL


def weight_bytes(path: Path) -> int:
    """The size of the file of a model's weights."""
    weights = path.with_name(WEIGHTS)
    return weights.stat().st_size if weights.exists() else 0


def _move(source: Path, directory: Path) -> None:
    """Rename the files of a folder into another on the same disk, the model last."""
    for name in (WEIGHTS, MODEL):
        if (source / name).exists():
            (source / name).replace(directory / name)


class OnnxExecutable:
    """A lowered model in ONNX Runtime: call it with flat tensors, save it, load it.

    Args:
        path: the model file.
        properties: what was written into the model's metadata: signature, session settings, report and the genai configuration.
        session: a session over the file; None to open one when it is needed.
        folder: a temporary folder that holds the file and goes with this object.
        threads: of sessions, within an operator; 0 leaves it to ONNX Runtime.
    """

    def __init__(
        self,
        path: Path,
        properties: Mapping[str, Any],
        session: onnxruntime.InferenceSession | None = None,
        folder: "tempfile.TemporaryDirectory[str] | None" = None,
        threads: int = 0,
    ) -> None:
        self._path, self._session, self._properties, self._folder, self._threads = path, session, properties, folder, threads
        self.signature = signature_of(properties["signature"])

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Flat outputs in the order and the dtypes of the signature."""
        with torch.no_grad():
            outputs = run_flat(self.session, inputs)
        return tuple(y.to(port.torch_dtype) for y, port in zip(outputs, self.signature.outputs, strict=True))

    @property
    def session(self) -> onnxruntime.InferenceSession:
        """The session that runs the model; it takes memory for all weights from then on."""
        if self._session is None:
            self._session = open_session(self._path, known_entries(self._properties["session"]), threads=self._threads)
        return self._session

    def model(self) -> onir.Model:
        """The model in memory, weights included."""
        model = onir.load(self._path)
        return onir.external_data.load_to_model(model)

    def report(self) -> dict[str, Any]:
        """Form and storage per site, operators that run, difference from the oracle on the probe, bytes on disk."""
        files = [self._path.with_name(name) for name in (MODEL, WEIGHTS)]
        return {**self._properties["report"], "bytes": sum(file.stat().st_size for file in files if file.exists())}

    def save(self, directory: str | Path) -> None:
        """Write `model.onnx`, `model.onnx.data` and, for decoders, `genai_config.json`."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        if target.resolve() != self._path.parent.resolve():
            with tempfile.TemporaryDirectory(dir=target, prefix=".writing-") as scratch:
                for name in (MODEL, WEIGHTS):
                    if self._path.with_name(name).exists():
                        shutil.copyfile(self._path.with_name(name), Path(scratch) / name)
                _move(Path(scratch), target)
        config = self._properties.get("genai")
        if config is not None:
            (target / GENAI).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path, *, threads: int = 0) -> "OnnxExecutable":
        """The executable that `save` wrote.

        Raises:
            DataError: there is no such model, or another program wrote it.
        """
        path = inside(Path(directory), MODEL)
        properties = _properties(path)
        executable = cls(path, properties, threads=threads)
        session, signature = executable.session, executable.signature
        sides = ((session.get_inputs(), signature.inputs), (session.get_outputs(), signature.outputs))
        if any([port.name for port in has] != [port.name for port in states] for has, states in sides):
            raise DataError("the model has other inputs or outputs than it states", where=str(path))
        return executable


def _properties(path: Path) -> dict[str, Any]:
    """What a model's metadata says, after a look at where its weights lie: nothing is read but `model.onnx.data` beside it.

    Raises:
        DataError: the file is damaged, another program wrote it, or it names other files.
    """
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
        texts = {entry.key: entry.value for entry in model.metadata_props}
        properties: Any = json.loads(texts.get(PROPERTY, "null"))
    except (DecodeError, OSError, RecursionError, ValueError) as error:
        raise DataError(f"this is no model: {error}", where=str(path)) from error
    if properties is None:
        raise DataError("fxpress did not write this model", where=str(path), remedy="open it with onnxruntime")
    parts = [properties.get(part) for part in ("signature", "session", "report")] if isinstance(properties, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise DataError("the model's metadata is damaged", where=str(path))
    files = {name for tensor in _tensors(model) for name in _files(tensor)}
    others = sorted(map(repr, files - {WEIGHTS}))  # protobuf gives text that is no UTF-8 as bytes
    if others:
        raise DataError(f"weights lie in {others[0]}, not in {WEIGHTS}", where=str(path), remedy="do not use this model")
    if files:
        inside(path.parent, WEIGHTS)
    return properties  # type: ignore[no-any-return]


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """All tensors within a message, whatever holds them."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if isinstance(value, Sequence) else [value]:
                yield from _tensors(part)


def _files(tensor: onnx.TensorProto) -> Iterator[str]:
    """The names of the files that a tensor lies in."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        yield from [entry.value for entry in tensor.external_data if entry.key == "location"] or [""]


def properties_of(signature: Signature, entries: Mapping[str, str], config: Any) -> dict[str, Any]:
    """What a model's metadata says about it, before the report is known."""
    genai = None if config is None else genai_config(config, signature, entries, MODEL)
    return {"signature": signature.to_json(), "session": dict(entries), "genai": genai}
