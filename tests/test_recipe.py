"""Recipes: the first rule that matches decides, and what a file says that is no rule is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmexport.affine import BITS, GROUP_SIZES, METHODS, Affine
from glmexport.errors import GlmExportError, RecipeError
from glmexport.recipe import (
    MAX_RECIPE_BYTES,
    Recipe,
    Rule,
    affine_of_record,
    parse_recipe,
    policy_record,
    read_recipe,
    uniform_recipe,
)

MLP = "transformer.layers.3.mlp.dense_h_to_4h.weight"
HEAD = "lm_head.weight"


def rule(text: str) -> Rule:
    (only,) = parse_recipe(f"[[rule]]\n{text}", "here").rules
    return only


# Rules


def test_the_first_match_wins():
    recipe = parse_recipe(
        '[[rule]]\npattern = "*.mlp.*"\nbits = 8\n[[rule]]\npattern = "*.dense*"\nbits = 4\n[[rule]]\nbits = "none"',
        "here",
    )
    assert recipe.affine(MLP, 3) == Affine(8, 32)
    assert recipe.affine("transformer.layers.3.attention.dense.weight", 3) == Affine(4, 32)
    assert recipe.affine(HEAD, None) is None
    assert Recipe(recipe.rules[::-1]).affine(MLP, 3) is None


def test_defaults_are_those_of_the_command_line():
    assert rule("bits = 4") == Rule("*", Affine(4, 32, True, "mse"), None)


def test_no_match_names_the_matrix():
    with pytest.raises(RecipeError, match=r'No rule of the recipe matches lm_head\.weight; add one .*pattern = "\*"'):
        parse_recipe('[[rule]]\npattern = "transformer*"\nbits = 4', "here").affine(HEAD, None)


@pytest.mark.parametrize(
    ("blocks", "ids"),
    [
        ("[0, 1, 27]", {0, 1, 27}),
        ('"0-3, 27"', {0, 1, 2, 3, 27}),
        ('" 5 "', {5}),
        ('"5-5"', {5}),
        ('"2 - 4,3,9999"', {2, 3, 4, 9999}),
        ("[7, 7]", {7}),
    ],
)
def test_blocks(blocks, ids):
    found = rule(f"bits = 4\nblocks = {blocks}")
    assert found.blocks == ids
    for block_id in range(30):
        assert found.matches(MLP, block_id) is (block_id in ids)
    assert not found.matches(HEAD, None), "a rule with blocks never speaks of the LM head"


@pytest.mark.parametrize(
    "blocks",
    ['"3-1"', '""', '"a"', '"1,"', '"-1"', "[-1]", '["1"]', "[1.0]", "[true]", "3", "true", '"1-2-3"', "[[1]]"],
)
def test_blocks_that_are_none(blocks):
    with pytest.raises(RecipeError, match="here, rule 1: `blocks`"):
        rule(f"bits = 4\nblocks = {blocks}")


def test_patterns_are_globs_over_names():
    found = rule('pattern = "*.layers.[0-3].mlp.*"\nbits = 4')
    assert found.matches(MLP, 3)
    assert not found.matches(MLP.replace(".3.", ".4."), 4)
    assert not rule('pattern = "*.MLP.*"\nbits = 4').matches(MLP, 3), "case counts"
    assert not rule('pattern = "mlp"\nbits = 4').matches(MLP, 3), "a part of a name is not the name"


def test_unused_rules_are_numbered_from_1():
    recipe = parse_recipe(
        '[[rule]]\nblocks = [9]\nbits = 4\n[[rule]]\nbits = 8\n[[rule]]\npattern = "lm*"\nbits = 4', "x"
    )
    assert recipe.unused([(MLP, 3), (HEAD, None)]) == [1, 3]
    assert recipe.unused([(MLP, 9)]) == [2, 3]
    assert recipe.unused([]) == [1, 2, 3]


@pytest.mark.parametrize("head", [None, Affine(8, 64)])
def test_the_uniform_recipe(head):
    recipe = uniform_recipe(Affine(4, 32), head, 5)
    assert [recipe.affine(MLP, block_id) for block_id in range(5)] == [Affine(4, 32)] * 5
    assert recipe.affine(HEAD, None) == head


# Files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[rule]]\nbits = 4\nbit = 5", "rule 1 has the unknown key 'bit'; expected pattern, blocks, bits"),
        ("[[rule]]\nbits = 4\n[[rule]]\nbits = 8\ngroupsize = 3", "rule 2 has the unknown key 'groupsize'"),
        ("[[rule]]\nbits = 3", "rule 1: quantization knows no bits 3"),
        ("[[rule]]\nbits = 4.0", "knows no bits 4.0"),
        ("[[rule]]\nbits = true", "knows no bits True"),
        ('[[rule]]\nbits = "4"', "knows no bits '4'"),
        ("[[rule]]\npattern = 'x'", "knows no bits None"),
        ("[[rule]]\nbits = 4\ngroup_size = 33", "knows no group size 33"),
        ("[[rule]]\nbits = 4\ngroup_size = '32'", "knows no group size '32'"),
        ("[[rule]]\nbits = 4\nmethod = 'x'", "knows no method 'x'"),
        ("[[rule]]\nbits = 4\nsymmetric = 1", "`symmetric` must be true or false, found 1"),
        ("[[rule]]\nbits = 4\npattern = ''", "`pattern` must be a glob"),
        ("[[rule]]\nbits = 4\npattern = 7", "`pattern` must be a glob"),
        ("[[rule]]\nbits = 'none'\ngroup_size = 32", "keeps float32 and says `group_size` all the same"),
        ("[[rule]]\nbits = 'none'\nsymmetric = true", "says `symmetric` all the same"),
        ("", "must hold [[rule]] tables and nothing else, found []"),
        ("rule = 3", "must hold [[rule]] tables"),
        ("rule = [3]", "must hold [[rule]] tables"),
        ("[rule]\nbits = 4", "must hold [[rule]] tables"),
        ("title = 'x'\n[[rule]]\nbits = 4", "found ['rule', 'title']"),
        ("[[rule]\n", "is not TOML"),
        ("rule = " + "[" * 100_000, "is not TOML"),
    ],
)
def test_what_is_no_recipe_is_named(text, words):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "recipe.toml")
    assert str(caught.value).startswith("recipe.toml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match=r"absent cannot be read \(No such file"):
        read_recipe(tmp_path / "absent")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="bytes is not UTF-8 text"):
        read_recipe(tmp_path / "bytes")
    (tmp_path / "large").write_bytes(b"#" * (MAX_RECIPE_BYTES + 1))
    with pytest.raises(RecipeError, match="large has more than"):
        read_recipe(tmp_path / "large")
    (tmp_path / "good").write_text("[[rule]]\nbits = 8 # all\n")
    assert read_recipe(tmp_path / "good") == Recipe((Rule("*", Affine(8, 32)),))


AFFINES = st.builds(
    Affine, st.sampled_from(BITS), st.sampled_from(GROUP_SIZES), st.booleans(), st.sampled_from(METHODS)
)
RULES = st.builds(
    Rule,
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=12) | st.just('*\\"[!a]?\\u'),
    st.none() | AFFINES,
    st.none() | st.frozensets(st.integers(0, 9999), min_size=1, max_size=12),
)


@given(st.lists(RULES, max_size=4))
def test_what_is_written_is_read_back(rules):
    recipe = Recipe(tuple(rules))
    if rules:
        assert parse_recipe(recipe.as_toml(), "here") == recipe


@pytest.mark.parametrize(
    "text",
    [
        '[[rule]]\npattern = "a\\nb"\nbits = 4',
        '[[rule]]\npattern = "a\\u0001b"\nbits = 4',
        '[[rule]]\npattern = "a\\u007fb"\nbits = 4',
    ],
)
def test_what_was_read_is_written_so_that_it_can_be_read_again(text):
    """The bundle keeps the recipe, and verify reads it: one that is accepted must come back."""
    recipe = parse_recipe(text, "here")
    assert parse_recipe(recipe.as_toml(), "there") == recipe


@given(AFFINES)
def test_records_in_a_manifest(affine):
    assert affine_of_record(policy_record(affine)) == affine


def test_a_record_that_is_none():
    with pytest.raises(GlmExportError, match="knows no bits 5"):
        affine_of_record({"bits": 5, "group_size": 32, "symmetric": True, "method": "mse"})
    with pytest.raises(KeyError):
        affine_of_record({"bits": 4})


# Sizes


def test_a_rule_for_no_block_is_refused():
    with pytest.raises(RecipeError, match=r"here, rule 1: `blocks` names no block; leave it out"):
        parse_recipe("[[rule]]\nblocks = []\nbits = 4", "here")
