"""Merging and unmerging: which tokens are merged, into which ones, and what is restored."""

import pytest
import torch

from ecar_dist.flow.token_merging import match_tokens


@pytest.fixture
def tokens():
    return torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def importance():
    return torch.rand(3, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("ratio", "left"), [(0.0, 16), (0.25, 12), (0.5, 8), (0.75, 4), (1.0, 4)])
def test_what_is_not_merged_comes_back_and_the_rest_copies_its_destination(tokens, importance, ratio, left):
    merging = match_tokens(tokens, importance, ratio)
    merged = merging.merge(tokens)
    assert merged.shape == (3, left, 8)
    back = merging.unmerge(merged)
    for row in range(3):
        gone = merging.merged[row].tolist()
        destinations = merging.kept[row][merging.into[row]].tolist()
        assert sorted([*gone, *merging.kept[row].tolist()]) == list(range(16))
        for place in set(range(16)) - set(gone) - set(destinations):
            assert torch.equal(back[row, place], tokens[row, place])
        for place, destination in zip(gone, destinations, strict=True):
            assert torch.equal(back[row, place], back[row, destination])
        for destination in set(destinations):
            group = [destination, *(g for g, d in zip(gone, destinations, strict=True) if d == destination)]
            torch.testing.assert_close(back[row, destination], tokens[row, group].mean(0))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_the_important_quarter_is_never_merged_away(tokens, importance, ratio):
    merging = match_tokens(tokens, importance, ratio)
    important = importance.topk(4, dim=1).indices
    for row in range(3):
        assert not set(important[row].tolist()) & set(merging.merged[row].tolist())
        destinations = merging.kept[row][merging.into[row]]
        assert set(destinations.tolist()) <= set(important[row].tolist())


def test_the_most_similar_tokens_go_first():
    tokens = torch.eye(16)[None]
    importance = torch.zeros(1, 16)
    importance[0, :4] = 1.0
    tokens[0, 9] = tokens[0, 2]
    tokens[0, 13] = tokens[0, 1]
    merging = match_tokens(tokens, importance, 2 / 16)
    pairs = zip(merging.merged[0].tolist(), merging.kept[0][merging.into[0]].tolist(), strict=True)
    assert set(pairs) == {(9, 2), (13, 1)}
