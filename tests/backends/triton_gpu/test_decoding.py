from dataclasses import replace

import pytest
import torch

import passes
from backends.triton_gpu.decoding import ROUNDED_TO, StaticDecoder, check_inputs
from ir.errors import BackendError, OptionError
from ir.signature import Port
from passes.decoding import Growing, decode
from tests.families import VOCABULARY


@pytest.fixture(scope="module", params=["w8a16", "w8a8(cache=4)"])
def compiled(request, families):
    """A Llama with its cache in floats, or with 8-bit activations and its cache in 4 bits."""
    return passes.compile(families("llama").graph(), request.param, backend="triton")


def prompt(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


def test_tokens_are_those_of_a_cache_that_grows(compiled):
    ids, mask = prompt(), torch.ones(2, 7, dtype=torch.int64)
    mask[1, :3] = 0
    ours = list(compiled.stream(ids, 64, attention_mask=mask))
    growing = list(decode(Growing(compiled), ids, 64, mask))
    assert len({tuple(token.tolist()) for token in ours}) > 4
    assert torch.equal(torch.stack(ours), torch.stack(growing))


def test_a_decoder_is_used_again_once_it_is_free(compiled):
    executable = compiled.executable
    first, expected = compiled.stream(prompt(), 8), compiled.generate(prompt(), 8)
    token = next(first)
    assert torch.equal(torch.stack([token, *first], 1), expected[:, 7:])  # another generation came between
    kept = executable.decoder(2, 20)
    assert executable.decoder(2, 20) is not kept
    executable._decoder.release()
    again = executable._decoder
    assert executable.decoder(2, ROUNDED_TO) is again
    assert executable.decoder(3, 20) is not again


def test_a_full_cache_and_other_rows_are_refused(compiled):
    decoder = StaticDecoder(compiled.executable.gm, compiled.signature, 2, 1)
    assert decoder.capacity == ROUNDED_TO
    decoder.prefill(prompt(2, ROUNDED_TO), torch.ones(2, ROUNDED_TO, dtype=torch.int64))
    with pytest.raises(OptionError, match="full"):
        decoder.step(torch.ones(2, 1, dtype=torch.int64))
    with pytest.raises(OptionError, match="does not fit"):
        decoder.prefill(prompt(3), torch.ones(3, 7, dtype=torch.int64))


def test_what_steps_cannot_make_up_is_refused(families):
    signature = families("llama").signature
    with pytest.raises(BackendError, match="causal"):
        check_inputs(replace(signature, outputs=signature.outputs[1:]))
    with pytest.raises(BackendError, match="pixel_values"):
        check_inputs(replace(signature, inputs=(*signature.inputs, Port("pixel_values", "float32", (None, 3)))))
