"""Medusa: a few residual heads on a frozen model draft a tree of tokens, which one step of the model checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least

if TYPE_CHECKING:
    from volvelle.systems.language.decoder import Decoder
    from volvelle.systems.language.medusa import MedusaHeads

CLAIM = Claim(
    title="Medusa: several heads on one model draft for it",
    family="decode",
    paper=Paper(
        "Cai et al.",
        2024,
        "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads",
        "abstract, sections 2.1 and 2.2.1",
        "https://arxiv.org/abs/2401.10774",
    ),
    sentence="Medusa-1 can achieve over 2.2x speedup without compromising generation quality",
    measured_by="four heads with the model's own vocabulary projection, trained for minutes on SmolLM2-135M's own "
    "greedy answers to data-to-text prompts; decoding with trees grown from their held-out accuracy and without, in "
    "turn, on other prompts; equality of the answers in fp32; the bound is tokens a step over the cost of that step",
    summary="Small heads on a model's last state guess the next few tokens at once; the model checks a tree of guesses "
    "in one step and keeps those it would have written.",
    summary_zh="在模型最后状态上加几个小头，一次猜出后续若干词元；模型一步验证一棵候选树，只保留它本会写出的。",
    seconds={"quick": 60, "full": 900},
    recipe="volvelle draft smollm2 data=prompts distill=true precision=bf16",
)

HEADS, DECAY, HELD = 4, 0.8, 16
SIZES: dict[Budget, dict[str, int]] = {
    "quick": {"prompts": 96, "tokens": 32, "steps": 24, "vocabulary": 4096, "asked": 4, "rounds": 2},
    "full": {"prompts": 960, "tokens": 64, "steps": 300, "vocabulary": 8192, "asked": 12, "rounds": 5},
}
NODES = (3, 7, 15)
"""Tree sizes to choose from."""


def measure(budget: Budget) -> Measurement:
    """Train heads on the model's own answers, and decode with them."""
    import torch

    from volvelle.claims.decode_runs import compare, decoding_findings, in_fp32, same_answers, smollm2, step_costs
    from volvelle.claims.own_answers import ask
    from volvelle.decode.cost import measured_improvement
    from volvelle.decode.drafters.medusa import Medusa
    from volvelle.decode.trees import expected_length, grow
    from volvelle.errors import VolvelleError

    size = SIZES[budget]
    try:
        model = smollm2()
        prompts, others = ask(model, size["prompts"], size["asked"] + HELD)
    except VolvelleError as error:
        return Measurement(unmeasurable=f"SmolLM2 or the data cannot be had: {error}")
    dtype = "bf16" if model.dtype == torch.bfloat16 else "fp32"
    asked = others[HELD:]
    heads, held = train(model, prompts + others[:HELD], size, dtype)
    heads = heads.to(model.dtype)
    assert heads.acceptance is not None
    table = heads.acceptance.tolist()
    costs = step_costs(model, [1 + k for k in NODES])
    lengths = {k: expected_length(grow(table, k), table) for k in NODES}
    k = max(NODES, key=lambda k: measured_improvement(lengths[k], k, costs, 0.0))
    tokens = size["tokens"]
    options: Any = {"max_tokens": tokens, "eos_ids": None}  # where the answers that heads have learnt end, so do these
    found = compare(model, Medusa(heads, k=k), asked, rounds=size["rounds"], **options)
    exact = compare(in_fp32(model), Medusa(heads.float(), k=k), asked[:3], rounds=1, **options)
    findings = [
        *(Finding(f"held-out accuracy of head {i}", held[f"token_{i + 1}_accuracy"]) for i in range(1, HEADS + 1)),
        *decoding_findings("medusa", found, costs[1 + k], k),
        same_answers("medusa", exact, "fp32"),
        at_least("medusa: speed-up that the paper found", found.speed_up, 2.2, "x"),
    ]
    notes = [
        f"{found.differing} of {len(asked)} answers differ in {dtype}, where {found.near_ties} choices were near ties",
        "the paper's heads are trained for hours on 60,000 conversations, for models of 7B and more",
    ]
    setting = {**size, "heads": HEADS, "tree nodes": k, "dtype": dtype, "threads": torch.get_num_threads(),
               "model": "SmolLM2-135M-Instruct"}  # fmt: skip
    return Measurement(findings, setting=setting, notes=notes, peers={"plain decoding, torch": torch.__version__})


def train(
    model: Decoder, prompts: list[list[int]], size: dict[str, int], precision: Any
) -> tuple[MedusaHeads, dict[str, float]]:
    """Heads trained on the model's own answers to the first of the prompts; held-out metrics on those to the last."""
    from volvelle.claims.own_answers import answers
    from volvelle.data.loader import Loader
    from volvelle.data.tokens import Encoded, TokenDataset, collate
    from volvelle.systems.language.draft_head import DraftHead, frequent_tokens
    from volvelle.systems.language.medusa import MedusaHeads
    from volvelle.train.ahead import AheadObjective, AheadOfHidden, held_out_ahead
    from volvelle.train.loop import fit
    from volvelle.train.observer import Quiet
    from volvelle.train.options import FitOptions

    encoded = [
        Encoded(prompt + answer, [False] * len(prompt) + [True] * len(answer))
        for prompt, answer in answers(model, prompts, size["tokens"])
    ]
    count = len(encoded) - HELD
    sides = [TokenDataset(part, ["an answer"] * len(part)) for part in (encoded[:count], encoded[count:])]
    options = FitOptions(steps=size["steps"], batch=8, learning_rate=2e-3, precision=precision, checkpoint_every=None)
    learning, held = (Loader(side, 8, seed=0, collate=collate, lengths=side.lengths) for side in sides)
    learnt = (ids[learn] for ids, learn in (sides[0][i] for i in range(len(sides[0]))))
    assert model.tokenizer is not None
    tokens = frequent_tokens(learnt, model.config.vocabulary, size["vocabulary"], always=model.tokenizer.eos_ids)
    heads = MedusaHeads.of(model, HEADS, tokens=tokens)
    weights = [DECAY**k for k in range(1, HEADS + 1)]
    ahead, head = AheadOfHidden(heads), DraftHead(model, tokens)
    objective = AheadObjective(model, ahead, options, weights=weights, head=head)
    fit(objective, learning, options=options, observer=Quiet())
    measured = held_out_ahead(model, ahead, held, head, precision)
    heads.acceptance = measured.acceptance
    return heads.eval(), measured.metrics
