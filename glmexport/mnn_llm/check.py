"""A package against the reference: what MNN's engine says, its tokens and logits, and how it reads texts and chats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glmexport.chat import chat_prompt
from glmexport.config import ModelConfig
from glmexport.errors import GlmExportError
from glmexport.mnn_llm.engine import Chat, ask
from glmexport.mnn_llm.following import Reference, follow
from glmexport.tokenizer import Tokenizer
from glmexport.verify.measures import NextTokens
from glmexport.verify.tolerances import CHAIN_BUDGETS

STEPS = 12
PROMPTS = 20
_LONGEST = 200
_FLOAT = 1e-3  # relative, of the logits: float32 in another order through every block is some 1e-6 to 1e-4

TEXTS = (
    "你好",
    "Hello, world!",
    "1 + 1 = 2",
    " 前面有空格",
    "two  spaces,   three, and a tail  ",
    "第一行\n第二行\n\n第四行",
    "\tdef f(x):\n\t\treturn x",
    "a" + " " * 85 + "b",
    "x" + " " * 81 + "y",
    "emoji 👋🏽 和 ✓, ½, é, ñ, Ω, я",
    "龘䶮𠮷 rare characters",
    "\r\n mixed \u3000 full-width",
    "a<n>b<|tab|>c<|blank_3|>d",
    "<0x41> and [MASK] stay text",
    "https://example.org/?q=a&b=c#d",
    "価格は¥1,234です。",
)
CHATS: tuple[Chat, ...] = (
    ("你好", ()),
    ("What is 12+34?\nOnly the number.", ()),
    ("那么 3 呢？", (("1 加 1 等于几？", "2。"),)),
    ("c", (("a\nb", "two lines,\n\n  indented"), ("second", "答"))),
    ("say [gMASK] and <sop>", (("<sop>", "[gMASK]<sop>"),)),
    ("last", tuple((f"query {number}", f"answer {number}") for number in range(11))),
)


@dataclass(frozen=True)
class CheckResult:
    """What was found over all prompts.

    same, count: tokens of the engine's that are the reference's likeliest, of how many. divergence: mean KL divergence
    in nats. norm: ‖error‖ / ‖reference‖ of the logits at worst. texts, chats: those that the engine reads otherwise.
    """

    mnn: str
    form: str
    prompts: int
    same: int
    count: int
    divergence: float
    norm: float
    texts: tuple[str, ...]
    chats: tuple[int, ...]

    @property
    def complaint(self) -> str | None:
        """What is wrong with the package in a sentence, None where nothing is."""
        if self.chats or len(self.texts) > len(TEXTS) // 4:
            return (
                f"MNN's tokenizer reads {len(self.texts)} of {len(TEXTS)} texts and {len(self.chats)} of {len(CHATS)} "
                "chats otherwise than the checkpoint's; its SentencePiece model is of a kind that MNN does not know."
            )
        found = f"{self.same} of {self.count} tokens of MNN's engine are the reference's, logits {self.norm:.2g} off"
        if self.form == "float32":
            right = self.same == self.count and self.norm <= _FLOAT
            return None if right else f"{found}; all tokens and {_FLOAT:g} at most are expected of exact weights."
        budget = CHAIN_BUDGETS[self.form]
        close = self.norm <= budget.logits and self.divergence <= budget.divergence
        if close and self.same >= budget.greedy * self.count:
            return None
        return (
            f"{found}, KL {self.divergence:.2g}; {budget.greedy:.0%}, {budget.logits:g} and {budget.divergence:g} are "
            f"expected of {self.form} ({budget.reason})."
        )

    def as_json(self) -> dict[str, Any]:
        """For the manifest and `--json`."""
        return {
            "prompts": self.prompts,
            "steps": STEPS,
            "tokens": self.count,
            "same": self.same,
            "divergence": self.divergence,
            "logits_error": self.norm,
            "texts_read_otherwise": len(self.texts),
        }


def check_package(
    package: Path,
    reference: Reference,
    tokenizer: Tokenizer,
    form: str,
    mnn: str,
    settings: Mapping[str, Any] | None = None,
) -> CheckResult:
    """Have the engine continue 20 prompts of 1 to 200 tokens and the chats, and the reference follow.

    form: of the weights, `float32` where they are exact; see `CHAIN_BUDGETS`. Raises ExportError where the engine does
    not load the package.
    """
    config = reference.config
    texts = [text for text in TEXTS if _writes(tokenizer, text)]
    chats = [chat for chat in CHATS if _writes(tokenizer, chat_prompt(*chat))]
    wanted = [tokenizer.prompt_ids(chat_prompt(*chat)) for chat in chats]
    room = config.max_positions - STEPS - 1
    prompts = [*random_prompts(config), *(ids for ids in wanted if len(ids) <= room)]
    answers = ask(package, prompts, STEPS, logits=True, texts=texts, chats=chats, settings=settings)
    seen = NextTokens()
    expected = follow(reference, prompts, answers.tokens)
    for tokens, logits, right in zip(answers.tokens, answers.logits, expected, strict=True):
        seen.add(right, np.array(tokens), logits)
    return CheckResult(
        mnn,
        form,
        len(prompts),
        seen.same,
        seen.count,
        float(np.mean(seen.divergences)),
        seen.worst.norm,
        tuple(text for text, ids in zip(texts, answers.ids, strict=True) if ids != tokenizer.encode(text)),
        tuple(i for i, (_, ids) in enumerate(answers.chats) if ids != wanted[i]),
    )


def random_prompts(config: ModelConfig) -> list[list[int]]:
    """Seeded prompts of 1 to 200 text tokens (fewer where the model has fewer positions), `[gMASK]` and `<sop>`."""
    ids = config.special_ids
    special = {ids.mask, ids.gmask, ids.bos, ids.eos, ids.pad}
    text = [token for token in range(config.num_image_tokens, config.vocab_size) if token not in special]
    longest = max(min(_LONGEST, config.max_positions - STEPS - 3), 1)
    lengths = np.unique(np.geomspace(1, longest, PROMPTS).astype(int)).tolist()
    lengths += [longest - step for step in range(1, PROMPTS) if longest - step not in lengths and longest > step]
    random = np.random.default_rng(0)
    return [[*random.choice(text, count).tolist(), ids.gmask, ids.bos] for count in lengths[:PROMPTS]]


def _writes(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the vocabulary, which may be slimmed, has what it takes to write a text."""
    try:
        tokenizer.encode(text)
    except GlmExportError:
        return False
    return True
