"""Many clients of one server: tokens a second against loops over transformers, and a minute of checked streams.

    python -m benchmarks.serving [--quick] [--only speed minute flips] [--rounds 5] [--threads N] [--draft lookup]

speed: 32 clients ask `volvelle serve smollm2` at once over HTTP, 48 tokens each, in bf16; transformers answers the same
prompts in its own process one after the other, as a server without batching does, and all in one padded batch, which
only somebody who has all requests at once can do. minute: 32 clients stream for 60 seconds under exact=bitwise; every
answer is compared with the one that the same server gave to it alone. flips: the same in the default mode, where a step
of another width may round a near-tie the other way. Writes results/serving.json; --quick prints only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol, tables
from benchmarks.support.decode_prompts import PROMPTS

PARTS = ("speed", "minute", "flips")
CLIENTS, TOKENS, SECONDS = 32, 48, 60.0
ALONE, TOGETHER = "transformers, one by one", "transformers, one batch"


def main() -> None:
    parser = protocol.parser(__doc__, PARTS)
    parser.add_argument("--draft", help="what drafts, as `volvelle serve` takes it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with protocol.alone():
        facts = protocol.machine(("torch", "transformers", "httpx"))
        rows = protocol.read("serving").get("rows", [])
        for part in options.only:
            row = speed(options) if part == "speed" else minute(options, part)
            rows = protocol.keep(rows, row, ("what", "draft"))
            print(json.dumps({key: value for key, value in row.items() if key != "seconds"}), flush=True)
            if not options.quick:
                print(protocol.write("serving", {"machine": facts, "rows": rows}))
                tables.write("serving")


@contextlib.contextmanager
def serving(*words: str) -> Iterator[tuple[str, int]]:
    """The address of a server in a process of its own, and the process."""
    command = [sys.executable, "-m", "volvelle", "serve", "smollm2", "port=0", "precision=bf16", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.match(r"(http://\S+)/v1 ", line):
                yield found[1], process.pid
                return
        raise RuntimeError("the server did not start")
    finally:
        process.terminate()
        process.wait(60)


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Different questions, one a client."""
    texts = [text for kind in PROMPTS.values() for text in kind]
    return [[{"role": "user", "content": f"({i}) {texts[i % len(texts)]}"}] for i in range(count)]


@dataclass
class Streamed:
    """An answer as it came: its text, its tokens, and when its pieces arrived."""

    text: str = ""
    tokens: int = 0
    times: list[float] = field(default_factory=list)


