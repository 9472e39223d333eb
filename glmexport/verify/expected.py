"""The draft that a bundle of a stated form must be, made anew from the checkpoint."""

from __future__ import annotations

from glmexport import names
from glmexport.bundle import Bundle
from glmexport.checkpoint import Checkpoint, heads_equal
from glmexport.checkpoint_draft import draft_of_checkpoint
from glmexport.draft import BundleDraft, ignore_notice
from glmexport.errors import BundleError
from glmexport.form import FLOAT16, RAW, SHARED, slimmed_config
from glmexport.passes.half_cache import HalfCachePass
from glmexport.passes.half_weights import HalfWeightsPass
from glmexport.passes.quantize_weights import QuantizePass
from glmexport.passes.raw_embedding import EmbedPass
from glmexport.passes.slim_vocab import slim_to, with_vocabulary_file
from glmexport.recipe import MAX_RECIPE_BYTES, parse_recipe


def expected_draft(bundle: Bundle, checkpoint: Checkpoint) -> BundleDraft:
    """What the checkpoint gives in the form that the bundle's manifest states; weights are not read.

    Raises GlmExportError where there is no such form of this checkpoint.
    """
    form = bundle.form
    draft = draft_of_checkpoint(
        checkpoint, bundle.opset, bundle.argmax, heads_equal(checkpoint), dtype=form.dtype, flavors=form.flavors
    )
    if form.kv_cache == FLOAT16:
        draft = HalfCachePass().apply(draft, ignore_notice)
    if form.slim is not None:
        draft = slim_to(draft, form.slim.vocabulary)
    if form.slim is not None or form.vocabulary_file in bundle.files:
        draft = with_vocabulary_file(draft, ignore_notice)
    if form.embedding.kind == RAW:
        draft = EmbedPass(form.embedding).apply(draft, ignore_notice)
    if form.quantization is not None:
        draft = QuantizePass(parse_recipe(_recipe(bundle), names.RECIPE), form.quantization).apply(draft, ignore_notice)
    if form.embedding.kind == SHARED:
        draft = EmbedPass(form.embedding).apply(draft, ignore_notice)
    if form.weights == FLOAT16:
        draft = HalfWeightsPass().apply(draft, ignore_notice)
    return draft


def check_same_model(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Raise BundleError where bundle and checkpoint are of different models."""
    config, slim = checkpoint.config, bundle.form.slim
    if slim is not None and slim.vocabulary.full_size == config.vocab_size:
        config = slimmed_config(config, slim.vocabulary)
    if bundle.manifest.get("architecture") != checkpoint.patch.name or bundle.config != config:
        ours, theirs = vars(bundle.config), vars(config)
        differ = ", ".join(f"{key} {ours[key]} against {theirs[key]}" for key in ours if ours[key] != theirs[key])
        raise BundleError(
            f"{bundle.directory} was not made from {checkpoint.directory}: {differ or 'another architecture'}; "
            f"give the checkpoint it was split from."
        )


def _recipe(bundle: Bundle) -> str:
    if names.RECIPE not in bundle.files:
        raise BundleError(f"The bundle is quantized and has no {names.RECIPE}; quantize it again.")
    if bundle.files[names.RECIPE].bytes > MAX_RECIPE_BYTES:
        raise BundleError(f"{names.RECIPE} has {bundle.files[names.RECIPE].bytes} bytes, expected some rules.")
    return bundle.read_small(names.RECIPE).decode("utf-8", errors="replace")
