"""The supported architectures, one file each; the first that recognises a config is taken."""

from .chatglm_6b import CHATGLM_6B

PATCHES = (CHATGLM_6B,)
