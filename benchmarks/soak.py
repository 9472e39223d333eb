"""A server under many clients at once, some of which behave badly: does it leak, answer wrongly, or say 500?

    python benchmarks/soak.py int4/ [--clients 50] [--requests 2000] [--slots 8] [--seed 1]

Starts `glmexport serve` on the loopback address, asks it in both APIs with random cancels, slow readers and malformed
bodies, and compares every whole answer with what the same prompt gave when nobody else asked. Ends with 1 where an
answer was wrong, a 500 was said, a slot was lost or memory grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx

PROMPTS = [f"{number}+{number + 7}=" for number in range(10, 40)] + [
    f"Reverse: {word}" for word in ("apple", "water", "stone", "green", "table", "mouse", "cloud", "bread")
]
MALFORMED = (
    b"",
    b"{",
    b"[1]",
    b'{"model": 1}',
    b'{"model": "soak", "messages": 5}',
    b'{"model": "none", "prompt": "x"}',
    b'{"model": "soak", "prompt": "x", "options": {"temperature": "hot"}}',
    b'{"model": "soak", "prompt": "\\ud800", "max_tokens": 1}',
    b"\xff\xfe" * 50,
    b'{"model": "soak", "prompt": "' + b"x" * 50_000 + b'", "max_tokens": 1}',
)
GROWTH = 1.10
"""Times the memory of the first third that the last third may take."""


class Soak:
    """Counts of one run."""

    def __init__(self, url: str, seed: int) -> None:
        self.url, self.random = url, random.Random(seed)
        self.statuses, self.kinds = Counter[int](), Counter[str]()
        self.expected: dict[str, str] = {}
        self.wrong: list[str] = []

    async def whole(self, client: httpx.AsyncClient, prompt: str, surface: str) -> str | None:
        """One answer, None where the queue was full."""
        if surface == "ollama":
            body = {
                "model": "soak",
                "prompt": prompt,
                "stream": False,
                "options": {"temperature": 0, "num_predict": 24},
            }
            response = await client.post("/api/generate", json=body)
        else:
            body = {"model": "soak", "prompt": prompt, "temperature": 0, "max_tokens": 24}
            response = await client.post("/v1/completions", json=body)
        self.statuses[response.status_code] += 1
        if response.status_code != 200:
            return None
        document = response.json()
        return document["response"] if surface == "ollama" else document["choices"][0]["text"]

    async def streamed(self, client: httpx.AsyncClient, prompt: str, *, leave: bool, slow: bool) -> str | None:
        """An answer read line by line. leave: go away in the middle. slow: wait between lines."""
        options = {"temperature": 0, "num_predict": 400 if leave else 24}
        body = {"model": "soak", "prompt": prompt, "options": options}
        text, lines = "", 0
        async with client.stream("POST", "/api/generate", json=body) as response:
            self.statuses[response.status_code] += 1
            if response.status_code != 200:
                return None
            async for line in response.aiter_lines():
                lines += 1
                text += json.loads(line).get("response", "")
                if leave and lines >= 1 + self.random.randrange(3):
                    return None
                if slow:
                    await asyncio.sleep(self.random.random() * 0.05)
        return text

    async def one(self, client: httpx.AsyncClient) -> None:
        """One request of some kind."""
        kind = self.random.choices(("whole", "stream", "slow", "leave", "malformed"), (40, 20, 10, 15, 15))[0]
        prompt = self.random.choice(PROMPTS)
        self.kinds[kind] += 1
        found: str | None = None
        if kind == "malformed":
            path = self.random.choice(("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions"))
            response = await client.post(path, content=self.random.choice(MALFORMED))
            self.statuses[response.status_code] += 1
            return
        if kind == "whole":
            found = await self.whole(client, prompt, self.random.choice(("ollama", "openai")))
        else:
            found = await self.streamed(client, prompt, leave=kind == "leave", slow=kind == "slow")
        if found is not None and found != self.expected[prompt]:
            self.wrong.append(f"{prompt!r}: {found!r}, expected {self.expected[prompt]!r}")


def memory_of(process: int) -> int:
    """Bytes that a process holds now."""
    for line in Path(f"/proc/{process}/status").read_text("ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


async def run(soak: Soak, process: int, clients: int, requests: int) -> list[int]:
    """All requests; gives the memory of the server over time, in bytes."""
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    memory, left = list[int](), requests
    async with httpx.AsyncClient(base_url=soak.url, timeout=120, limits=limits, trust_env=False) as client:
        for prompt in PROMPTS:
            soak.expected[prompt] = await soak.whole(client, prompt, "ollama") or ""

        async def worker() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await soak.one(client)
                if left % 20 == 0:
                    memory.append(memory_of(process))

        await asyncio.gather(*(worker() for _ in range(clients)))
        for _ in range(200):  # what was left behind is freed at the next step
            metrics = (await client.get("/metrics")).text
            if 'glmexport_rows_running{model="soak"} 0.0' in metrics:
                break
            await asyncio.sleep(0.05)
        else:
            soak.wrong.append("rows still run though nobody waits for them")
    return memory


def main() -> int:
    """Print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    command = [sys.executable, "-m", "glmexport", "serve", options.bundle, "--port", "0", "--served-model-name", "soak"]
    command += ["--max-num-seqs", str(options.slots), "--max-queue", "30", "--threads", "1", "-q"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        soak = Soak(server.stdout.readline().strip(), options.seed)
        begun = time.monotonic()
        memory = asyncio.run(run(soak, server.pid, options.clients, options.requests))
        seconds = time.monotonic() - begun
    finally:
        server.terminate()
        server.wait(60)
    third = max(len(memory) // 3, 1)
    first, last = (max(part, default=0) for part in (memory[:third], memory[-third:]))
    print(f"{options.requests} requests of {options.clients} clients in {seconds:.0f} s: {dict(soak.kinds)}")
    print(f"statuses: {dict(sorted(soak.statuses.items()))}")
    print(f"memory: {first / 1e6:.1f} MB at most in the first third, {last / 1e6:.1f} MB in the last")
    print(f"wrong answers: {len(soak.wrong)}; 500s: {soak.statuses[500]}; the server ended with {server.returncode}")
    for line in soak.wrong[:10]:
        print(f"  {line}")
    failed = soak.wrong or soak.statuses[500] or last > first * GROWTH or server.returncode
    print("FAIL" if failed else "PASS")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
