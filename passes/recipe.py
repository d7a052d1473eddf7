"""`Recipe`: what it takes to replay a compile exactly, as YAML beside every result."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic
import torch
import yaml
from torch import Tensor
from torch.fx import GraphModule

from ir import edit
from ir.errors import DataError, OptionError
from ir.files import read_text

if TYPE_CHECKING:
    from passes.base import Pass

LONGEST = 1 << 20  # bytes of a recipe
PACKAGES = ("fxpress", "torch", "transformers", "onnx", "onnxruntime-gpu", "onnxruntime")


class _Plain(yaml.SafeLoader):
    """Plain data without aliases, of which a few lines make gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a recipe has no aliases")
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


class Recipe(pydantic.BaseModel):
    """The pipeline's text, the backend, the seed, versions, and fingerprints of weights and calibration data."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    pipeline: str
    backend: str
    seed: int
    versions: dict[str, str]
    weights: str
    calibration: str

    def write(self, path: Path) -> None:
        """Write YAML."""
        path.write_text(yaml.safe_dump(self.model_dump(), sort_keys=False), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """The recipe in a file.

        Raises:
            OptionError: not a recipe.
        """
        try:
            return cls.model_validate(yaml.load(read_text(path, LONGEST), _Plain))
        except DataError as error:
            raise OptionError(f"not a recipe: {error.what}", where=str(path)) from error
        # Beside its own errors, the parser raises Python's for values that are not what their tags say, and for depth.
        except (yaml.YAMLError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise OptionError(f"not a recipe: {(str(error).splitlines() or [type(error).__name__])[0]}", where=str(path)) from error

    def check_files(self, steps: "Iterable[Pass]") -> None:
        """Refuse passes that read or write files elsewhere: a recipe may come from anybody.

        Raises:
            OptionError: an option names a file that does not lie below the working folder.
        """
        here = Path.cwd().resolve()
        for step in steps:
            for option in step.files:
                name = getattr(step, option)
                if name and ("\0" in name or not Path(os.path.realpath(name)).is_relative_to(here)):
                    raise OptionError(
                        f"the recipe names the file {name!r}, outside of the working folder",
                        where=f"{step.name()}({option}=...)",
                        remedy="replay it in the folder of that file, or compile with the recipe's pipeline text if you trust it",
                    )

    def check(self, weights: str, calibration: str) -> None:
        """Refuse to replay on other weights or other calibration data.

        Raises:
            DataError: a fingerprint differs.
        """
        for name, mine, given in (("weights", self.weights, weights), ("calibration data", self.calibration, calibration)):
            if mine != given:
                raise DataError(
                    f"the recipe was made with other {name} ({mine}, given {given})",
                    remedy="use the recipe's pipeline text to compile anew",
                )


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            continue
    return found


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of names, dtypes, shapes and bytes, one tensor at a time; `none` for no tensors."""
    digest, empty = hashlib.blake2b(digest_size=16), True
    for name, tensor in tensors:
        empty = False
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return "none" if empty else digest.hexdigest()


def weights_fingerprint(gm: GraphModule) -> str:
    """The digest of all parameters and buffers of a graph."""
    stored = sorted([*gm.named_parameters(), *gm.named_buffers()], key=lambda pair: pair[0])
    return fingerprint((name, edit.counted(gm, tensor)) for name, tensor in stored)


def calibration_fingerprint(batches: Sequence[Sequence[Tensor]]) -> str:
    """The digest of flat calibration inputs."""
    return fingerprint((f"{i}.{j}", tensor) for i, batch in enumerate(batches) for j, tensor in enumerate(batch))
