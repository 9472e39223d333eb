"""How far int4 is from float, by answers and by numbers: the same questions to both bundles.

python examples/compare_int4.py out/demo/float32 out/demo/int4 examples/tiny-chatglm-heldout.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path

import glmexport
from glmexport.evaluation import evaluate, read_examples

BATCH = 8


def main(float_bundle: str, int4_bundle: str, questions: str) -> None:
    """Print both scores and the first questions that the two answer differently."""
    examples = read_examples(Path(questions))
    with glmexport.Session(float_bundle) as ours, glmexport.Session(int4_bundle) as theirs:
        exact = evaluate(ours, examples, batch=BATCH)
        rounded = evaluate(theirs, examples, batch=BATCH, baseline=ours)
    print(f"float: {exact.exact}/{exact.count} exact, perplexity {exact.perplexity:.4f}")
    numbers = f"perplexity {rounded.perplexity:.4f}, KL {rounded.divergence:.5f}"
    print(f"int4:  {rounded.exact}/{rounded.count} exact, {numbers}")
    different = [
        f"  {example.prompt!r}: {one!r}, int4 {other!r}"
        for example, one, other in zip(examples, exact.answers, rounded.answers, strict=True)
        if one != other
    ]
    print(f"{len(different)} answers differ", *different[:5], sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
