"""Train the example checkpoint that answers: a ChatGLM-6B of 4 small blocks, in the layout of the first revision.

    python examples/train_tiny.py examples/tiny-chatglm
    python examples/train_tiny.py out/quick --steps 100

The held-out examples are written beside it, as `<output>-heldout.jsonl`, and answered at the end. What the model learns
is in `tiny_tasks.py`. The whole run takes about 10 minutes on 2 quiet cores that multiply in bfloat16 by themselves
(0.33 s a step), longer on others. It is seeded: the same machine writes the same files again.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections import Counter
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812  (the name PyTorch's own documentation uses)
from sentencepiece import SentencePieceTrainer
from sentencepiece import sentencepiece_model_pb2 as proto
from tiny_tasks import Example, characters, held_out_examples, latin_words, training_examples, vocabulary_texts
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from glmexport.config import SpecialIds
from glmexport.models.chatglm_6b import ChatGLMConfig, ChatGLMForConditionalGeneration, inverse_frequencies
from glmexport.prompt import prepare_prompt
from glmexport.tokenizer import SPECIAL_PIECES, Tokenizer

SEED = 6
IMAGE_TOKENS = 256  # rows in front that no text uses, as the 20000 of the released checkpoint
HIDDEN, BLOCKS, HEADS = 128, 4, 4
STEPS, WARMUP = 1600, 100
EXAMPLES = 192  # a step
PARTS = 4  # a step, each of examples of similar length
RATE, DECAY = 2e-3, 0.05
BRANCH_GAIN = 4.0  # what a block adds starts this much larger, because its input is added times sqrt(56)


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- tokenizer


def train_tokenizer() -> bytes:
    """A serialized SentencePiece model with the pieces of ChatGLM-6B's kinds, in its order."""
    texts = vocabulary_texts()
    # Only what stands in several surroundings becomes a piece.
    texts += [before + word + after for word in latin_words() for before in ("", "：") for after in ("", ".", "?")]
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([text.replace("\n", "<n>") for text in texts]),
        model_writer=written,
        model_type="unigram",
        vocab_size=1500,
        hard_vocab_limit=False,
        max_sentencepiece_length=10,
        required_chars=characters(),
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        user_defined_symbols=["<n>"],
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    model = proto.ModelProto()
    model.ParseFromString(written.getvalue())
    return arrange_pieces(model).SerializeToString(deterministic=True)


def arrange_pieces(model: proto.ModelProto) -> proto.ModelProto:
    """The model with its pieces in the released one's order, without parts of Latin words, and with no paths in it."""
    kind = proto.ModelProto.SentencePiece
    words = frozenset(latin_words())

    def is_wanted(piece: str) -> bool:
        word = piece.lstrip("▁")
        if word.isascii() and word.isalpha() and len(word) > 1:
            return word in words and (word[0].isupper() or (piece[0] == "▁" and len(word) > 3))
        return len(piece) <= 4 and (len(piece) == 1 or "▁" not in piece)

    def added(name: str, kind_of_piece: int) -> proto.ModelProto.SentencePiece:
        return kind(piece=name, score=0.0, type=kind_of_piece)

    pieces = list(model.pieces)
    text = [piece for piece in pieces if piece.type == kind.NORMAL and is_wanted(piece.piece)]
    text.sort(key=lambda piece: (piece.piece != "▁", -piece.score, piece.piece))
    blanks = ["<|tab|>", *(f"<|blank_{count}|>" for count in range(2, 81))]
    arranged = [
        *pieces[:4],
        added("<n>", kind.USER_DEFINED),
        *text,
        *(added(name, kind.CONTROL) for name in SPECIAL_PIECES),
        *(added(name, kind.USER_DEFINED) for name in blanks),
        *(piece for piece in pieces if piece.type == kind.BYTE),
    ]
    del model.pieces[:]
    model.pieces.extend(arranged)
    for field in ("input", "model_prefix", "required_chars"):
        model.trainer_spec.ClearField(field)
    model.trainer_spec.vocab_size = len(arranged)
    return model


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    mask, gmask, _, _, bos, eos, *_ = tokenizer.encode("".join(SPECIAL_PIECES), special=True)
    return SpecialIds(mask=mask, gmask=gmask, bos=bos, eos=eos, pad=IMAGE_TOKENS + 3, forced=IMAGE_TOKENS + 5)


# --- model


