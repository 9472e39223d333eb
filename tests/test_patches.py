"""Each transform alone keeps the numbers and removes what it should; broken transforms are noticed."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner
from tolerances import PATCHED_ABSOLUTE, PATCHED_RELATIVE
from torch import nn

from glmexport import export_ops
from glmexport.cli.main import cli
from glmexport.config import ModelConfig, SpecialIds
from glmexport.equivalence import check_patch
from glmexport.errors import ExportError
from glmexport.models import chatglm_6b as reference
from glmexport.patch import Transform, all_patches
from glmexport.patches import _attention, _linear, _modules, _rope
from glmexport.patches.chatglm_6b import CHATGLM_6B

CONFIG = ModelConfig("chatglm-6b", 64, 48, 2, 3, 80, 2048, 1e-5, 0, SpecialIds(50, 51, 54, 55, 3, 5))
HEADS, HEAD_DIM = CONFIG.num_heads, CONFIG.head_dim
SEQ, BATCH, PAST = 5, 2, 4
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # from inside torch.export
TRANSFORMS = {transform.name: transform for transform in CHATGLM_6B.transforms}
PREFIX = ("split-heads", "rotary-by-angle", "matmul-attention")  # these leave every module's signature as it was


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def unpatched() -> nn.Module:
    model = CHATGLM_6B.build_reference(CONFIG)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return model


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def patched_by(model: nn.Module, *names: str) -> nn.Module:
    model = copy.deepcopy(model)
    for name in names:
        model = TRANSFORMS[name].apply(model)
    return model


def positions(seq: int = SEQ, offset: int = 0) -> torch.Tensor:
    """int64 [batch, 2, seq], another line of numbers in every row."""
    places = torch.arange(seq) + offset
    return torch.stack([torch.stack([places, places // 2]), torch.stack([places * 2 % 2048, (places + 7) % 2048])])


def mask(seq: int, total: int) -> torch.Tensor:
    """Causal over the last `seq` of `total` places, with the first place of the second row padded."""
    hidden = torch.ones(seq, total, dtype=torch.bool).triu(total - seq + 1).repeat(BATCH, 1, 1, 1)
    hidden[1, :, :, 0] = True
    return hidden


def assert_same(found, expected):
    found, expected = ((x,) if isinstance(x, torch.Tensor) else x for x in (found, expected))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=PATCHED_ABSOLUTE, rtol=PATCHED_RELATIVE)


def exported_operators(module: nn.Module, inputs: tuple, dynamic: tuple) -> tuple[set[str], str]:
    """(operators of the aten graph traced with dynamic lengths, but for Python's getitem; the graph's code)."""
    program = torch.export.export(module, inputs, dynamic_shapes=dynamic).run_decompositions({})
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return {name for name in operators if "getitem" not in name}, program.graph_module.code


def block_inputs(past: int = PAST, offset: int = 0):
    total = SEQ + past
    return (
        numbers(SEQ, BATCH, CONFIG.hidden_size),
        positions(offset=offset),
        mask(SEQ, total),
        numbers(2, past, BATCH, HEADS, HEAD_DIM, seed=2),
    )


def run_unpatched_block(model: nn.Module, block_id: int, past: int = PAST, offset: int = 0):
    hidden, places, hides, cache = block_inputs(past, offset)
    block = model.get_submodule(CHATGLM_6B.block.format(block_id=block_id))
    return reference.run_reference_block(block, block_id, hidden, hides, places, cache)


def test_every_transform_has_a_test_here():
    assert set(TRANSFORMS) == {*PREFIX, "tensor-cache", "matmul-linear", "gemm-head"}


@pytest.mark.parametrize(("seq", "batch"), [(1, 1), (5, 2), (7, 3)])
def test_split_heads(unpatched, seq, batch):
    mixed = numbers(seq, batch, 3 * CONFIG.hidden_size)
    path = "transformer.layers.1.attention.split_heads"
    module = patched_by(unpatched, "split-heads").get_submodule(path)
    found, expected = module(mixed), unpatched.get_submodule(path)(mixed)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)), "only moved"
    assert [tuple(part.shape) for part in found] == [(seq, batch, HEADS, HEAD_DIM)] * 3


def test_split_heads_has_no_view_with_lengths(unpatched):
    mixed = numbers(SEQ, BATCH, 3 * CONFIG.hidden_size)
    dynamic = ({0: torch.export.Dim("seq"), 1: torch.export.Dim("batch")},)
    path = "transformer.layers.0.attention.split_heads"
    before, _ = exported_operators(unpatched.get_submodule(path), (mixed,), dynamic)
    after, code = exported_operators(patched_by(unpatched, "split-heads").get_submodule(path), (mixed,), dynamic)
    assert "aten.view.default" in before, "the test can tell"
    assert not any("view" in operator or "sym_size" in operator for operator in after), after
    assert "glmexport.split_heads.default" in after
    assert "sym_size" not in code


@pytest.mark.parametrize("offset", [0, 13, 2043])
def test_rotary_by_angle(unpatched, offset):
    query, key = numbers(SEQ, BATCH, HEADS, HEAD_DIM), numbers(SEQ, BATCH, HEADS, HEAD_DIM, seed=1)
    path = "transformer.layers.0.attention.rotary_emb"
    module = patched_by(unpatched, "rotary-by-angle").get_submodule(path)
    places = positions(offset=offset).clamp_max(2047)
    assert_same(module(query, key, places), unpatched.get_submodule(path)(query, key, places))


def test_rotary_by_angle_looks_nothing_up(unpatched):
    states = numbers(SEQ, BATCH, HEADS, HEAD_DIM)
    seq, batch = torch.export.Dim("seq"), torch.export.Dim("batch")
    inputs, dynamic = (states, states, positions()), ({0: seq, 1: batch}, {0: seq, 1: batch}, {0: batch, 2: seq})
    path = "transformer.layers.0.attention.rotary_emb"
    operators, _ = exported_operators(patched_by(unpatched, "rotary-by-angle").get_submodule(path), inputs, dynamic)
    for lookup in ("embedding", "index", "gather", "max", "arange", "item", "view"):
        assert not any(lookup in operator for operator in operators), (lookup, operators)
    assert {"aten.cos.default", "aten.sin.default"} <= operators
    with pytest.raises(Exception, match=r"(?i)data.dependent|unbacked|GuardOnDataDependent|item"):
        exported_operators(unpatched.get_submodule(path), inputs, dynamic)


def test_rotary_frequencies_are_rounded_to_float16(unpatched):
    rotary = patched_by(unpatched, "rotary-by-angle").get_submodule("transformer.layers.0.attention.rotary_emb")
    exact = 10000.0 ** -(torch.arange(HEAD_DIM // 4) / (HEAD_DIM // 4))
    assert torch.equal(rotary.inv_freq, exact.half().float())
    assert not torch.equal(rotary.inv_freq, exact), "rounding shows at this width"


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("seq", "total"), [(1, 1), (5, 5), (5, 9), (1, 9)])
@pytest.mark.parametrize("hides", ["nothing", "the future", "everything"])
def test_matmul_attention(unpatched, layer, seq, total, hides):
    query = numbers(seq, BATCH, HEADS, HEAD_DIM)
    key, value = (numbers(total, BATCH, HEADS, HEAD_DIM, seed=seed) for seed in (1, 2))
    hidden = {
        "nothing": torch.zeros(BATCH, 1, seq, total, dtype=torch.bool),
        "the future": mask(seq, total),
        "everything": torch.ones(BATCH, 1, seq, total, dtype=torch.bool),
    }[hides]
    path = f"transformer.layers.{layer}.attention.core_attention"
    module = patched_by(unpatched, "matmul-attention").get_submodule(path)
    assert_same(module(query, key, value, hidden), unpatched.get_submodule(path)(query, key, value, hidden))


def test_matmul_attention_branches_on_nothing(unpatched):
    query, key = numbers(SEQ, BATCH, HEADS, HEAD_DIM), numbers(9, BATCH, HEADS, HEAD_DIM, seed=1)
    seq, batch, total = (torch.export.Dim(name) for name in ("seq", "batch", "total"))
    inputs = (query, key, key, mask(SEQ, 9))
    dynamic = ({0: seq, 1: batch}, {0: total, 1: batch}, {0: total, 1: batch}, {0: batch, 2: seq, 3: total})
    path = "transformer.layers.1.attention.core_attention"
    operators, _ = exported_operators(patched_by(unpatched, "matmul-attention").get_submodule(path), inputs, dynamic)
    assert not any("any" in operator or "item" in operator for operator in operators)
    assert "glmexport.merge_heads.default" in operators
    with pytest.raises(Exception, match=r"(?i)data.dependent|unbacked|GuardOnDataDependent|item"):
        exported_operators(unpatched.get_submodule(path), inputs, dynamic)


@pytest.mark.parametrize("with_transforms", [(), PREFIX], ids=["alone", "after the others"])
@pytest.mark.parametrize("past", [0, PAST])
def test_tensor_cache(unpatched, with_transforms, past):
    """Alone it runs too: the modules that it keeps have the same signatures patched and unpatched."""
    model = patched_by(unpatched, *with_transforms, "tensor-cache")
    for block_id in range(CONFIG.num_blocks):
        block = model.get_submodule(CHATGLM_6B.block.format(block_id=block_id))
        hidden, presents = block(*block_inputs(past))
        assert isinstance(presents, torch.Tensor), "one tensor, not a tuple"
        assert presents.shape == (2, past + SEQ, BATCH, HEADS, HEAD_DIM)
        assert_same((hidden, presents), run_unpatched_block(unpatched, block_id, past))
        assert torch.equal(presents[:, :past], block_inputs(past)[3]), "the past comes first, unchanged"


def test_matmul_linear(unpatched):
    model = patched_by(unpatched, "matmul-linear")
    states = numbers(SEQ, BATCH, CONFIG.hidden_size)
    for block_id in range(CONFIG.num_blocks):
        for name in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h"):
            path = f"transformer.layers.{block_id}.{name}"
            ours, theirs = model.get_submodule(path), unpatched.get_submodule(path)
            assert_same(ours(states), theirs(states))
            assert torch.equal(ours.weight, theirs.weight.t())
            assert type(ours).stored_transposed == ("weight",)
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert linear == ["lm_head"], "every linear layer of the blocks, and nothing else"


def test_matmul_linear_exports_no_transpose(unpatched):
    states, path = numbers(SEQ, BATCH, CONFIG.hidden_size), "transformer.layers.0.attention.dense"
    dynamic = ({0: torch.export.Dim("seq"), 1: torch.export.Dim("batch")},)
    after, _ = exported_operators(patched_by(unpatched, "matmul-linear").get_submodule(path), (states,), dynamic)
    assert not any("permute" in operator or operator == "aten.t.default" for operator in after)


def test_gemm_head(unpatched):
    states = numbers(BATCH, CONFIG.hidden_size)
    model = patched_by(unpatched, "gemm-head")
    assert_same(model.lm_head(states), unpatched.lm_head(states))
    assert torch.equal(model.lm_head.weight, unpatched.lm_head.weight), "stored as in the checkpoint"
    with pytest.raises(ValueError, match="without bias"):
        _linear.GemmLinear(nn.Linear(2, 3))
    model.lm_head = nn.Identity()
    with pytest.raises(TypeError, match="lm_head must be a Linear, found Identity"):
        TRANSFORMS["gemm-head"].apply(model)


@pytest.mark.parametrize("offset", [0, 2048 - SEQ])
@pytest.mark.parametrize("past", [0, PAST])
def test_all_transforms_together(unpatched, past, offset):
    model = CHATGLM_6B.apply(copy.deepcopy(unpatched))
    hidden, places, hides, cache = block_inputs(past, offset)
    for block_id in range(CONFIG.num_blocks):
        block = model.get_submodule(CHATGLM_6B.block.format(block_id=block_id))
        found = block(hidden, places.clamp_max(2047), hides, cache)
        original = unpatched.get_submodule(CHATGLM_6B.block.format(block_id=block_id))
        assert_same(
            found,
            reference.run_reference_block(original, block_id, hidden, hides, places.clamp_max(2047), cache),
        )


def test_transforms_leave_checkpoint_names(unpatched):
    model = CHATGLM_6B.apply(copy.deepcopy(unpatched))
    assert set(model.state_dict()) == set(unpatched.state_dict())


@pytest.mark.parametrize("name", ["split-heads", "rotary-by-angle", "matmul-attention", "tensor-cache"])
def test_a_transform_that_finds_nothing_says_so(unpatched, name):
    model = CHATGLM_6B.apply(copy.deepcopy(unpatched))
    with pytest.raises(LookupError, match=r"no \w+ to replace in ChatGLMForConditionalGeneration"):
        TRANSFORMS[name].apply(model)


def test_matmul_linear_that_finds_nothing_says_so(unpatched):
    with pytest.raises(LookupError, match="no Linear to replace in GLMBlock"):
        TRANSFORMS["matmul-linear"].apply(CHATGLM_6B.apply(copy.deepcopy(unpatched)))


def test_replace_modules():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    replaced = _modules.replace_modules(model, nn.Linear, lambda linear: nn.Identity(linear.out_features))
    assert replaced is model
    assert [type(module).__name__ for module in model.modules()][1:] == ["Identity", "Sequential", "Identity", "ReLU"]
    with pytest.raises(LookupError, match="no Linear to replace in Sequential"):
        _modules.replace_modules(model, nn.Linear, lambda linear: linear)


def test_custom_operations_equal_their_plain_forms():
    states = numbers(SEQ, BATCH, 3 * CONFIG.hidden_size)
    split = export_ops.split_heads(states, HEADS)
    assert torch.equal(split, states.view(SEQ, BATCH, HEADS, -1))
    assert torch.equal(export_ops.merge_heads(split), states)
    rows, weight = numbers(4, 6), numbers(9, 6, seed=1)
    assert_same(export_ops.linear_rows(rows, weight), nn.functional.linear(rows, weight))
    with torch.device("meta"):
        made = torch.empty(SEQ, BATCH, 12)
        assert export_ops.split_heads(made, 3).shape == (SEQ, BATCH, 3, 4)
        assert export_ops.merge_heads(torch.empty(5, 2, 3, 4)).shape == (5, 2, 12)
        assert export_ops.linear_rows(torch.empty(4, 6), torch.empty(9, 6)).shape == (4, 9)


@pytest.mark.parametrize("head_dim", [4, 16, 128])
def test_the_patch_is_proven_equal(head_dim):
    assert check_patch(CHATGLM_6B, dataclasses.replace(CONFIG, hidden_size=head_dim * HEADS)) <= 1e-5


# Broken versions: each is what a slip of the pen would give, and none may pass.


class SwappedRotaryHalves(_rope.AngleRotary2D):
    def forward(self, query, key, position_ids):
        return super().forward(query, key, position_ids.flip(1))


class RotaryPairsOfNeighbours(_rope.AngleRotary2D):
    def _turn(self, states, cos, sin):
        turned = torch.stack((-states[..., 1::2], states[..., ::2]), dim=-1).flatten(-2)
        return states * cos + turned * sin


class RotaryTheOtherWay(_rope.AngleRotary2D):
    def _turn(self, states, cos, sin):
        return super()._turn(states, cos, -sin)


class KeysOnlyRotary(_rope.AngleRotary2D):
    def forward(self, query, key, position_ids):
        return query, super().forward(query, key, position_ids)[1]


class ShowingMask(_attention.MatMulAttention):
    def forward(self, query, key, value, attention_mask):
        return super().forward(query, key, value, ~attention_mask)


class NoMask(_attention.MatMulAttention):
    def forward(self, query, key, value, attention_mask):
        return super().forward(query, key, value, torch.zeros_like(attention_mask))


class HalfTheScale(_attention.MatMulAttention):
    """Divides the query by the layer's scale and forgets to multiply the scores."""

    def forward(self, query, key, value, attention_mask):
        return super().forward(query / self.layer_scale, key, value, attention_mask)


