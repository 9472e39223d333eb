"""The tokenizer of a bundle: its SentencePiece model in the numbering that its manifest states."""

from __future__ import annotations

from glmexport import names
from glmexport.bundle import Bundle
from glmexport.config import ModelConfig
from glmexport.errors import BundleError
from glmexport.form import Form
from glmexport.tokenizer import Tokenizer
from glmexport.vocabulary import VocabularyMap


def make_tokenizer(
    model: bytes, config: ModelConfig, form: Form, *, checkpoint_ids: bool = False, origin: str = names.TOKENIZER_MODEL
) -> Tokenizer:
    """The tokenizer for a SentencePiece model, with the ids of a bundle of that config and form.

    checkpoint_ids: those from before it was slimmed instead. Raises CheckpointError as `Tokenizer` does.
    """
    slim = form.slim
    images = slim.num_image_tokens if slim else config.num_image_tokens
    vocabulary = slim.vocabulary if slim else VocabularyMap.identity(config.vocab_size)
    if checkpoint_ids:
        vocabulary = VocabularyMap.identity(vocabulary.full_size)
    return Tokenizer(model, num_image_tokens=images, vocabulary=vocabulary, origin=origin)


def tokenizer_of_bundle(bundle: Bundle) -> Tokenizer:
    """The tokenizer of an opened bundle. Raises BundleError where it has none, CheckpointError for a damaged one."""
    if names.TOKENIZER_MODEL not in bundle.files:
        raise BundleError(
            f"{bundle.directory} has no {names.TOKENIZER_MODEL}, so text cannot be tokenized; split again from a "
            "checkpoint that holds it, or give ids."
        )
    model = bundle.read_small(names.TOKENIZER_MODEL)
    return make_tokenizer(model, bundle.config, bundle.form, origin=str(bundle.path(names.TOKENIZER_MODEL)))