def make_model(rows: int, ids: SpecialIds) -> ChatGLMForConditionalGeneration:
    """The reference, tied while it is trained, with weights to start from."""
    torch.manual_seed(SEED)
    config = ChatGLMConfig(
        vocab_size=rows,
        hidden_size=HIDDEN,
        num_layers=BLOCKS,
        num_attention_heads=HEADS,
        inner_hidden_size=4 * HIDDEN,
        bos_token_id=ids.bos,
        eos_token_id=ids.eos,
        tie_word_embeddings=True,
    )
    model = ChatGLMForConditionalGeneration(config).float()
    for name, parameter in model.named_parameters():
        if name.endswith("word_embeddings.weight"):
            torch.nn.init.normal_(parameter, std=0.05)
        elif name.endswith(("dense.weight", "dense_4h_to_h.weight")):
            torch.nn.init.normal_(parameter, std=BRANCH_GAIN * parameter.shape[1] ** -0.5)
        elif parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return model


def part_loss(model: ChatGLMForConditionalGeneration, rows: list[list[int]], ids: SpecialIds) -> Tensor:
    """The summed loss of all answers, each with its <eop>; rows are prompts with answers."""
    batch = prepare_prompt(rows, ids)
    tokens = torch.from_numpy(batch.input_ids)
    hidden, _, _ = model.transformer(
        tokens, torch.from_numpy(batch.position_ids), torch.from_numpy(batch.attention_mask)
    )
    targets = torch.zeros_like(tokens, dtype=torch.bool)
    for i, start in enumerate((batch.pad_lengths + batch.context_lengths).tolist()):
        targets[i, start + 1 :] = True
    # Only the places before an answer's tokens are asked for logits, which are most of the work elsewhere.
    logits = model.lm_head(hidden.transpose(0, 1)[:, :-1][targets[:, 1:]])
    return F.cross_entropy(logits, tokens[targets], reduction="sum")


def train(model: ChatGLMForConditionalGeneration, tokenizer: Tokenizer, ids: SpecialIds, steps: int) -> None:
    """AdamW over `steps` steps, each on examples that no other step has."""
    for block in model.transformer.layers:
        block.mlp.activation = partial(F.gelu, approximate="tanh")  # the same function, in one pass over memory
    large = [p for name, p in model.named_parameters() if name.endswith(("dense.weight", "dense_4h_to_h.weight"))]
    matrices = [p for p in model.parameters() if p.dim() == 2 and all(p is not other for other in large)]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": large, "lr": RATE * BRANCH_GAIN, "weight_decay": DECAY / BRANCH_GAIN},
        {"params": matrices, "lr": RATE, "weight_decay": DECAY},
        {"params": vectors, "lr": RATE, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), foreach=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, max(0.0, (steps - step) / max(1, steps - WARMUP)))
    )
    started, seen = time.monotonic(), 0.0
    model.train()
    for step in range(steps):
        rows = [
            [*tokenizer.prompt_ids(example.prompt), *tokenizer.encode(example.answer), ids.eos]
            for example in training_examples(SEED * 1_000_000 + step, EXAMPLES)
        ]
        rows.sort(key=len)
        targets = sum(len(row) - row.index(ids.bos) - 1 for row in rows)
        size = EXAMPLES // PARTS
        for start in range(0, EXAMPLES, size):
            with torch.autocast("cpu", torch.bfloat16):  # twice as fast; the weights stay float32
                loss = part_loss(model, rows[start : start + size], ids) / targets
            loss.backward()
            seen += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            log(f"step {step + 1}/{steps}  loss {seen / 100:.4f}  {time.monotonic() - started:.0f} s")
            seen = 0.0


# --- files


