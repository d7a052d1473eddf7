import pytest
import torch
from torch import nn

from ir.canonical import canonicalize
from ir.capture import capture
from ir.channels import Map, channel_groups
from tests.ir.channels.samples import group_of, sample, verdict

SCALE, ROTATE, LINEAR, PERMUTE, SELECT, CENTER = Map.SCALE, Map.ROTATE, Map.LINEAR, Map.PERMUTE, Map.SELECT, Map.CENTER


@pytest.mark.parametrize(
    ("name", "kind", "verdict_of_a"),
    [
        ("linears", LINEAR, "1 x 16"),
        ("linears", SELECT, "16 x 1"),
        ("linears", CENTER, "reads it without a norm"),
        ("computed bias", SCALE, "the bias of linear in linear is computed"),
        ("computed weight", ROTATE, "computed, or quantized already"),
        ("dequantized", SCALE, "computed, or quantized already"),
        ("weight of the input", ROTATE, "computed, or quantized already"),
        ("linear of heads", ROTATE, "1 x 4"),
        ("called twice", ROTATE, "1 x 16"),
        ("called on its own output", LINEAR, "1 x 16"),
        ("rms", ROTATE, "1 x 16"),
        ("rms", LINEAR, "fixes the length of its vectors"),
        ("rms", SCALE, "weighs its channels by their size"),
        ("rms", SELECT, "runs over all its channels"),
        ("rms", CENTER, "does not subtract the mean"),
        ("rms with gain", ROTATE, "has a gain or bias that is not folded"),
        ("rms with gain", PERMUTE, "1 x 16"),
        ("rms with computed gain", PERMUTE, "the weight of rms_norm in rms_norm is computed"),
        ("rms of heads", ROTATE, "4 x 4"),
        ("rms of two axes", ROTATE, "normalizes several axes at once"),
        ("layer norm", ROTATE, "subtracts the mean"),
        ("layer norm", CENTER, "1 x 16"),
        ("layer norm with gain and bias", PERMUTE, "1 x 16"),
        ("layer norm by hand", SCALE, "adds up its channels"),  # the capture leaves it decomposed
        ("residual", ROTATE, "1 x 16"),
        ("gram", LINEAR, "multiplies channels by channels"),
        ("values added to the input", SCALE, "adds it to what was not followed"),
        ("transposed values", ROTATE, "4 x 4"),
    ],
)
def test_between_two_linears(name, kind, verdict_of_a):
    assert verdict_of_a in verdict(name, kind, "a")


@pytest.mark.parametrize(
    ("name", "kind", "path", "expected"),
    [
        ("rms", SCALE, "b", "16 x 1"),  # the norm gets a gain
        ("rms with gain", SCALE, "g", "16 x 1"),
        ("rms of heads with gain", SCALE, "g", "4 x 1"),
        ("layer norm with gain and bias", SCALE, "c", "16 x 1"),
        ("attention", ROTATE, "q", "4 x 4"),
        ("attention", LINEAR, "k", "4 x 4"),
        ("attention", PERMUTE, "v", "4 x 4"),
        ("attention", SELECT, "v", "4 x 1"),  # whole heads
        ("grouped attention", SELECT, "q", "2 x 1"),
        ("grouped attention as one", SELECT, "q", "2 x 1"),
        ("attention of one head", SELECT, "q", "compares them"),
        ("attention with a learned mask", SELECT, "v", "has a mask for each head"),
        ("attention, batched", SELECT, "v", "compares them"),
        ("partly rotary", SELECT, "k", "4 x 1"),
        ("fused", SELECT, "a", "4 x 1"),
        ("fused by head", SELECT, "a", "4 x 1"),
        ("attention of rank 3", SELECT, "v", "compares them"),
        ("attention of rank 3", ROTATE, "v", "1 x 16"),
        ("attention of rank 3", CENTER, "q", "compares them"),
        ("attention of one head", ROTATE, "v", "1 x 4"),
        ("attention of one head", LINEAR, "q", "1 x 4"),
        ("grouped attention", ROTATE, "v", "2 x 4"),
        ("grouped attention as one", LINEAR, "q", "2 x 4"),
        ("attention, batched", ROTATE, "v", "4 x 4"),
        ("rotary", ROTATE, "q", "scales its channels"),
        ("rotary", SCALE, "q", "8 x 1"),
        ("partly rotary", SCALE, "k", "12 x 1"),
        ("fused", ROTATE, "b", "4 x 4"),
        ("fused by head", LINEAR, "b", "4 x 4"),
    ],
)
def test_norms_and_attention(name, kind, path, expected):
    assert expected in verdict(name, kind, path, axis=1 if path == "b" else 0)


def test_a_part_of_each_head_may_turn_where_the_rest_is_turned_by_position():
    assert "scales its channels" in verdict("partly rotary", ROTATE, "q", at=0)
    assert verdict("partly rotary", ROTATE, "q", at=2) == "4 x 2"


def test_grouped_heads_are_read_once_for_each_of_their_queries():
    group = group_of(sample("grouped attention"), ROTATE, "v")
    (reader,) = group.readers
    assert reader.path == "o"
    assert reader.channels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]


@pytest.mark.parametrize("name", ["fused", "fused by head"])
def test_fused_projections_are_parted(name):
    scored, valued = (group_of(sample(name), LINEAR, "a", at=at) for at in (0, 47))
    assert scored is not valued
    assert not scored.readers
    assert [member.path for member in valued.readers] == ["b"]
    assert sorted(member.power for member in scored.members) == [-1, 1]  # queries and keys
    assert sum(int((member.channels >= 0).sum()) for member in (*scored.members, *valued.writers)) == 48


class Tied(nn.Module):
    """A table that embeds and that scores, with or without a norm in between."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 16, padding_idx=0)
        self.norm = nn.RMSNorm(16, elementwise_affine=False) if norm else nn.Identity()

    def forward(self, tokens):
        return nn.functional.linear(self.norm(self.table(tokens)), self.table.weight)


def test_a_tied_table_turns_but_does_not_scale():
    gm = capture(Tied(norm=False), args=(torch.randint(32, (2, 3)),))
    canonicalize(gm)
    assert [str(group) for group in channel_groups(gm, ROTATE) if not group.reason] == ["rotate 1 x 16: table.weight -> nothing"]
    (group,) = [group for group in channel_groups(gm, SCALE) if group.members[0].axis == 1]
    assert group.reason == "the map would have to be its own inverse"
    rows = next(group for group in channel_groups(gm, PERMUTE) if group.members[0].axis == 0)
    assert rows.reason == "it is an output of the model"


class Looked(nn.Module):
    """A table whose rows are picked by token, and which is a linear's weight elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, tokens, x):
        return self.table(tokens), self.b(nn.functional.linear(self.a(x), self.table.weight))


def test_rows_of_a_table_are_not_channels():
    gm = capture(Looked(), args=(torch.randint(16, (2, 3)), torch.randn(2, 3, 16)))
    canonicalize(gm)
    assert "embedding in table reads table.weight too" in group_of(gm, SCALE, "table.weight", axis=0).reason


class Nested(nn.Module):
    """A layer norm over a part of what another one runs over."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(24, 4)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(torch.cat([nn.functional.layer_norm(x, [16]), nn.functional.layer_norm(x[..., :8], [8])], -1))


def test_nested_layer_norms_have_no_common_mean():
    gm = capture(Nested(), args=(torch.randint(32, (2, 3)),))
    canonicalize(gm)
    assert "runs over more than these channels" in group_of(gm, CENTER, "embed.weight", axis=1).reason