class SoftmaxOverQueries(_attention.MatMulAttention):
    def forward(self, query, key, value, attention_mask):
        scores = query.permute(1, 2, 0, 3) @ key.permute(1, 2, 3, 0) / self.head_dim**0.5
        weights = scores.masked_fill(attention_mask, -10000.0).softmax(dim=-2)
        return export_ops.merge_heads((weights @ value.permute(1, 2, 0, 3)).permute(2, 0, 1, 3))


class ValuesFirstCache(_attention.TensorCacheAttention):
    def forward(self, hidden_states, position_ids, attention_mask, layer_past):
        output, presents = super().forward(hidden_states, position_ids, attention_mask, layer_past.flip(0))
        return output, presents.flip(0)


class NewPlacesFirstCache(_attention.TensorCacheAttention):
    def forward(self, hidden_states, position_ids, attention_mask, layer_past):
        output, presents = super().forward(hidden_states, position_ids, attention_mask, layer_past)
        return output, presents.roll(hidden_states.shape[0], dims=1)


class KeysBeforeRotaryCache(_attention.TensorCacheAttention):
    def forward(self, hidden_states, position_ids, attention_mask, layer_past):
        output, presents = super().forward(hidden_states, position_ids, attention_mask, layer_past)
        key = self.split_heads(self.query_key_value(hidden_states))[1]
        return output, torch.cat((presents[:, : layer_past.shape[1]], torch.stack((key, presents[1, -len(key) :]))), 1)


