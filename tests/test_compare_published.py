"""scripts/compare_published.py without any clone: what it compares, and with what it runs code made for a GPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

from sslc_common.errors import InputError

SCRIPTS = Path(__file__).parents[1] / "scripts"

# A stand-in for a clone: what `theirs.sparsegpt` looks for, with the habits of such code. It keeps what is largest, and
# the Gram matrix of what it was given.
STAND_IN = """
import helper, missing_package
import torch

class SparseGPT:
    def __init__(self, layer):
        self.layer, self.H = layer, torch.zeros(layer.weight.shape[1], device="cuda:0")

    def add_batch(self, inp, out):
        self.H = self.H + inp.cuda().reshape(-1, inp.shape[-1]).square().sum(0).to("cuda:0")

    def fasterprune(self, sparsity, prunen=0, prunem=0):
        torch.cuda.synchronize()
        print("pruning")
        W = self.layer.weight.data
        scores = W.abs() * self.H.sqrt()
        cut = scores.sort(1).values[:, int(W.shape[1] * sparsity), None]
        W[scores < cut] = 0
        W *= helper.FACTOR
"""


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import compare_published

    yield compare_published
    for name in [name for name in sys.modules if name.partition(".")[0] in ("compare_published", "published")]:
        del sys.modules[name]


@pytest.fixture
def clone(tmp_path):
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "sparsegpt.py").write_text(STAND_IN.replace(", missing_package", ""))
    (folder / "helper.py").write_text("FACTOR = 1.0\n")
    (folder / "compress.py").write_text("import missing_package\nTHEIRS = missing_package.anything\n")
    return folder


def problem(compare, N=12, K=16, tokens=256):
    g = torch.Generator().manual_seed(0)
    X = torch.randn(tokens, K, generator=g) * torch.linspace(0.1, 3, K)
    return compare.Problem("layer", torch.randn(N, K, generator=g), X)


def test_code_for_a_gpu_runs_on_the_cpu_and_its_modules_are_forgotten(compare, clone, capsys):
    from published import theirs

    at = compare.setting(problem(compare), "free", 0.5, 0.25)
    made = theirs.sparsegpt(clone, problem(compare), at)
    assert (made != 0).sum(1).tolist() == [8] * 12
    assert "helper" not in sys.modules
    assert capsys.readouterr().out == ""


def test_a_clone_may_have_a_module_called_like_a_package_of_ours_and_want_what_is_not_here(clone, compare):
    from published.on_cpu import load

    import compress

    theirs = load(clone, "compress", without=["missing_package"])
    assert theirs.__file__ == str(clone / "compress.py")
    assert sys.modules["compress"] is compress
    assert "missing_package" not in sys.modules


def test_a_folder_that_is_another_clone_is_refused(compare, clone):
    from published.on_cpu import load

    with pytest.raises(InputError, match="not the clone that was expected"):
        load(clone, "lib.prune")
    with pytest.raises(InputError, match="cannot be imported"):
        load(clone, "compress")


def test_the_error_is_that_of_the_outputs(compare):
    on = problem(compare)
    D = 0.1 * torch.randn(12, 16, generator=torch.Generator().manual_seed(1))
    expected = float((on.X @ D.T).norm() / (on.X @ on.W.T).norm())
    assert on.error(on.W - D) == pytest.approx(expected, rel=1e-5)  # float32 sums over 256 tokens
    assert on.error(on.W) == 0


def test_a_budget_is_shared_between_values_and_rank_and_a_rule_decides_the_values_alone(compare):
    on = problem(compare, N=96, K=128)
    free = compare.setting(on, "free", 0.5, 0.25, low_rank=True)
    assert free.nnz(96, 128) + free.rank * (96 + 128) <= 0.5 * 96 * 128
    assert (free.sparsity, free.rank) == (0.625, int(0.125 * 96 * 128 / 224))
    two_of_four = compare.setting(on, "2:4", 0.5, 0.25, low_rank=True)
    assert (two_of_four.nnz(96, 128), two_of_four.rank, two_of_four.n_m) == (96 * 64, free.rank, (2, 4))
    assert compare.setting(on, "free", 0.5, 0.25, sparse=False, low_rank=True).rank == int(0.5 * 96 * 128 / 224)


@pytest.mark.parametrize(("factor", "same", "passes"), [(1.0, True, True), (1.5, True, False), (1.5, False, True)])
def test_more_than_one_per_cent_apart_fails_where_both_do_the_same(compare, clone, factor, same, passes):
    (clone / "helper.py").write_text(f"FACTOR = {factor}\n")
    from published import ours, theirs

    case = compare.Case(
        "wanda", lambda p, s: theirs.sparsegpt(clone, p, s), lambda p, s: ours.by_method("wanda", p, s), same=same
    )
    record = compare.compare(case, problem(compare), compare.setting(problem(compare), "free", 0.5, 0.25))
    assert compare.agrees(record) is passes
    assert (record.ratio == pytest.approx(1, abs=1e-6)) is (factor == 1.0)
    assert ("beyond 1 %" in compare.line(record)) is not passes


def test_records_are_kept_and_not_measured_again(compare, clone, tmp_path, monkeypatch, capsys):
    file = tmp_path / "records.json"
    on = [problem(compare)]
    monkeypatch.setattr(compare, "problems", lambda *_: on)
    arguments = f"--model m --calibration c --sparsegpt {clone} --mask-rules free --json {file}".split()
    compare.main(arguments)
    assert [(r["method"], r["layer"]) for r in json.loads(file.read_text())] == [("sparsegpt", "layer")]
    monkeypatch.setattr(compare, "compare", lambda *_: pytest.fail("measured again"))
    compare.main(arguments)
    assert capsys.readouterr().out.count("| sparsegpt | layer |") == 2
    with pytest.raises(InputError, match="nothing to compare"):
        compare.main(["--model", "m", "--calibration", "c"])


def test_the_layers_come_with_the_inputs_that_the_model_gives_them(compare, tmp_path, monkeypatch):
    from published import problem as module
    from transformers import AutoModelForCausalLM

    from tests.compress.models import VOCABULARY, save_tiny

    folder = save_tiny(tmp_path / "tiny", "llama")
    tokens = torch.randint(0, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(module, "read_tokens", lambda *_, **__: tokens)
    layers = ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    found = {p.layer: p for p in compare.problems(folder, layers, ["text"], 48, 16)}
    seen = {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in layers:
        hook = lambda _, args, layer=layer: seen.__setitem__(layer, args[0].reshape(48, -1))  # noqa: E731
        model.get_submodule(layer).register_forward_pre_hook(hook)
    model(tokens)
    assert set(found) == set(layers)
    for layer in layers:
        assert torch.equal(found[layer].W, model.get_submodule(layer).weight)
        assert torch.allclose(found[layer].X, seen[layer], atol=1e-5)  # one sequence at a time against all at once
    with pytest.raises(InputError, match="no such layer"):
        list(compare.problems(folder, ["model.layers.9.mlp.down_proj"], ["text"], 48, 16))