def tensors_of(model: ChatGLMForConditionalGeneration) -> dict[str, Tensor]:
    """All tensors in float16, as the released checkpoint has them: a head of its own, rotary speeds in every block."""
    tensors = {}
    for name, value in model.state_dict().items():
        tensors[name] = value.detach().to(torch.float16, copy=True)
        if name.endswith("input_layernorm.bias"):
            inverse = inverse_frequencies(HIDDEN // HEADS // 2, "cpu").half()
            tensors[name.replace("input_layernorm.bias", "attention.rotary_emb.inv_freq")] = inverse
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()
    return tensors


def write_weights(output: Path, tensors: dict[str, Tensor]) -> None:
    """Two shards and their index."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map: dict[str, str] = {}
    shards: dict[str, dict[str, Tensor]] = {}
    before = 0
    for name, tensor in tensors.items():
        file = f"pytorch_model-{1 if before < total / 2 else 2:05d}-of-00002.bin"
        shards.setdefault(file, {})[name] = tensor
        weight_map[name] = file
        before += tensor.nbytes
    for file, part in shards.items():
        torch.save(part, output / file)
    write_json(output / "pytorch_model.bin.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_configs(output: Path, rows: int, ids: SpecialIds) -> None:
    """`config.json` and `tokenizer_config.json` as they were in March 2023: of the special ids only two are named."""
    other = Path(__file__).with_name("chatglm-6b-tiny")
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    for later in ("mask_token_id", "gmask_token_id", "pad_token_id"):
        del config[later]
    sizes = {"hidden_size": HIDDEN, "inner_hidden_size": 4 * HIDDEN, "num_layers": BLOCKS, "num_attention_heads": HEADS}
    config |= {"vocab_size": rows, "bos_token_id": ids.bos, "eos_token_id": ids.eos, **sizes}
    tokenizer = json.loads((other / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(output / "config.json", config)
    write_json(output / "tokenizer_config.json", tokenizer | {"num_image_tokens": IMAGE_TOKENS})


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_held_out(path: Path, examples: list[Example]) -> None:
    lines = []
    for example in examples:
        line: dict[str, object] = {"prompt": example.query, "answer": example.answer}
        if example.history:
            line["history"] = example.history
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


# --- evaluation


@torch.inference_mode()
def answers(
    model: ChatGLMForConditionalGeneration, tokenizer: Tokenizer, ids: SpecialIds, prompts: list[str]
) -> list[str]:
    """The greedy answer to every prompt, of at most 40 tokens."""
    encoded = [(tokenizer.prompt_ids(prompt), i) for i, prompt in enumerate(prompts)]
    found = [""] * len(prompts)
    for _, group in groupby(sorted(encoded, key=lambda row: len(row[0])), key=lambda row: len(row[0])):
        together = list(group)
        rows = torch.tensor([row for row, _ in together])
        start, ended = rows.shape[1], torch.zeros(len(together), dtype=torch.bool)
        while rows.shape[1] < start + 40 and not ended.all():
            chosen = model(rows, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(dim=-1)
            ended |= chosen == ids.eos
            rows = torch.cat((rows, chosen[:, None]), dim=1)
        for row, (_, i) in zip(rows[:, start:].tolist(), together, strict=True):
            found[i] = tokenizer.decode(row[: row.index(ids.eos)] if ids.eos in row else row)
    return found


def evaluate(output: Path, tokenizer: Tokenizer, ids: SpecialIds, examples: list[Example]) -> None:
    """Log how many examples the written checkpoint answers exactly, computing in float32."""
    disable_progress_bar()
    model = ChatGLMForConditionalGeneration.from_pretrained(output, dtype=torch.float32).eval()
    given = answers(model, tokenizer, ids, [example.prompt for example in examples])
    right, asked = Counter[str](), Counter[str]()
    for example, answer in zip(examples, given, strict=True):
        asked[example.task] += 1
        right[example.task] += answer == example.answer
        if answer != example.answer and asked.total() - right.total() <= 10:
            log(f"  {example.prompt!r}: {answer!r}, not {example.answer!r}")
    for task, count in asked.items():
        log(f"{task:9} {right[task]:3} of {count}")
    log(f"{'all':9} {right.total():3} of {asked.total()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="directory of the checkpoint; made if need be")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training (default: %(default)s)")
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)

    model_bytes = train_tokenizer()
    (output / "ice_text.model").write_bytes(model_bytes)
    tokenizer = Tokenizer.load(output, num_image_tokens=IMAGE_TOKENS)
    ids = special_ids(tokenizer)
    rows = -(-(len(tokenizer.vocabulary_lines()) + 1) // 64) * 64  # at least one is padding
    held_out = held_out_examples(SEED)
    write_held_out(output.with_name(f"{output.name}-heldout.jsonl"), held_out)
    write_configs(output, rows, ids)

    model = make_model(rows, ids)
    log(
        f"{len(tokenizer.vocabulary_lines()) - IMAGE_TOKENS} pieces, {rows} rows, {model.num_parameters():,} parameters"
    )
    train(model, tokenizer, ids, arguments.steps)
    write_weights(output, tensors_of(model))
    evaluate(output, tokenizer, ids, held_out)
    log(f"{time.process_time() / 60:.1f} minutes of CPU time")


if __name__ == "__main__":
    main()
