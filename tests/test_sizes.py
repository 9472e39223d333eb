"""Sizes as people write them."""

from __future__ import annotations

import pytest

from glmexport.errors import GlmExportError
from glmexport.sizes import parse_size, size_in_words


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("3.2GB", 3_200_000_000),
        ("3.2 gb", 3_200_000_000),
        ("800MB", 800_000_000),
        (" 3GiB ", 3 << 30),
        ("1.5KiB", 1536),
        ("7 kB", 7000),
        ("1000000", 1_000_000),
        ("12B", 12),
    ],
)
def test_sizes(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "large", "-1GB", "1e9", "3 PB", "3GBs", "0x10", "1,5GB", "3Gi"])
def test_sizes_that_are_none(text):
    with pytest.raises(GlmExportError, match=r"expected MB, GB, MiB or GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_234_567, "1.2 MB"), (3.456e9, "3.46 GB")],
)
def test_sizes_in_words(count, words):
    assert size_in_words(count) == words
