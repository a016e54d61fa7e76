"""Every algorithm against the sum computed in one place and against torch.distributed; exact counts of bytes."""

from __future__ import annotations

import functools

import pytest
import torch
from tests.parts.collectives import programs
from tests.parts.collectives.programs import values

ALGORITHMS = ("ring", "halving-doubling", "recursive-doubling", "tree", "star", "two-level", "auto")
SIZES = (1, 2, 3, 4, 5)
COUNTS = (0, 1, 3, 60, 1000)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
OURS_ONLY = (torch.bool, torch.int16, torch.complex64)
NODES = {
    1: ((0,),),
    2: ((0, 1),),
    3: ((0, 2), (1,)),
    4: ((0, 1), (2, 3)),
    5: ((0, 3), (4, 1, 2)),
    6: ((0, 1), (2, 3, 4), (5,)),
    7: ((0, 1, 2), (3, 4, 5, 6)),
    8: ((0, 1), (2, 3), (4, 5), (6, 7)),
}


def cases(p, *, counts=COUNTS, dtypes=(torch.float32,), ops=("sum",), **more):
    return [
        {"algorithm": a, "count": n, "dtype": d, "op": op, "nodes": NODES[p] if a == "two-level" else None, **more}
        for a in ALGORITHMS
        for n in counts
        for d in dtypes
        for op in ops
    ]


def reference(p: int, count: int, dtype: torch.dtype, op: str) -> torch.Tensor:
    """The reduction in one place, in a wide type: (count,) fp64, complex128 or int64."""
    wide = torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else torch.int64
    rows = torch.stack([values(r, count, dtype).to(wide) for r in range(p)])
    if op == "sum" and dtype == torch.bool:
        return rows.amax(0)  # a sum of booleans is "any", as in torch
    reduce = {
        "sum": lambda: rows.sum(0),
        "avg": lambda: rows.mean(0),
        "max": lambda: rows.amax(0),
        "min": lambda: rows.amin(0),
        "product": lambda: rows.prod(0),
        "xor": lambda: functools.reduce(torch.bitwise_xor, rows),
    }
    return reduce[op]()


