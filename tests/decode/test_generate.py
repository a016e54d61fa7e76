"""The decoding loop: against a loop without a cache, against transformers, and against its own promises."""

from __future__ import annotations

import copy

import pytest
import torch

from volvelle.decode import Medusa, Rules, Sampling, generate, generate_batch, stream
from volvelle.decode.contract import Accepted, Draft, Drafter, Drafting
from volvelle.decode.loop import Help, begin
from volvelle.decode.request import Limits, Request
from volvelle.decode.seats import Seats
from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.language.medusa import MedusaHeads

PROMPT = [5, 17, 3, 88, 41]
PROMPTS = [[5, 17, 3, 88, 41], [9], [60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70], [2, 2]]


@torch.no_grad()
def slow_greedy(model, prompt, n):
    """The oracle: the whole text through the model for every token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_equals_recomputation(model, prompt):
    answer = generate(model, prompt, max_tokens=40)
    assert answer.tokens == slow_greedy(model, prompt, 40)
    assert answer.finish == "length"
    assert answer.steps == 40
    assert answer.accepted_per_step == 1.0
    assert answer.prompt_tokens == len(prompt)
    assert len(set(answer.tokens)) > 5, "a model that repeats one token would prove nothing"


def test_tensor_prompts(model):
    assert generate(model, torch.tensor(PROMPT), max_tokens=5).tokens == generate(model, PROMPT, max_tokens=5).tokens


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(repetition_penalty=1.3), Sampling(0.9, top_p=0.9, seed=4)])
def test_a_batch_equals_its_rows(model, sampling):
    # Near-ties could differ between batch sizes; in fp64 there are none.
    model = copy.deepcopy(model).double()
    together = generate_batch(model, PROMPTS, sampling=sampling, max_tokens=30)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, together, strict=True)):
        own = sampling if sampling.seed is None else Sampling(0.9, top_p=0.9, seed=4 + row)
        assert answer.tokens == generate(model, prompt, sampling=own, max_tokens=30).tokens


def test_rows_finish_when_they_finish(model):
    alone = [generate(model, prompt, max_tokens=30) for prompt in PROMPTS]
    eos = [alone[0].tokens[3], alone[2].tokens[11]]
    expected = []
    for answer in alone:
        ends = [answer.tokens.index(token) for token in eos if token in answer.tokens]
        expected.append(answer.tokens[: min(ends) + 1] if ends else answer.tokens)
    together = generate_batch(model, PROMPTS, max_tokens=30, eos_ids=eos)
    assert [answer.tokens for answer in together] == expected
    assert len({len(answer.tokens) for answer in together}) > 1
    for answer in together:
        assert answer.finish == ("eos" if answer.tokens[-1] in eos else "length")
        assert answer.steps == len(answer.tokens)


def test_seeds(model):
    def tokens(seed):
        return generate(model, PROMPT, sampling=Sampling(temperature=1.5, seed=seed), max_tokens=20).tokens

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    torch.manual_seed(3)
    first = tokens(None)
    assert first != tokens(None)
    torch.manual_seed(3)
    assert first == tokens(None)


def test_a_batch_of_equal_prompts_gives_different_answers(model):
    answers = generate_batch(model, [PROMPT] * 3, sampling=Sampling(temperature=1.5, seed=0), max_tokens=20)
    assert len({tuple(answer.tokens) for answer in answers}) == 3


def test_samplings_per_row(model):
    options = [Sampling(), Sampling(1.2, seed=5)]
    answers = generate_batch(model, [PROMPT, PROMPT], sampling=options, max_tokens=12)
    assert [answer.tokens for answer in answers] == [
        generate(model, PROMPT, sampling=one, max_tokens=12).tokens for one in options
    ]
    with pytest.raises(UsageError, match="2 prompts, but 1 samplings"):
        generate_batch(model, [PROMPT, PROMPT], sampling=[Sampling()])
    assert generate_batch(model, []) == []


def test_the_repetition_penalty_counts_prompt_and_answer(model):
    ids, tokens = list(PROMPT), []
    with torch.no_grad():
        for _ in range(20):
            logits = model(torch.tensor([ids])).logits[0, -1]
            seen = torch.tensor(sorted(set(ids)))
            logits[seen] = torch.where(logits[seen] < 0, logits[seen] * 1.5, logits[seen] / 1.5)
            tokens.append(int(logits.argmax()))
            ids.append(tokens[-1])
    assert generate(model, PROMPT, sampling=Sampling(repetition_penalty=1.5), max_tokens=20).tokens == tokens


def test_text_and_stream(speaking):
    answer = generate(speaking, PROMPT, max_tokens=30, eos_ids=())
    assert answer.text == "".join(speaking.tokenizer.piece(token) for token in answer.tokens)
    pieces = []
    generate(speaking, PROMPT, max_tokens=30, eos_ids=(), on_token=pieces.append)
    assert [piece.id for piece in pieces] == answer.tokens
    assert "".join(piece.text for piece in pieces) == answer.text
    assert [token.id for token in stream(speaking, PROMPT, max_tokens=30, eos_ids=())] == answer.tokens
    rows = []
    generate_batch(speaking, [PROMPT, [9]], max_tokens=5, eos_ids=(), on_token=lambda row, token: rows.append(row))
    assert rows == [0, 1] * 5


def test_stop_strings_across_tokens(speaking):
    free = generate(speaking, PROMPT, max_tokens=30, eos_ids=())
    word = free.text[6:10]
    shown = []
    answer = generate(speaking, PROMPT, max_tokens=30, eos_ids=(), stop=[word], on_token=shown.append)
    assert answer.finish == "stop"
    assert answer.text == "".join(token.text for token in shown) == free.text[: free.text.index(word)]
    assert answer.tokens == free.tokens[: len(answer.tokens)]
    assert word in speaking.tokenizer.decode(answer.tokens)
    assert word not in speaking.tokenizer.decode(answer.tokens[:-1])


def test_held_back_text_is_released_at_the_end(speaking):
    free = generate(speaking, PROMPT, max_tokens=8, eos_ids=())
    answer = generate(speaking, PROMPT, max_tokens=8, eos_ids=(), stop=[free.text[-2:] + "never"])
    assert answer.finish == "length"
    assert answer.text == free.text


def test_the_eos_token_is_counted_but_not_shown(speaking):
    free = generate(speaking, PROMPT, max_tokens=30, eos_ids=())
    end = free.tokens[7]
    first = free.tokens.index(end)
    answer = generate(speaking, PROMPT, max_tokens=30, eos_ids=[end])
    assert answer.tokens == free.tokens[: first + 1]
    assert answer.text == speaking.tokenizer.decode(free.tokens[:first])
    assert answer.finish == "eos"


def test_lengths_that_do_not_fit_are_said(model):
    context = model.config.context
    with pytest.raises(
        VolvelleError, match=f"120 tokens and max_tokens=9 exceed the model's context of {context}"
    ) as error:
        generate(model, [1] * 120, max_tokens=9)
    assert error.value.tip == "max_tokens=8 fits"
    assert len(generate(model, [1] * 120, max_tokens=8).tokens) == 8
    assert len(generate(model, [1] * 120, max_tokens=None).tokens) == 8
    with pytest.raises(VolvelleError, match=r"the prompt has 128 tokens.*no room for an answer"):
        generate(model, [1] * context, max_tokens=None)
    with pytest.raises(VolvelleError, match="the prompt is empty"):
        generate(model, [])
    with pytest.raises(VolvelleError, match="token 96 is outside the model's vocabulary of 96"):
        generate(model, [1, 96])
    with pytest.raises(UsageError, match="max_tokens must be at least 1, got 0"):
        generate(model, [1], max_tokens=0)
    with pytest.raises(UsageError, match="has no tokenizer"):
        generate(model, [1], max_tokens=9, stop=["x"])
    with pytest.raises(UsageError, match="stop: expected a list"):
        stream(model, [1], stop="x")


@pytest.mark.parametrize(
    ("prompt", "says", "tip"),
    [
        (torch.tensor([[1, 2, 3]]), r"got a tensor of shape \(1, 3\)", "pass ids[0]"),
        (torch.tensor([[1], [2]]), r"got a tensor of shape \(2, 1\)", "generate_batch takes several prompts"),
        ("hello", "got the text 'hello'", "model.tokenizer.encode(text) gives them"),
        ([[1, 2], [3]], r"whole numbers; \[1, 2\] is none", "generate_batch takes several prompts"),
        ([1, 2.5], "whole numbers; 2.5 is none", None),
    ],
)
def test_what_is_no_row_of_ids_is_refused(model, prompt, says, tip):
    for call in (generate, stream, Seats(model, 1, context=64).read):
        with pytest.raises(UsageError, match=says) as error:
            call(*([] if call not in (generate, stream) else [model]), prompt, max_tokens=3)
        assert error.value.tip == tip


def test_eos_ids_may_be_one_and_must_be_the_models(model, speaking):
    free = generate(model, PROMPT, max_tokens=30, eos_ids=())
    end = free.tokens[7]
    assert generate(model, PROMPT, max_tokens=30, eos_ids=end).tokens == free.tokens[: free.tokens.index(end) + 1]
    for wrong in (96, -1):
        with pytest.raises(UsageError, match=f"eos id {wrong} is outside the model's vocabulary of 96"):
            generate(model, PROMPT, max_tokens=30, eos_ids=[3, wrong])
    speaking.tokenizer.eos_ids = (0, 4096)  # a tokenizer may know more words than the model
    assert len(generate(speaking, PROMPT, max_tokens=4, rules=Rules(min_tokens=3)).tokens) >= 3


def test_what_cannot_be_is_said_before_the_first_token(model):
    """By `stream` too, which has not computed anything yet, and leaves the model in the mode it was in."""
    model = copy.deepcopy(model).double().train()
    model.model.straight = None
    with pytest.raises(VolvelleError, match="exact=bitwise pads steps"):
        stream(model, [1] * 120, max_tokens=3, exact="bitwise")
    with pytest.raises(VolvelleError, match="heads are of dtype"):
        stream(model, PROMPT, max_tokens=3, drafter=Medusa(MedusaHeads.of(copy.deepcopy(model).float(), 2)))
    for wrong in (2.5, "3"):
        with pytest.raises(UsageError, match="max_tokens must be a whole number, got"):
            stream(model, PROMPT, max_tokens=wrong)
    running = stream(model, PROMPT, max_tokens=3)
    assert model.training
    assert [token.id for token in running] == slow_greedy(model.eval(), PROMPT, 3)


def test_the_model_is_left_as_it_was(model):
    model = copy.deepcopy(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    running = stream(model, PROMPT, max_tokens=5)
    next(running)
    running.close()
    generate(model, PROMPT, max_tokens=5)
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_training_goes_on_after_generating(model):
    model = copy.deepcopy(model).train()
    generate(model, PROMPT, max_tokens=3)
    model(torch.tensor([PROMPT])).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    optimiser.step()
    assert generate(model, PROMPT, max_tokens=10).tokens == slow_greedy(model.eval(), PROMPT, 10)


def test_a_callers_autocast_changes_nothing(model):
    expected = generate(model, PROMPT, max_tokens=20).tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generate(model, PROMPT, max_tokens=20).tokens == expected


def test_bf16(model):
    half = copy.deepcopy(model).bfloat16()
    assert len(generate(half, PROMPT, max_tokens=10).tokens) == 10
    assert len(generate_batch(half, PROMPTS, max_tokens=10)) == 4


class Oracle(Drafter, Drafting):
    """A drafter that knows the answer and spoils every third token of it; in a tree, a wrong sibling comes first."""

    def __init__(self, answers, width, tree):
        self.answers, self.length, self.tree = answers, width, tree
        self.width = width + tree

    @property
    def depth(self):
        return self.length

    def begin(self, writer, requests, room):
        return self

    def propose(self, requests, seen, k):
        rows = []
        for request, answer in zip(requests, self.answers, strict=True):
            at = len(request.tokens)
            tokens = [(t + (at + i) % 3 // 2) % 96 for i, t in enumerate(answer[at : at + self.length])]
            rows.append(tokens + [-1] * (self.length - len(tokens)))
        tokens = torch.tensor(rows)
        if not self.tree:
            return Draft(tokens[:, :k])
        wrong = (tokens[:, :1] + 1) % 96
        return Draft(torch.cat((wrong, tokens), 1), parents=(-1, -1, *range(1, self.length)))


def greedy_accept(logits, draft, requests):
    """Follow the target's argmax down the draft."""
    parents = draft.parents or range(-1, draft.tokens.shape[1] - 1)
    best, paths, gained = logits.argmax(-1), [], []
    for row, request in enumerate(requests):
        node, path, tokens = 0, [0], []
        while True:
            tokens.append(int(best[row, node]))
            children = [i + 1 for i, p in enumerate(parents) if p + 1 == node and draft.tokens[row, i] == tokens[-1]]
            if not children:
                break
            node = children[0]
            path.append(node)
        paths.append([-1] if request.finish else path)
        gained.append(tokens)
    width = max(map(len, paths))
    return Accepted(gained, torch.tensor([path + [-1] * (width - len(path)) for path in paths]))


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("width", [1, 4])
def test_the_loop_carries_drafts(model, tree, width):
    model = copy.deepcopy(model).double()
    plain = generate_batch(model, PROMPTS, max_tokens=30, eos_ids=[47])
    answers = [generate(model, prompt, max_tokens=40).tokens for prompt in PROMPTS]
    requests = [Request(model, prompt, Sampling(), Limits(30, (), (47,))) for prompt in PROMPTS]
    drafter = Oracle(answers, width, tree)
    for _ in begin(model, requests, help=Help(drafter, greedy_accept)):
        pass
    assert [request.tokens for request in requests] == [answer.tokens for answer in plain]
    if width > 1:
        assert max(request.steps for request in requests) < 30


