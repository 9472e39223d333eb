"""Quantization policy: which matrices become how many bits, and how. Rules, first match wins; nothing about packing."""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmexport.affine import Affine
from glmexport.errors import GlmExportError, RecipeError

FORMATS = ("matmulnbits", "qdq")
"""How a graph multiplies with a quantized matrix: onnxruntime's operator, or the standard's DequantizeLinear."""

KEEP = "none"
"""The `bits` of a rule that leaves its matrices in float32."""

DEFAULT_GROUP_SIZE = 32
DEFAULT_METHOD = "mse"
MAX_RECIPE_BYTES = 1 << 20


@dataclass(frozen=True)
class Rule:
    """What happens to the matrices it matches.

    pattern: glob over the checkpoint's tensor names, such as `*.mlp.*`. blocks: block ids, None for any graph; a rule
    with blocks never matches the LM head. affine: how to quantize, None to keep float32.
    """

    pattern: str
    affine: Affine | None
    blocks: frozenset[int] | None = None

    def matches(self, name: str, block_id: int | None) -> bool:
        """Whether the rule speaks of the matrix `name` in that block (None: the LM head)."""
        return (self.blocks is None or block_id in self.blocks) and fnmatch.fnmatchcase(name, self.pattern)


@dataclass(frozen=True)
class Recipe:
    """Rules in order; the first that matches a matrix decides."""

    rules: tuple[Rule, ...]

    def affine(self, name: str, block_id: int | None) -> Affine | None:
        """How to quantize one matrix; None keeps it. Raises RecipeError for a matrix that no rule matches."""
        for rule in self.rules:
            if rule.matches(name, block_id):
                return rule.affine
        raise RecipeError(
            f'No rule of the recipe matches {name}; add one that does, at the end `pattern = "*"` with the bits of '
            f'everything else (`bits = "{KEEP}"` keeps float32).'
        )

    def unused(self, matrices: Iterable[tuple[str, int | None]]) -> list[int]:
        """Numbers (from 1) of the rules that decide about none of these (name, block id) pairs."""
        used = set()
        for name, block_id in matrices:
            used.add(next((i for i, rule in enumerate(self.rules) if rule.matches(name, block_id)), -1))
        return [i + 1 for i in range(len(self.rules)) if i not in used]

    def as_toml(self) -> str:
        """The recipe as `parse_recipe` reads it back."""
        return "\n".join(_rule_as_toml(rule) for rule in self.rules)