def tensor(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def check(p: int, batch: list[dict], results: list[list[tuple]]) -> None:
    for i, case in enumerate(batch):
        answers = [results[rank][i][0] for rank in range(p)]
        assert all(answer == answers[0] for answer in answers), f"ranks differ: {case}"
        expected = reference(p, case["count"], case["dtype"], case["op"])
        found = tensor(answers[0], case["dtype"]).to(expected.dtype)
        floating = case["dtype"].is_floating_point or case["dtype"].is_complex
        step = torch.finfo(case["dtype"]).eps if floating else 0.0
        torch.testing.assert_close(found, expected, rtol=4 * step, atol=8 * p * step, msg=lambda m, c=case: f"{c}: {m}")


@pytest.mark.parametrize("p", SIZES)
def test_all_reduce_is_the_sum_on_every_rank(pools, p):
    batch = cases(p) + cases(p, counts=(1000,), segment=64) + cases(p, counts=(7,), strided=True)
    check(p, batch, pools(p).run(programs.reduce_all, batch))


@pytest.mark.parametrize("p", [2, 3, 4])
def test_every_dtype_and_op(pools, p):
    batch = cases(p, counts=(53,), dtypes=DTYPES + OURS_ONLY)
    batch += cases(p, counts=(53,), dtypes=(torch.float32, torch.int32), ops=("max", "min", "product"))
    batch += cases(p, counts=(53,), dtypes=(torch.float32, torch.bfloat16), ops=("avg",))
    batch += cases(p, counts=(53,), dtypes=(torch.int32,), ops=("xor",))
    check(p, batch, pools(p).run(programs.reduce_all, batch))


@pytest.mark.parametrize("p", [2, 3, 4, 5])
def test_same_as_torch_distributed(pools, p):
    batch = cases(p, counts=(0, 1, 257), dtypes=(torch.float32, torch.float64, torch.int64))
    ours = pools(p).run(programs.reduce_all, batch)
    theirs = pools(p).run(programs.peer_reduce, batch)
    for i, case in enumerate(batch):
        mine, peer = tensor(ours[0][i][0], case["dtype"]), tensor(theirs[0][i], case["dtype"])
        step = torch.finfo(case["dtype"]).eps if case["dtype"].is_floating_point else 0.0
        torch.testing.assert_close(mine, peer, rtol=4 * step, atol=8 * p * step)


def sent_in_all(algorithm: str, p: int, size: int) -> int:
    """Bytes sent by all ranks together for one all-reduce of `size` bytes: the formulas at the heads of the files."""
    power = 1 << (p.bit_length() - 1)
    if algorithm == "recursive-doubling":
        return (power * (power.bit_length() - 1) + 2 * (p - power)) * size
    return 2 * (p - 1) * size


@pytest.mark.parametrize("p", SIZES)
@pytest.mark.parametrize("algorithm", ["ring", "halving-doubling", "recursive-doubling", "tree", "star"])
def test_bytes_are_exact(pools, p, algorithm):
    batch = [c for c in cases(p, dtypes=(torch.float32, torch.float16)) if c["algorithm"] == algorithm]
    batch += [{**c, "segment": 16} for c in batch]
    results = pools(p).run(programs.reduce_all, batch)
    for i, case in enumerate(batch):
        size = case["count"] * case["dtype"].itemsize
        sent = [results[rank][i][1] for rank in range(p)]
        received = [results[rank][i][2] for rank in range(p)]
        assert sum(sent) == sum(received) == sent_in_all(algorithm, p, size), case
        share = algorithm == "ring" or (algorithm == "halving-doubling" and p & (p - 1) == 0)
        if share and case["count"] % p == 0:
            assert sent == [2 * (p - 1) * size // p] * p, case


@pytest.mark.parametrize("p", [4, 5])
def test_two_levels_send_only_shares_between_nodes(pools, p):
    """Inside the nodes 2 (L - 1) V, between two nodes V each way: the flat ring would cross with more."""
    batch = [c for c in cases(p, counts=(60,)) if c["algorithm"] == "two-level"]
    results = pools(p).run(programs.reduce_all, batch)
    inside = sum(2 * (len(node) - 1) * 240 for node in NODES[p])
    assert sum(results[rank][0][1] for rank in range(p)) == inside + 2 * 240


@pytest.mark.parametrize("p", [2, 4])
def test_rounds_are_few(pools, p):
    """Messages a rank of a short vector: log2 p, 2 log2 p, and 2 (p - 1)."""
    lengths = {"recursive-doubling": p.bit_length() - 1, "halving-doubling": 2 * (p.bit_length() - 1)}
    for algorithm, messages in {**lengths, "ring": 2 * (p - 1)}.items():
        batch = [c for c in cases(p, counts=(256,)) if c["algorithm"] == algorithm]
        assert {row[0][3] for row in pools(p).run(programs.reduce_all, batch)} == {messages}


def ragged(p: int) -> list[list[int]]:
    return [[7] * p, [3 * r for r in range(p)], [0] * (p - 1) + [11], [5 if r % 2 else 0 for r in range(p)], [0] * p]


@pytest.mark.parametrize("p", SIZES)
def test_reduce_scatter_and_all_gather_of_ragged_blocks(pools, p):
    batch = [
        {**case, "sizes": sizes}
        for case in cases(p, counts=(0,), dtypes=(torch.float32, torch.int64), segment=8)
        for sizes in ragged(p)
    ]
    results = pools(p).run(programs.scatter_and_gather, batch)
    for i, case in enumerate(batch):
        sizes, dtype = case["sizes"], case["dtype"]
        total = reference(p, sum(sizes), dtype, "sum").split(sizes)
        everything = torch.cat([values(r, sizes[r], dtype, seed=1) for r in range(p)])
        for rank in range(p):
            scattered, gathered, *_ = results[rank][i]
            found = tensor(scattered, dtype).to(total[rank].dtype)
            torch.testing.assert_close(found, total[rank], rtol=1e-5, atol=1e-5, msg=lambda m, c=case: f"{c}: {m}")
            assert gathered == programs.bits(everything), case
        if case["algorithm"] in {"ring", "halving-doubling"}:
            sent = sum(results[rank][i][3] for rank in range(p))
            assert sent == (p - 1) * sum(sizes) * dtype.itemsize, case


def test_refusals_name_the_call_the_rule_and_what_arrived(pools):
    for messages in pools(3).run(programs.complain):
        assert messages == [
            "ValueError: all_reduce: algorithm must be one of auto, ring, halving-doubling, recursive-doubling, tree, "
            "two-level, star, got 'rnig'",
            "ValueError: all_reduce (two-level): needs a topology, for example topology=Topology.detect()",
            "ValueError: all_reduce: topology has 4 ranks, the group 3",
            "TypeError: all_reduce: needs a dense tensor, got layout torch.sparse_coo",
            "TypeError: all_reduce: AVG needs a floating dtype, got torch.int64",
            "TypeError: all_reduce: complex numbers have no order, got RedOpType.MAX of torch.complex64",
            "TypeError: all_reduce: RedOpType.BXOR needs an integer or boolean dtype, got torch.float32",
            "TypeError: all_reduce: torch does not compute RedOpType.SUM of torch.uint16 on cpu",
            "ValueError: all_reduce: needs a tensor of its own memory, got one of shape (3,) by expand",
            "TypeError: all_reduce: gloo sends memory of the CPU, got a tensor on meta",
            "ValueError: all_gather: tensor_list needs one tensor a rank, 3, got 4",
            "ValueError: all_gather: tensor must hold 3 elements like tensor_list[0], got shape (2,)".replace(
                "[0]", messages[11].partition("tensor_list")[2][:3]
            ),
            "TypeError: reduce_scatter: input_list must be torch.float64 like output, got torch.float32",
        ]


def test_a_subgroup_has_its_own_ranks(pools):
    found = pools(4).run(programs.inside_group, [3, 1])
    assert found == [[1.0] * 5, [6.0] * 5, [3.0] * 5, [6.0] * 5]


def test_ranks_of_one_machine_are_one_node(pools):
    assert pools(3).run(programs.detect) == [((0, 1, 2),)] * 3


@pytest.mark.parametrize("p", [2, 3])
def test_memory_that_is_not_what_it_shows(pools, p):
    for found in pools(p).run(programs.layouts):
        for name, (ours, theirs) in found.items():
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a != "auto"])
def test_same_bits_on_every_rank_and_in_every_run(pools, p, algorithm):
    first, second = (pools(p).run(programs.uncommutative, algorithm) for _ in range(2))
    assert all(row == first[0] for row in first + second)


@pytest.mark.parametrize("p", [6, 7, pytest.param(8, marks=pytest.mark.slow)])
def test_larger_worlds(pools, p):
    batch = cases(p, counts=(0, 5, 1001), segment=512)
    check(p, batch, pools(p).run(programs.reduce_all, batch))
    ragged_batch = [{**case, "sizes": [3 * (r % 3) for r in range(p)]} for case in cases(p, counts=(0,))]
    for row in pools(p).run(programs.scatter_and_gather, ragged_batch):
        assert len({gathered for _, gathered, *_ in row}) == 1
