"""Time our ONNX models against float32 and against ONNX Runtime's own quantizers, on one small decoder.

    python tools/bench_onnx_forms.py [--hidden 1024] [--layers 2] [--rounds 15]

Runs are interleaved and the ratios of the medians of processor time (which other programs disturb less)
printed: one thread, decode (one token, 128 cached) and prefill (128 tokens).
`error` is the relative difference of the prefill's logits from those of the float32 model.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import transformers
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import Tensor
from torch.fx import GraphModule

from backends.onnx_qdq import OnnxQdq
from backends.onnx_qdq.session import open_session, session_entries
from ir.capture import capture
from passes.annotate import Annotate
from passes.base import Context
from passes.canonicalize import Canonicalize
from passes.quantize import Quantize
from passes.untie import Untie

PAST = PREFILL = 128
SCHEMES = {
    "W4A16 g128": Annotate("W4A16", group=128, head=True),
    "W4A16 g32": Annotate("W4A16", group=32, head=True),
    "W4A16 per channel": Annotate("W4A16", head=True),
    "W8A16 per channel": Annotate("W8A16", head=True),
    "W2A16 g64": Annotate("W2A16", group=64, head=True),
    "W8A8": Annotate("W8A8", head=True),
    "W4A8 per channel": Annotate("W4A8", head=True),
    "W4A8 g128": Annotate("W4A8", group=128, head=True),
}


def model(hidden: int, layers: int) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4 // 64 * 64, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256, vocab_size=4096, max_position_embeddings=2048,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def inputs(gm: GraphModule, length: int, past: int) -> list[Tensor]:
    signature = gm.meta["signature"]
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(4096, (1, length), generator=generator)
    caches = [p for p in signature.inputs if p.name.startswith("past")]
    cache = [torch.randn(1, p.shape[1], past, p.shape[3], generator=generator) for p in caches]
    return signature.bind(input_ids=tokens, past_key_values=list(zip(cache[::2], cache[1::2], strict=True)))


def ours(gm: GraphModule, scheme: Annotate | None, directory: Path) -> Path:
    if (directory / "model.onnx").exists():
        return directory / "model.onnx"
    gm, notes = capture(gm), list[str]()
    for step in (Untie(), scheme, Quantize()) if scheme is not None else ():
        step.run(gm, Context())
    gm.recompile()
    executable = OnnxQdq(threads=1).lower(gm, inputs(gm, 4, 3), notes)
    executable.save(directory)
    report = executable.report()
    print(f"{directory.name:28} {report['bytes'] / 1e6:7.1f} MB  {'; '.join(notes)}", flush=True)
    return directory / "model.onnx"


def folded(source: Path, target: Path) -> Path:
    """The float model with constants folded, in which the peers find their weights."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return target


def peers(source: Path, directory: Path) -> dict[str, Path]:
    made: dict[str, Path] = {}
    for block in (128, 32):
        quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=block, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        made[f"peer 4-bit b{block}"] = directory / f"nbits{block}.onnx"
        quantizer.model.save_model_to_file(str(made[f"peer 4-bit b{block}"]))
    for name, kind, reduce in (
        ("int8 (saturates)", QuantType.QInt8, False),
        ("int7", QuantType.QInt8, True),
        ("uint8", QuantType.QUInt8, False),
    ):
        made[f"peer dynamic {name}"] = directory / f"dynamic_{kind.name}_{reduce}.onnx"
        quantize_dynamic(source, made[f"peer dynamic {name}"], op_types_to_quantize=["MatMul"], weight_type=kind, reduce_range=reduce)
    return made


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            if round_:
                times[name].append(time.thread_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--directory", type=Path, help="where models are kept, and found again")
    parser.add_argument("--only", nargs="*", default=list(SCHEMES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    gm = capture(model(options.hidden, options.layers))
    Canonicalize().run(gm, Context())
    with tempfile.TemporaryDirectory() as scratch:
        report(gm, made(gm, options.only, options.directory or Path(scratch)), options.rounds)


def made(gm: GraphModule, schemes: list[str], directory: Path) -> dict[str, Path]:
    files = {"float32": ours(gm, None, directory / "float32")}
    files |= {name: ours(gm, SCHEMES[name], directory / name) for name in schemes}
    return files | peers(folded(files["float32"], files["float32"].with_name("folded.onnx")), directory)


def report(gm: GraphModule, files: dict[str, Path], rounds: int) -> None:
    """Ratios over float32, and errors."""
    entries = session_entries(4)
    sessions = {name: open_session(path, {} if name.startswith("peer") else entries, threads=1) for name, path in files.items()}
    ratios: dict[str, dict[str, float]] = {}
    for phase, values in {"decode": inputs(gm, 1, PAST), "prefill": inputs(gm, PREFILL, 0)}.items():
        feeds = {port.name: x.numpy() for port, x in zip(gm.meta["signature"].inputs, values, strict=True)}
        logits = {name: session.run(["logits"], feeds)[0] for name, session in sessions.items()}
        times = interleaved({name: lambda s=session, f=feeds: s.run(None, f) for name, session in sessions.items()}, rounds)
        ratios[phase] = {name: times["float32"] / value for name, value in times.items()}
        exact = logits["float32"]
        ratios[f"{phase} error"] = {name: float(np.linalg.norm(y - exact) / np.linalg.norm(exact)) for name, y in logits.items()}
        ratios[f"{phase} ms"] = {name: value * 1e3 for name, value in times.items()}
    print(f"{'':28}" + "".join(f"{phase:>15}" for phase in ratios))
    for name in files:
        print(f"{name:28}" + "".join(f"{column[name]:15.3f}" for column in ratios.values()))


if __name__ == "__main__":
    main()
