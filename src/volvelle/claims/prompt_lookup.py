"""Prompt lookup: drafts copied from the prompt, where answers repeat it, and what they cost where answers do not."""

from __future__ import annotations

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

CLAIM = Claim(
    title="Prompt lookup decoding",
    family="decode",
    paper=Paper(
        "Saxena",
        2023,
        "Prompt Lookup Decoding",
        "README, TLDR",
        "https://github.com/apoorvumang/prompt-lookup-decoding",
    ),
    sentence="we replace the draft model with simple string matching in the prompt to generate candidate token "
    "sequences; this results in significant speedups (2x-4x) in input-grounded tasks, with no effect on output quality",
    measured_by="SmolLM2-135M, greedy, batch 1, plain decoding and drafts turn about: prompts that ask to repeat or to "
    "change a text, beside prompts that do not; answers compared token by token in fp32; the bound from acceptance and "
    "the measured cost of a step",
    summary="What followed the last words where they stood before is taken for a draft: copies, edits, quotations and "
    "code come several tokens a step, and no model drafts.",
    summary_zh="把最近几个词元先前出现处的后续内容当作草稿：复制、改写、引用和代码每步可得多个词元，无需草稿模型。",
    seconds={"quick": 60, "full": 900},
    recipe='volvelle generate smollm2 "Repeat: one two three. one two" draft=lookup stats=true',
)

TEXT = (
    "The harbour of Port Elwin was built in 1874 by the engineer Clara Whitmore. Its long stone pier shelters forty "
    "fishing boats from the western storms. Every morning the boats leave before sunrise, and every evening they bring "
    "back herring, mackerel and crab for the market behind the old customs house."
)
CODE = (
    "def total(prices, rate):\n    result = 0\n    for price in prices:\n        result = result + price * rate\n"
    "    return result\n"
)
TRIPLES = "name: The Blue Lantern | type: restaurant | food: Italian | area: riverside | price: cheap | family: yes"
GROUNDED = {
    "repeat": f"Repeat this text word for word:\n\n{TEXT}",
    "rewrite": f"Write this text again with the year changed to 1921:\n\n{TEXT}",
    "code": f"Rename the variable result to amount and print the whole function again:\n\n{CODE}",
    "quote": f"Which sentence says who built the harbour? Quote it first, then the whole text.\n\n{TEXT}",
    "data to text": f"Write these facts as sentences, then list the facts again:\n\n{TRIPLES}",
}
FREE = {
    "story": "Write a short story about a lighthouse keeper who finds a map.",
    "advice": "How can I sleep better? Give reasons for each piece of advice.",
}
SIZES = {"quick": (3, 1, 64, 2), "full": (5, 2, 160, 5)}
"""Grounded prompts, free ones, tokens an answer, rounds."""
K = 15


def measure(budget: Budget) -> Measurement:
    """Speed-up with drafts of fixed length and with those that the policy chooses; acceptance; equality."""
    from volvelle.claims.decode_runs import Fixed, open_bench
    from volvelle.decode.drafters.prompt_lookup import PromptLookup
    from volvelle.decode.policy import Adaptive
    from volvelle.errors import VolvelleError

    grounded, free, tokens, rounds = SIZES[budget]
    prompts = dict([*GROUNDED.items()][:grounded] + [*FREE.items()][:free])
    copying, inventing = [*prompts][:grounded], [*prompts][grounded:]
    try:
        bench = open_bench(prompts, tokens, rounds)
    except VolvelleError as error:
        return Measurement(unmeasurable=f"SmolLM2 cannot be had: {error}")
    drafter, fixed = PromptLookup(k=K), Fixed(K)
    always = bench.compare(drafter, fixed, copying)
    adaptive = bench.compare(drafter, Adaptive(), copying)
    elsewhere = bench.compare(drafter, Adaptive(), inventing)
    findings = [
        *bench.curve_findings(),
        *bench.judged("grounded", always, fixed),
        at_least("grounded: speed-up, lengths chosen by the policy", adaptive.speed_up, 2.0, "x",
                 spread=adaptive.spread),
        Finding("other prompts: draft tokens kept a step with a draft", elsewhere.kept_a_draft, "tokens"),
        at_least("other prompts: speed-up, lengths chosen by the policy", elsewhere.speed_up, 0.97, "x"),
        Finding(f"{bench.setting['dtype']} answers that differ from plain ones, of {len(prompts)}",
                adaptive.differing + elsewhere.differing),
        bench.identical("grounded", drafter, tokens // 2, copying[:2]),
        at_most("dictionary accesses of the index for a token of the text", looked_at(drafter), 4 * drafter.n),
    ]  # fmt: skip
    notes = ["in fp32 a step of n tokens rounds like one of 1 but for near ties; in bf16 both round more coarsely"]
    return Measurement(findings, setting=bench.setting | {"n": drafter.n, "k": K}, notes=notes)


def looked_at(drafter) -> float:
    """Dictionary accesses a token of an index that grows to 20,000 tokens, by count: no search through the text."""
    counted = Counted()
    index = drafter.index()
    index.nexts = counted
    for token in range(20_000):
        index.extend([token * token % 97])
        next(index.places(index.text), None)
    return counted.accesses / 20_000


class Counted(dict):
    """A dictionary that counts its accesses."""

    accesses = 0

    def get(self, key, default=None):
        """As a dictionary does, counted."""
        self.accesses += 1
        return super().get(key, default)

    def setdefault(self, key, default=None):
        """As a dictionary does, counted."""
        self.accesses += 1
        return super().setdefault(key, default)
