"""Find what a command names: models, tokenizers, texts. Code that comes with a model is never run."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ir.checkpoints import bounded, check_checkpoint
from ir.errors import DataError, FxpressError, OptionError
from ir.files import read_text
from ir.store import Store, attach
from passes.data.calibration import token_windows
from passes.folders import MANIFEST
from passes.opening import open_shards, shards

DTYPES = ("float32", "float16", "bfloat16", "auto")
LONGEST = 1 << 32  # bytes of a text
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_compiled(source: str | Path) -> bool:
    """Whether a folder was written by `Compiled.save`."""
    return (Path(source) / MANIFEST).is_file()


def load_model(source: str | Path, dtype: str = "float32", scratch: str | Path | None = None) -> PreTrainedModel:
    """The model in a folder or on the Hub, in inference mode, as the architecture that its configuration names.

    The weights of a folder of safetensors stay on disk, mapped; so do those that passes make of them. The folder is never written to.

    Args:
        source: a folder, or a name on the Hub, whose model is loaded into memory.
        dtype: float32, float16 or bfloat16; "auto" for the checkpoint's own, which alone makes no converted copy on disk.
        scratch: a folder on a disk for files that go away with the process; the system's for temporary files if None.

    Raises:
        OptionError: a dtype that is not supported.
        DataError: no such model, one that needs its own code, or weights that are missing.
    """
    source = str(source)
    if dtype not in DTYPES:
        raise OptionError(f"there is no dtype {dtype!r}", where="--dtype", remedy=f"there are {list(DTYPES)}")
    if is_compiled(source):
        raise DataError("fxpress made this folder: it holds no checkpoint", where=source, remedy="name the original model")
    if not Path(source).is_dir() and not HUB_NAME.fullmatch(source):
        raise DataError("there is no such folder", where=source, remedy="name a folder with config.json, or a model on the Hub")
    local = Path(source) if Path(source).is_dir() else None
    if local is not None:
        check_checkpoint(local)
    with _quiet(), bounded(local) if local is not None else contextlib.nullcontext():
        try:
            model, info = _loaded(source, local, dtype, Store(scratch))
        except FxpressError:
            raise
        except Exception as error:  # whatever a class says of a configuration that it did not expect
            raise DataError(
                f"cannot load the model: {_first_line(error)}", where=source, remedy="name a folder or a model on the Hub"
            ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise DataError(f"{len(missing)} weights are missing, {missing[0]} among them", where=source, remedy="complete the checkpoint")
    return model


def _loaded(source: str, local: Path | None, dtype: str, store: Store) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers tells of loading it."""
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    kind = model_class(config)
    files = shards(local, config) if local is not None and issubclass(kind, PreTrainedModel) else []
    if local is not None and files:
        model, info = open_shards(kind, local, config, files, dtype, store)
        attach(model, store)
    else:
        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        model, info = kind.from_pretrained(source, config=config, dtype=wanted, output_loading_info=True, trust_remote_code=False)
    return model.eval(), info


def model_class(config: Any) -> Any:
    """The class that a configuration names; if it names none, that of its kind: masked, else causal language model, else the bare model."""
    for name in getattr(config, "architectures", None) or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, PreTrainedModel):
            return named
    if type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        return transformers.AutoModelForMaskedLM
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def load_tokenizer(source: str | Path, *, needed: bool = True) -> Any:
    """The tokenizer in a folder or on the Hub.

    Raises:
        DataError: there is none, though one is needed.
    """
    if Path(source).is_dir():
        check_checkpoint(Path(source))
    with _quiet():
        try:
            return transformers.AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
        except Exception as error:  # each class reads its files in its own way
            if not needed:
                return None
            raise DataError(
                f"cannot load a tokenizer: {_first_line(error)}", where=str(source), remedy="put tokenizer.json there"
            ) from error


def read_texts(paths: Sequence[Path]) -> str:
    """Text files, joined by blank lines.

    Raises:
        DataError: a file that is missing, empty or not UTF-8.
    """
    parts = []
    for path in paths:
        try:
            text = read_text(path, LONGEST)
        except DataError as error:
            raise DataError(f"cannot read the text: {error.what}", where=str(path), remedy="give a text file in UTF-8") from error
        if not text.strip():
            raise DataError("the text is empty", where=str(path))
        parts.append(text)
    return "\n\n".join(parts)


def calibration_batches(text: str, tokenizer: Any, samples: int, window: int, seed: int, batch: int = 8) -> list[Tensor]:
    """`samples` windows drawn with `seed`, as token tensors `[batch, window]`, two at least: passes that learn hold one out."""
    windows = token_windows(text, tokenizer, window, samples, seed)
    return list(torch.split(windows, min(batch, -(-len(windows) // 2))))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Loading without bars and warnings of transformers; what matters of them is an error of ours."""
    logs = transformers.utils.logging
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
