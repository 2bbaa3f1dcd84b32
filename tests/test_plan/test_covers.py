"""The cheapest covers of many pairs at once, against counting rows one by one."""

import numpy as np
import pytest

from magi_attention.plan.covers import Requests, best_covers

KEY, QUERY = 3, 2


def requests_of(rows: list[tuple[int, int, int, int, int, int]]) -> Requests:
    """Of rows ``(pair, chunk, begin, end, q_begin, q_end)``, each pair with a host of its own."""
    table = np.array(rows, np.int64)
    return Requests(table[:, 0], table[:, 1], table[:, 0], table[:, 2:4], table[:, 4:6])


def rows_and_queries(requests: Requests, which: np.ndarray) -> tuple[int, int]:
    rows = {row for begin, end in requests.rows[which].tolist() for row in range(begin, end)}
    asking = zip(requests.chunk[which].tolist(), requests.queries[which].tolist(), strict=True)
    return len(rows), len({(chunk, query) for chunk, (begin, end) in asking for query in range(begin, end)})


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_against_counting(seed: int, nested: bool) -> None:
    rng = np.random.default_rng(seed)
    rows = []
    for pair in range(int(rng.integers(1, 8))):
        for _ in range(int(rng.integers(1, 7))):
            chunk, begin, q_begin = (int(rng.integers(0, most)) for most in (5, 30, 4))
            begin = 0 if nested else begin
            rows.append(
                (pair, chunk, begin, begin + int(rng.integers(1, 20)), q_begin, q_begin + int(rng.integers(1, 9)))
            )
    requests = requests_of(rows)
    everything = [rows_and_queries(requests, requests.pair == pair)[0] for pair in range(requests.pair.max() + 1)]
    moves, saved = best_covers(requests, np.array(everything), KEY, QUERY)
    for pair, all_rows in enumerate(everything):
        own = requests.pair == pair

        def saving(chunks: list[int], own: np.ndarray = own, all_rows: int = all_rows) -> int:
            goes = own & np.isin(requests.chunk, chunks)
            return (
                KEY * (all_rows - rows_and_queries(requests, own & ~goes)[0])
                - QUERY * rows_and_queries(requests, goes)[1]
            )

        chosen = np.unique(requests.chunk[own & moves]).tolist()
        assert (own & moves).sum() == (own & np.isin(requests.chunk, chosen)).sum(), "a chunk moves as a whole"
        assert 0 <= saved[pair] <= saving(chosen)
        if nested:
            demand = {
                chunk: rows_and_queries(requests, own & (requests.chunk == chunk))[0] for chunk in requests.chunk[own]
            }
            falling = sorted(demand, key=lambda chunk: (-demand[chunk], chunk))
            assert saved[pair] == saving(chosen) == max(saving(falling[:first]) for first in range(len(falling) + 1))


def test_a_cover_computed_by_hand() -> None:
    # Moving chunk 0 of 1 query spares rows 2-5, for chunk 1 needs 0 and 1 still; chunk 2's rows lie elsewhere.
    requests = requests_of([(0, 0, 0, 6, 0, 1), (0, 1, 0, 2, 0, 4), (0, 2, 7, 10, 0, 9)])
    moves, saved = best_covers(requests, np.array([9]), KEY, QUERY)
    assert moves.tolist() == [True, False, False]
    assert saved.tolist() == [4 * KEY - QUERY]
