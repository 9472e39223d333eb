"""From a checkpoint to an answer: export it slimmed and in int4, then ask it.

python examples/split_and_run.py examples/tiny-chatglm out/example-int4 "12+34="
"""

from __future__ import annotations

import sys

import glmexport


def main(checkpoint: str, bundle: str, question: str) -> None:
    """Write the bundle, replacing one that is there, and print the answer."""
    written = glmexport.split(checkpoint, bundle, slim=True, embedding="bf16", quantize="int4", force=True)
    print(f"{bundle}: {len(written.graphs)} graphs, {written.total_bytes:,} bytes")
    with glmexport.Session(bundle) as session:
        print(glmexport.generate(session, question, greedy=True).text)


if __name__ == "__main__":
    main(*sys.argv[1:])
