"""Mask rules: at most CAP kept in each aligned group of columns, by every method."""

import json

import numpy as np
import pytest
import torch

from compress.format import Checkpoint
from compress.methods import masks
from compress.options import METHODS, CompressOptions
from compress.pipeline import REPORT, compress_model
from compress.rules import MaskRule, parse_rule
from compress.solve import SOLVERS
from sslc_common.errors import InputError
from tests.compress.test_methods import problem


def most_in_a_group(mask, group):
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % group))
    return int(padded.reshape(-1, group).sum(1).max())


@pytest.mark.parametrize(("cap", "group"), [(32, 64), (8, 16), (2, 4), (1, 8)])
@pytest.mark.parametrize("K", [64, 200, 33])
def test_the_best_under_the_rule_are_the_best_of_each_group(cap, group, K):
    rule, N = MaskRule(cap, group), 6
    scores = torch.rand(N, K, generator=torch.Generator().manual_seed(K))
    full = masks.top_overall(scores, rule.most(N, K), rule)
    some = masks.top_per_row(scores, N * (K * cap // group // 2), rule)
    for mask in (full, some):
        assert most_in_a_group(mask, group) <= cap
    assert full.sum() == rule.most(N, K)
    # By hand: whoever is among the best of its own group may be kept, the best of these first.
    allowed = torch.zeros(N, K, dtype=torch.bool)
    for n in range(N):
        for start in range(0, K, group):
            best = scores[n, start : start + group].topk(min(cap, K - start)).indices
            allowed[n, start + best] = True
    assert not (full & ~allowed).any()
    left_over = scores[allowed & ~full]
    assert not len(left_over) or scores[full].min() >= left_over.max()


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("rule", ["32:64", "2:4"])
def test_every_method_obeys_the_rule_and_keeps_as_many_as_asked(method, rule):
    parsed = parse_rule(rule)
    W, H = problem(K=200)
    for nnz in (parsed.most(*W.shape), W.numel() // 3):
        solution = SOLVERS[method](W, H, nnz, 3 if METHODS[method].low_rank else 0, parsed)
        assert int(solution.mask.sum()) == nnz
        assert most_in_a_group(solution.mask, parsed.group) <= parsed.cap


def test_a_stricter_rule_costs_more_energy_and_a_loose_one_none():
    scores = torch.rand(32, 256, generator=torch.Generator().manual_seed(0))
    k = 32 * 128
    costs = [masks.cost(scores, k, MaskRule(cap, group)) for cap, group in ((64, 64), (32, 64), (8, 16), (2, 4))]
    assert costs[0] == 0
    assert costs == sorted(costs)
    assert len(set(costs)) == 4


@pytest.mark.parametrize("text", ["", "32", "0:64", "65:64", "3:6", "32:64:1", "-1:4"])
def test_other_rules_are_refused(text):
    with pytest.raises(InputError, match=r"mask rule is unknown.*32:64"):
        CompressOptions(mask_rule=text)


def test_a_compressed_model_obeys_the_rule_and_reports_its_cost(tiny_llama, tmp_path):
    options = CompressOptions(method="magnitude", mask_rule="4:16", budget=0.5, budget_in="params")
    report = compress_model(tiny_llama, tmp_path / "out", options)
    checkpoint = Checkpoint.open(tmp_path / "out")
    for name, layer in checkpoint.layers.items():
        bits = checkpoint.read(f"{name}.bitmap").numpy().view("uint8")
        mask = torch.from_numpy(np.unpackbits(bits, axis=1, bitorder="little")).bool()
        assert most_in_a_group(mask, 16) <= 4
        assert layer.nnz == layer.N * layer.K // 4, "a rule below the budget limits what is kept"
    assert all(layer.mask_cost > 0 for layer in report.layers if not layer.dense_reason)
    written = json.loads((tmp_path / "out" / REPORT).read_text())
    assert written["mask_cost"] == report.mask_cost > 0