def uniform_recipe(affine: Affine, head: Affine | None, num_blocks: int) -> Recipe:
    """One way for every matrix of the blocks, another (or None: float32) for the LM head."""
    return Recipe((Rule("*", affine, frozenset(range(num_blocks))), Rule("*", head)))


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file. Raises RecipeError."""
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise RecipeError(f"{path} has more than {MAX_RECIPE_BYTES} bytes; expected a recipe of some rules.")
        text = path.read_text("utf-8")
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}); give the recipe's TOML file.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text; expected a TOML file.") from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, origin: str) -> Recipe:
    """The recipe in a TOML text. Raises RecipeError, naming `origin`, for anything that is not a list of rules."""
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(f"{origin} is not TOML ({str(error).splitlines()[0]:.200}); correct it.") from error
    rules = document.get("rule")
    if set(document) != {"rule"} or not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise RecipeError(f"{origin} must hold [[rule]] tables and nothing else, found {sorted(document)!r:.120}.")
    return Recipe(tuple(_rule(rule, f"{origin}, rule {number}") for number, rule in enumerate(rules, 1)))


def _rule(raw: Mapping[str, Any], origin: str) -> Rule:
    unknown = sorted(set(raw) - {"pattern", "blocks", "bits", "group_size", "symmetric", "method"})
    if unknown:
        raise RecipeError(
            f"{origin} has the unknown key {unknown[0]!r:.80}; expected pattern, blocks, bits, group_size, symmetric "
            f"and method."
        )
    pattern, bits = raw.get("pattern", "*"), raw.get("bits")
    if not isinstance(pattern, str) or not pattern:
        raise RecipeError(f"{origin}: `pattern` must be a glob over tensor names, found {pattern!r:.80}.")
    blocks = _blocks(raw["blocks"], origin) if "blocks" in raw else None
    if bits == KEEP:
        extra = sorted(set(raw) & {"group_size", "symmetric", "method"})
        if extra:
            raise RecipeError(f"{origin} keeps float32 and says `{extra[0]}` all the same; leave that out.")
        return Rule(pattern, None, blocks)
    symmetric = raw.get("symmetric", True)
    if type(symmetric) is not bool:
        raise RecipeError(f"{origin}: `symmetric` must be true or false, found {symmetric!r:.80}.")
    group_size, method = raw.get("group_size", DEFAULT_GROUP_SIZE), raw.get("method", DEFAULT_METHOD)
    try:
        return Rule(pattern, Affine(bits, group_size, symmetric, method), blocks)  # type: ignore[arg-type]  # it checks
    except GlmExportError as error:
        raise RecipeError(f"{origin}: {error}") from error


def _blocks(value: object, origin: str) -> frozenset[int]:
    """Block ids from `[0, 1, 27]` or `"0-3, 27"`."""
    parts = re.split(r"\s*,\s*", value.strip()) if isinstance(value, str) else value
    ids: set[int] = set()
    for part in parts if isinstance(parts, list) else [None]:
        match = re.fullmatch(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?", str(part))
        if match is None or isinstance(part, bool) or (isinstance(value, list) and not isinstance(part, int)):
            raise RecipeError(f'{origin}: `blocks` must be like [0, 1, 27] or "0-3, 27", found {value!r:.80}.')
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise RecipeError(f"{origin}: `blocks` has a range that ends before it starts, {part!r:.80}.")
        ids.update(range(first, last + 1))
    if not ids:
        raise RecipeError(f"{origin}: `blocks` names no block; leave it out for every matrix.")
    return frozenset(ids)


def _ranges(ids: frozenset[int]) -> str:
    """`0-3, 27`."""
    words, ordered = [], sorted(ids)
    starts = [i for i in ordered if i - 1 not in ids]
    stops = [i for i in ordered if i + 1 not in ids]
    for start, stop in zip(starts, stops, strict=True):
        words.append(str(start) if start == stop else f"{start}-{stop}")
    return ", ".join(words)


def _rule_as_toml(rule: Rule) -> str:
    pattern = json.dumps(rule.pattern, ensure_ascii=False).replace(
        "\x7f", "\\u007f"
    )  # TOML strings are JSON's but for it
    lines = ["[[rule]]", f"pattern = {pattern}"]
    if rule.blocks is not None:
        lines.append(f'blocks = "{_ranges(rule.blocks)}"')
    if rule.affine is None:
        return "\n".join([*lines, f'bits = "{KEEP}"', ""])
    affine = rule.affine
    group_size = f'"{affine.group_size}"' if isinstance(affine.group_size, str) else affine.group_size
    return "\n".join(
        [
            *lines,
            f"bits = {affine.bits}",
            f"group_size = {group_size}",
            f"symmetric = {str(affine.symmetric).lower()}",
            f'method = "{affine.method}"',
            "",
        ]
    )


def policy_record(affine: Affine) -> dict[str, Any]:
    """How a matrix was quantized, as a manifest says it."""
    return {
        "bits": affine.bits,
        "group_size": affine.group_size,
        "symmetric": affine.symmetric,
        "method": affine.method,
    }


def affine_of_record(record: Mapping[str, Any]) -> Affine:
    """The policy that a manifest records. Raises KeyError or GlmExportError for one that there is not."""
    return Affine(record["bits"], record["group_size"], record["symmetric"], record["method"])
