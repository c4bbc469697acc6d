import threading
from dataclasses import replace

import pytest
import torch

from compress import solve, threads
from compress.architectures import linear_shape, linears
from compress.blocks import LayerInputs
from compress.methods import wanda
from compress.options import CompressOptions
from compress.planning import plan_model
from compress.source import Source


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def solved_block(folder, count, **options):
    """The first block's compressed layers, solved by `count` threads on inputs that are made up."""
    torch.set_num_threads(count)
    source, options = Source.open(folder), CompressOptions(**options)
    name = source.blocks[0]
    stored = source.load_block(name)
    block = source.model.get_submodule(name)
    plans = {layer: replace(plan, rank=6) for layer, plan in plan_model(source, options).items()}
    inputs = {}
    for layer, module in linears(block).items():
        K = linear_shape(module)[1]
        X = torch.randn(200, K, generator=torch.Generator().manual_seed(K)) * torch.linspace(0.5, 2, K)
        inputs[layer] = LayerInputs(X.T @ X / len(X), X)
    with torch.no_grad():
        reports = solve.solve_block(block, name, stored, inputs, {}, plans, options)
    return {layer: block.get_submodule(layer) for layer in reports}


@pytest.mark.parametrize("method", ["joint", "hassle_free", "sslc"])
def test_layers_two_at_a_time_are_those_one_after_the_other(tiny_llama, method, monkeypatch):
    pairs = solved_block(tiny_llama, 2, method=method)
    monkeypatch.setattr(threads, "SMALL", 0)
    torch.manual_seed(3)
    one_by_one = solved_block(tiny_llama, 1, method=method)
    assert list(pairs) == list(one_by_one)
    for layer, module in pairs.items():
        for part in ("bitmap", "values", "U", "V"):
            assert torch.equal(getattr(module, part), getattr(one_by_one[layer], part)), (layer, part)


def test_two_layers_are_solved_at_once_by_half_of_the_threads(tiny_llama, monkeypatch):
    both, counts = threading.Barrier(2), []

    def waiting(*problem):
        counts.append(torch.get_num_threads())
        if len(counts) <= 6:  # of seven layers the last is alone
            both.wait(timeout=30)
        assert not torch.is_grad_enabled()
        return wanda.solve(*problem)

    monkeypatch.setitem(solve.SOLVERS, "wanda", waiting)
    solved_block(tiny_llama, 2, method="wanda")
    assert counts == [1] * 7
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("large", [False, True])
def test_layers_wait_for_each_other_where_one_is_large_or_one_thread_is_all(tiny_llama, monkeypatch, large):
    main, seen = threading.current_thread(), []

    def watched(*problem):
        seen.append(threading.current_thread())
        return wanda.solve(*problem)

    monkeypatch.setitem(solve.SOLVERS, "wanda", watched)
    if large:
        monkeypatch.setattr(threads, "SMALL", 1)
    solved_block(tiny_llama, 2 if large else 1, method="wanda")
    assert seen == [main] * 7


def test_a_layer_that_fails_ends_the_block(tiny_llama, monkeypatch):
    def broken(*problem):
        return wanda.solve(*problem)._replace(U=torch.tensor([[torch.nan]]))

    monkeypatch.setitem(solve.SOLVERS, "wanda", broken)
    with pytest.raises(ArithmeticError, match="not finite"):
        solved_block(tiny_llama, 2, method="wanda")
    assert torch.get_num_threads() == 2