@pytest.fixture(scope="module")
def pair(model):
    """The same weights in transformers and here."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocabulary, hidden_size=c.width, intermediate_size=c.mlp.width, num_hidden_layers=c.depth,
            num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, max_position_embeddings=c.context,
            rms_norm_eps=c.norm.eps, rope_theta=c.position.base, tie_word_embeddings=c.head.tied, bos_token_id=None,
            eos_token_id=None, pad_token_id=None,
        )
    ).eval()  # fmt: skip
    theirs.load_state_dict(model.state_dict())
    return model, theirs


@pytest.mark.peer
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_equals_transformers(pair, prompt, penalty):
    ours, theirs = pair
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=100, do_sample=False, repetition_penalty=penalty, use_cache=True
    )[0, len(prompt) :]
    answer = generate(ours, prompt, sampling=Sampling(repetition_penalty=penalty), max_tokens=100)
    assert answer.tokens == expected.tolist()


@pytest.mark.peer
def test_eos_inside_a_batch_equals_transformers(pair):
    ours, theirs = pair
    eos = [generate(ours, PROMPTS[0], max_tokens=30).tokens[4], generate(ours, PROMPTS[2], max_tokens=30).tokens[9]]
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    expected = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=30, do_sample=False, eos_token_id=eos, pad_token_id=95
    )[:, longest:]
    for row, answer in zip(expected.tolist(), generate_batch(ours, PROMPTS, max_tokens=30, eos_ids=eos), strict=True):
        assert answer.tokens == row[: len(answer.tokens)]
        assert set(row[len(answer.tokens) :]) <= {95}