class NoBias(_linear.MatMulLinear):
    def forward(self, states):
        return states @ self.weight


class SplitInThreeFirst(_attention.SplitHeads):
    """Query, key and value as three blocks of the projection, as in most other models."""

    def forward(self, mixed):
        return tuple(export_ops.split_heads(part.contiguous(), self.heads) for part in mixed.chunk(3, dim=-1))


class NanAttention(_attention.MatMulAttention):
    def forward(self, query, key, value, attention_mask):
        return super().forward(query, key, value, attention_mask) * float("nan")


class OneRowTooFew(_linear.GemmLinear):
    def forward(self, states):
        return super().forward(states)[..., :-1]


def broken_rotary(make):
    def apply(model):
        return _modules.replace_modules(model, reference.RotaryEmbedding2D, make)

    return apply


def rounded(module):
    return reference.inverse_frequencies(module.head_dim // 2, "cpu")


def exact(module):
    half = module.head_dim // 2
    return 1.0 / 10000.0 ** (torch.arange(0, half, 2, dtype=torch.float32) / half)


def broken_attention(kind):
    return lambda model: _modules.replace_modules(
        model, reference.CoreAttention, lambda module: kind(module.layer_id, module.head_dim)
    )


def broken_cache(kind):
    return lambda model: _modules.replace_modules(model, reference.SelfAttention, kind)


def broken_linear(model):
    for module in model.modules():
        if isinstance(module, reference.GLMBlock):
            _modules.replace_modules(module, nn.Linear, NoBias)
    return model


def broken_split(model):
    return _modules.replace_modules(
        model, reference.QueryKeyValueSplit, lambda module: SplitInThreeFirst(module.num_heads, module.head_dim)
    )


def broken_head(model):
    model.lm_head = OneRowTooFew(model.lm_head)
    return model


BROKEN = {
    "swapped rotary halves": ("rotary-by-angle", broken_rotary(lambda m: SwappedRotaryHalves(rounded(m)))),
    "pairs of neighbours": ("rotary-by-angle", broken_rotary(lambda m: RotaryPairsOfNeighbours(rounded(m)))),
    "turned the other way": ("rotary-by-angle", broken_rotary(lambda m: RotaryTheOtherWay(rounded(m)))),
    "query not turned": ("rotary-by-angle", broken_rotary(lambda m: KeysOnlyRotary(rounded(m)))),
    "exact frequencies": ("rotary-by-angle", broken_rotary(lambda m: _rope.AngleRotary2D(exact(m)))),
    "frequencies of the whole head": (
        "rotary-by-angle",
        broken_rotary(
            lambda m: _rope.AngleRotary2D(reference.inverse_frequencies(m.head_dim, "cpu")[: m.head_dim // 4])
        ),
    ),
    "mask that shows": ("matmul-attention", broken_attention(ShowingMask)),
    "mask left out": ("matmul-attention", broken_attention(NoMask)),
    "half the layer scale": ("matmul-attention", broken_attention(HalfTheScale)),
    "softmax over queries": ("matmul-attention", broken_attention(SoftmaxOverQueries)),
    "not a number": ("matmul-attention", broken_attention(NanAttention)),
    "values first in the cache": ("tensor-cache", broken_cache(ValuesFirstCache)),
    "new places first in the cache": ("tensor-cache", broken_cache(NewPlacesFirstCache)),
    "keys cached before the rotary": ("tensor-cache", broken_cache(KeysBeforeRotaryCache)),
    "bias left out": ("matmul-linear", broken_linear),
    "query, key, value not per head": ("split-heads", broken_split),
    "another vocabulary": ("gemm-head", broken_head),
}


@pytest.mark.parametrize("slip", BROKEN)
def test_a_broken_transform_is_noticed(slip):
    name, broken = BROKEN[slip]
    transforms = tuple(Transform(t.name, t.summary, broken) if t.name == name else t for t in CHATGLM_6B.transforms)
    with pytest.raises(ExportError, match=r"The patched chatglm-6b differs from the unpatched one by (\d|inf)"):
        check_patch(dataclasses.replace(CHATGLM_6B, transforms=transforms), CONFIG)


class HalfAngles(_rope.AngleRotary2D):
    """Angles in the dtype of the query: near position 2000 float16 steps by one radian."""

    def forward(self, query, key, position_ids):
        places = position_ids.permute(2, 0, 1).to(query.dtype).unsqueeze(3).unsqueeze(4)
        position, block_position = (places * self.inv_freq.to(query.dtype)).unbind(2)
        angles = torch.cat((position, position, block_position, block_position), dim=-1)
        return self._turn(query, angles.cos(), angles.sin()), self._turn(key, angles.cos(), angles.sin())


def test_what_only_float16_shows_is_noticed_for_float16():
    broken = broken_rotary(lambda module: HalfAngles(rounded(module)))
    transforms = tuple(
        Transform(t.name, t.summary, broken) if t.name == "rotary-by-angle" else t for t in CHATGLM_6B.transforms
    )
    patch = dataclasses.replace(CHATGLM_6B, transforms=transforms)
    assert check_patch(patch, CONFIG) <= 1e-5
    with pytest.raises(ExportError, match=r"in float16, at most 3e-02 is allowed"):
        check_patch(patch, CONFIG, "float16")
    assert check_patch(CHATGLM_6B, CONFIG, "float16") <= 2.0**-5


def test_all_patches_refuses_anything_else(monkeypatch):
    monkeypatch.setattr("glmexport.patches.PATCHES", ("chatglm",))
    with pytest.raises(TypeError, match="must hold ModelPatch objects, found str"):
        all_patches()


def test_patches_are_listed():
    result = CliRunner().invoke(cli, ["patches"], catch_exceptions=False)
    assert result.exit_code == 0
    document = json.loads(CliRunner().invoke(cli, ["patches", "--json"], catch_exceptions=False).stdout)
    assert [entry["name"] for entry in document] == [patch.name for patch in all_patches()]
    for patch, entry in zip(all_patches(), document, strict=True):
        assert patch.title in result.stdout
        listed = [line.strip() for line in result.stdout.splitlines() if line.startswith("  ")]
        transforms = (*patch.transforms, *patch.in_place_transforms)
        assert [line.split()[0] for line in listed] == [transform.name for transform in transforms], "a line each"
        shown = (*entry["transforms"], *entry["in_place_transforms"])
        for transform, line, said in zip(transforms, listed, shown, strict=True):
            assert transform.summary in line
            assert said == {"name": transform.name, "summary": transform.summary}