async def ask(client: httpx.AsyncClient, messages: Any, tokens: int) -> Streamed:
    """Stream one answer."""
    body = {
        "model": "smollm2", "messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    found = Streamed(times=[time.perf_counter()])
    async with client.stream("POST", "/v1/chat/completions", json=body) as stream:
        stream.raise_for_status()
        async for line in stream.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if event["usage"]:
                found.tokens = event["usage"]["completion_tokens"]
            elif text := event["choices"][0]["delta"].get("content"):
                found.text += text
                found.times.append(time.perf_counter())
    return found


async def all_at_once(url: str, asked: Sequence[Any], tokens: int) -> list[Streamed]:
    """Every answer from a client of its own."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        return await asyncio.gather(*(ask(client, messages, tokens) for messages in asked))


def speed(options: Any) -> dict[str, Any]:
    """The same answers by the server and by transformers."""
    clients, tokens = (4, 6) if options.quick else (CLIENTS, TOKENS)
    rounds = options.rounds or (2 if options.quick else 5)
    asked = conversations(clients)
    peer = Peer(asked, tokens)
    counts: dict[str, int] = {}
    words = ["seats=32", "context=1024"] + ([f"draft={options.draft}"] if options.draft else [])
    with serving(*words) as (url, _):

        def ours() -> None:
            counts["ours"] = sum(one.tokens for one in asyncio.run(all_at_once(url, asked, tokens)))

        def one_by_one() -> None:
            counts[ALONE] = peer.one_by_one()

        def one_batch() -> None:
            counts[TOGETHER] = peer.one_batch()

        variants = {"ours": ours, ALONE: one_by_one, TOGETHER: one_batch}
        series = protocol.interleave(variants, rounds=rounds, most=2 * rounds)
    return {
        "what": "speed", "draft": options.draft, "clients": clients, "tokens": counts,
        "rates": {who: counts[who] / one.summary()["wall_median"] for who, one in series.items()},
        "speed": {who: protocol.compare(series, "ours", who) for who in (ALONE, TOGETHER)},
        "seconds": {who: one.summary() for who, one in series.items()},
    }  # fmt: skip


class Peer:
    """transformers on the same weights."""

    def __init__(self, asked: Sequence[Any], tokens: int):
        from transformers import LlamaForCausalLM

        from volvelle import hub
        from volvelle.systems.language import load_language_model
        from volvelle.systems.language.huggingface import write_folder

        ours = load_language_model(str(hub.fetch("smollm2")), dtype=torch.bfloat16)
        assert ours.tokenizer is not None
        with tempfile.TemporaryDirectory() as folder:
            write_folder(ours, folder)  # pyright: ignore[reportArgumentType]  # a decoder
            self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.ends = list(ours.tokenizer.eos_ids)
        self.prompts = [ours.tokenizer.chat_ids(messages) for messages in asked]
        self.tokens = tokens

    def one_by_one(self) -> int:
        """Answer them in turn; the number of tokens."""
        return sum(self._generate([prompt]) for prompt in self.prompts)

    def one_batch(self) -> int:
        """Answer them in one padded batch; the number of tokens."""
        return self._generate(self.prompts)

    @torch.no_grad()
    def _generate(self, prompts: Sequence[Sequence[int]]) -> int:
        longest, pad = max(map(len, prompts)), self.ends[0]
        ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=self.tokens, do_sample=False, eos_token_id=self.ends,
            pad_token_id=pad,
        )  # fmt: skip
        count = 0
        for row in out[:, longest:].tolist():
            ended = next((i for i, token in enumerate(row) if token in self.ends), len(row) - 1)
            count += ended + 1
        return count


EXACT = {"minute": "bitwise", "flips": "default"}


def minute(options: Any, part: str) -> dict[str, Any]:
    """Streams for a minute, each answer compared with the one that it got alone."""
    clients, tokens, seconds = (4, 6, 5.0) if options.quick else (CLIENTS, TOKENS, SECONDS)
    asked = conversations(clients)
    words = ["seats=32", "context=1024", f"exact={EXACT[part]}"] + ([f"draft={options.draft}"] if options.draft else [])
    with serving(*words) as (url, pid):
        alone = [asyncio.run(all_at_once(url, [messages], tokens))[0] for messages in asked]
        found, memory = asyncio.run(stream_for(url, pid, asked, tokens, seconds))
    answers = [answer for own in found for answer in own]
    gaps = [late - early for one in answers for early, late in zip(one.times[1:-1], one.times[2:], strict=True)]
    firsts = [one.times[1] - one.times[0] for one in answers if len(one.times) > 1]
    wrong = sum(answer.text != before.text for own, before in zip(found, alone, strict=True) for answer in own)
    return {
        "what": part, "exact": EXACT[part], "draft": options.draft, "clients": clients,
        "answers": len(answers), "different": wrong,
        "tokens_a_second": sum(one.tokens for one in answers) / seconds,
        "gap_median": statistics.median(gaps), "gap_p95": statistics.quantiles(gaps, n=20)[-1],
        "first_p95": statistics.quantiles(firsts, n=20)[-1], "memory_mib": [round(x / 2**20) for x in memory],
    }  # fmt: skip


async def stream_for(
    url: str, pid: int, asked: Sequence[Any], tokens: int, seconds: float
) -> tuple[list[list[Streamed]], list[int]]:
    """Every client asks again and again; and the server's memory, twelve times in between."""
    until, memory = time.perf_counter() + seconds, list[int]()

    async def one(client: httpx.AsyncClient, messages: Any) -> list[Streamed]:
        found = []
        while time.perf_counter() < until:
            found.append(await ask(client, messages, tokens))
        return found

    async def watch() -> None:
        while time.perf_counter() < until:
            memory.append(_resident(pid))
            await asyncio.sleep(seconds / 12)

    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        *found, _ = await asyncio.gather(*(one(client, messages) for messages in asked), watch())
    return found, memory


def _resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
