import math

import pytest
import torch

from compress.methods import alps, magnitude, oats, sparsegpt, sslc, three_basil, wanda
from compress.methods.cap import robust_pca, svd
from compress.methods.linalg import damped, input_norms, least_squares_on_support, low_rank, low_rank_again
from compress.methods.masks import top_overall, top_per_row
from compress.options import METHODS
from compress.rules import MaskRule
from compress.solve import SOLVERS


def problem(N=24, K=36, tokens=400, seed=0):
    """W [N, K] and the Gram matrix of correlated inputs, some large, one dead."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, 12, generator=g) @ torch.randn(12, K, generator=g) + torch.randn(tokens, K, generator=g)
    X[:, 3] *= 10
    X[:, 5] = 0
    return torch.randn(N, K, generator=g), X.T @ X / tokens


def error(W, H, solution):
    D = (W - solution.S - solution.U @ solution.V).double()
    return float(((D @ H.double()) * D).sum() / ((W.double() @ H.double()) * W.double()).sum()) ** 0.5


def test_every_method_has_a_solver():
    assert SOLVERS.keys() == METHODS.keys()


@pytest.mark.parametrize("shape", [(1, 7), (5, 8), (16, 33)])
def test_masks_hold_exactly_as_many_entries_as_asked_even_with_ties(shape):
    N, K = shape
    g = torch.Generator().manual_seed(0)
    for scores in (torch.rand(shape, generator=g), torch.zeros(shape), (torch.rand(shape, generator=g) * 3).floor()):
        for k in (0, 1, N, N * K // 2, N * K - 1, N * K):
            overall, per_row = top_overall(scores, k), top_per_row(scores, k)
            assert overall.sum() == per_row.sum() == k
            assert not overall.any() or overall.all() or scores[overall].min() >= scores[~overall].max()
            assert per_row.sum(1).max() - per_row.sum(1).min() <= 1
            for row, chosen in zip(scores, per_row, strict=True):
                assert not chosen.any() or chosen.all() or row[chosen].min() >= row[~chosen].max()


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("rank", [0, 3, 24])
def test_every_solution_is_exactly_what_was_asked_for(method, share, rank):
    W, H = problem()
    nnz = round(share * W.numel())
    rank = rank if METHODS[method].low_rank else 0
    solution = SOLVERS[method](W, H, nnz, rank)
    assert solution.mask.dtype == torch.bool
    assert int(solution.mask.sum()) == nnz
    assert not solution.S[~solution.mask].any()
    assert solution.U.shape == (24, rank)
    assert solution.V.shape == (rank, 36)
    assert all(torch.isfinite(part).all() for part in solution[1:])
    assert all(part.dtype == torch.float32 for part in solution[1:])


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_larger_budget_makes_a_smaller_error_and_a_full_one_none(method):
    W, H = problem()
    rank = 2 if METHODS[method].low_rank else 0
    errors = [error(W, H, SOLVERS[method](W, H, nnz, rank)) for nnz in (100, 250, 400, 600, W.numel())]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5


@pytest.mark.parametrize("method", sorted(METHODS))
def test_inputs_that_are_all_dead_do_no_harm(method):
    W = problem()[0]
    solution = SOLVERS[method](W, torch.zeros(36, 36), 300, 0)
    assert torch.isfinite(solution.S).all()
    assert int(solution.mask.sum()) == 300


def test_magnitude_keeps_the_largest():
    W, _ = problem()
    solution = magnitude.solve(W, None, 200, 0)
    assert set(solution.S[solution.mask].tolist()) == set(sorted(W.flatten().tolist(), key=abs)[-200:])


def test_wanda_keeps_the_largest_products_of_each_row():
    W, H = problem()
    solution = wanda.solve(W, H, 24 * 10, 0)
    for n in range(24):
        scores = [abs(float(W[n, k])) * math.sqrt(float(H[k, k])) for k in range(36)]
        best = sorted(range(36), key=lambda k: scores[k])[-10:]
        assert sorted(best) == solution.mask[n].nonzero().flatten().tolist()


@pytest.mark.parametrize("block", [8, 36])
def test_sparsegpt_is_optimal_brain_surgery_from_left_to_right(block):
    """Against the naive loop: invert what is left, remove one entry, update the rest of its row."""
    W, H = problem(N=6)
    nnz = 6 * 36 // 2
    solution = sparsegpt.solve(W, H, nnz, 0, block=block)
    left, Hd = W.double().clone(), damped(H).double()
    for c in range(36):
        inverse = torch.linalg.inv(Hd[c:, c:])
        for n in range(6):
            if not solution.mask[n, c]:
                left[n, c:] -= left[n, c] / inverse[0, 0] * inverse[0]
    # float32 Cholesky factors of a matrix with condition number near 1e3 against float64 inverses
    assert torch.allclose(solution.S.double(), left * solution.mask, atol=2e-3)


def test_sparsegpt_chooses_the_mask_of_a_block_by_the_error_that_removal_causes():
    W, H = problem(N=6)
    mask = sparsegpt.solve(W, H, 100, 0, block=36).mask
    inverse = [float(torch.linalg.inv(damped(H).double()[c:, c:])[0, 0]) for c in range(36)]
    scores = W.double().square() / torch.tensor(inverse, dtype=torch.float64)
    assert scores[mask].min() >= scores[~mask].max()


def test_oats_alternates_svd_and_row_thresholds():
    W, H = problem()
    k, rank = 6, 18  # so near to full rank that the methods take the exact SVD
    solution = oats.solve(W, H, 24 * k, rank, iterations=7)
    d = input_norms(H).double()
    A, S = W.double() * d, torch.zeros(24, 36, dtype=torch.float64)
    for _ in range(7):
        left, s, right = torch.linalg.svd(A - S, full_matrices=False)
        L = (left[:, :rank] * s[:rank]) @ right[:rank]
        S = torch.zeros_like(S)
        for n in range(24):
            best = (A - L)[n].abs().argsort()[-k:]
            S[n, best] = (A - L)[n, best]
    # Rounding to float32 may swap an entry at the threshold for one of nearly the same size.
    reference = solution._replace(S=S / d, U=L / d, V=torch.eye(36).double())
    assert error(W, H, solution) == pytest.approx(error(W, H, reference), rel=1e-2)


def test_sslc_always_keeps_the_most_salient_weights():
    W, H = problem(N=100, K=200)
    W[7, 11] = 50.0
    for rank in (0, 10):
        mask = sslc.solve(W, H, 100 * 20, rank).mask
        salience = W.abs() * input_norms(H)
        best = salience.flatten().topk(int(sslc.PROTECTED * W.numel())).indices
        assert mask.flatten()[best].all()


def test_sslc_without_rank_is_wanda_with_least_squares():
    W, H = problem()
    plain = sslc.solve(W, H, 400, 0, least_squares=0)
    assert error(W, H, sslc.solve(W, H, 400, 0)) < error(W, H, plain)
    assert abs(error(W, H, plain) - error(W, H, wanda.solve(W, H, 400, 0))) < 0.02


def test_sslc_with_full_rank_is_exact():
    W, H = problem()
    assert error(W, H, sslc.solve(W, H, 0, 24)) < 1e-4


def test_least_squares_on_the_support_reaches_the_solution_of_the_normal_equations():
    W, H = problem()
    H = damped(H)
    mask = top_overall(W.abs(), 300)
    S = least_squares_on_support(W, mask, W * mask, H, iterations=60)
    for n in range(24):
        on = mask[n].nonzero().flatten()
        exact = torch.linalg.solve(H[on][:, on].double(), (W[n].double() @ H.double())[on])
        assert torch.allclose(S[n, on].double(), exact, atol=1e-3)


def test_each_step_of_least_squares_lowers_the_error_of_each_row():
    W, H = problem()
    H = damped(H)
    mask = top_overall(W.abs(), 300)
    before = None
    for iterations in range(6):
        D = W - least_squares_on_support(W, mask, W * mask, H, iterations)
        rows = ((D @ H) * D).sum(1)
        assert before is None or (rows <= before * (1 + 1e-5)).all()
        before = rows


@pytest.mark.parametrize("rank", [0, 1, 5, 20])
def test_low_rank_is_close_to_the_best_approximation(rank):
    g = torch.Generator().manual_seed(0)
    A = torch.randn(60, 40, generator=g) * torch.linspace(2, 0.1, 40)
    U, V = low_rank(A, rank)
    assert U.shape == (60, rank)
    assert V.shape == (rank, 40)
    best = float(torch.linalg.svdvals(A)[rank:].norm())
    # Halko, Martinsson and Tropp: two power steps and eight extra directions are within a few percent of the best.
    assert float((A - U @ V).norm()) <= 1.03 * best


def solved(method, nnz, rank, N=40, K=60):
    W, H = problem(N, K)
    return error(W, H, SOLVERS[method](W, H, nnz, rank))


@pytest.mark.parametrize(
    "method", ["joint", "wanda", "sparsegpt", "alps", "hassle_free", "three_basil", "sslc", "oats"]
)
def test_a_look_at_the_data_is_better_than_magnitude(method):
    assert solved(method, 1200, 0) < 0.95 * solved("magnitude", 1200, 0)


@pytest.mark.parametrize("method", ["joint", "hassle_free", "three_basil"])
def test_joint_methods_are_better_than_alternating_on_diagonals(method):
    assert solved(method, 900, 4) < solved("oats", 900, 4)


@pytest.mark.parametrize("rule", [None, MaskRule(2, 4)])
def test_a_low_rank_part_pays_at_equal_parameters_where_it_is_found_together_with_the_sparse_one(rule):
    # A weight whose entries look like noise but whose inputs lie near few directions, as real ones do.
    g = torch.Generator().manual_seed(5)
    N, K = 96, 128
    W = torch.randn(N, K, generator=g) + 1.5 * torch.randn(N, 6, generator=g) @ torch.randn(6, K, generator=g) / 6**0.5
    X = torch.randn(4 * K, K, generator=g) * torch.linspace(0.2, 2, K)
    H = X.T @ X / len(X)
    room = N * K // 2
    alone, together, in_turns = (
        error(W, H, SOLVERS[method](W, H, room - rank * (N + K), rank, rule))
        for method, rank in (("joint", 0), ("joint", 4), ("hassle_free", 4))
    )
    assert together < 0.97 * alone
    assert together < in_turns


def test_alps_is_better_than_least_squares_on_the_mask_of_wanda():
    assert solved("alps", 1200, 0) < solved("sslc", 1200, 0)


@pytest.mark.parametrize("method", ["joint", "hassle_free", "three_basil"])
def test_what_is_sparse_plus_low_rank_is_found_again(method):
    g = torch.Generator().manual_seed(1)
    _, H = problem(60, 80)
    U, V = torch.randn(60, 2, generator=g), torch.randn(2, 80, generator=g)
    W = U @ V + 6 * torch.randn(60, 80, generator=g) * (torch.rand(60, 80, generator=g) < 0.02)
    nnz = int((W - U @ V != 0).sum())
    # The problem is not convex; with twice the values it needs, a few turns come close.
    assert error(W, H, SOLVERS[method](W, H, 2 * nnz, 2)) < 0.05


@pytest.mark.parametrize("method", ["svd_llm", "fwsvd", "joint", "hassle_free", "three_basil"])
def test_full_rank_is_exact(method):
    W, H = problem()
    assert error(W, H, SOLVERS[method](W, H, 0, 24)) < 1e-3


def test_svd_llm_is_the_best_of_its_rank():
    W, H = problem()
    root = torch.linalg.cholesky(damped(H).double())
    solution = SOLVERS["svd_llm"](W, H, 0, 6)
    D = (W - solution.U @ solution.V).double() @ root
    best = float(torch.linalg.svdvals(W.double() @ root)[6:].norm())
    assert float(D.norm()) == pytest.approx(best, rel=0.01)  # the SVD is randomized


def test_robust_pca_finds_low_rank_under_large_errors():
    g = torch.Generator().manual_seed(0)
    L = torch.randn(60, 3, generator=g) @ torch.randn(3, 50, generator=g)
    A = L + 20 * torch.randn(60, 50, generator=g) * (torch.rand(60, 50, generator=g) < 0.05)
    left, s, right = robust_pca(A, 200)
    # What Candès et al. prove exact comes within a few per cent in a finite number of iterations.
    assert float(((left * s) @ right - L).norm() / L.norm()) < 0.05


@pytest.mark.parametrize(("cap", "group"), [(2, 4), (4, 8)])
def test_sparsegpt_chooses_under_a_rule_group_by_group_after_the_updates_so_far(cap, group):
    """As its authors' code does for N:M; against the naive loop, which inverts what is left."""
    W, H = problem(N=6)
    mask = sparsegpt.solve(W, H, 6 * 36 * cap // group, 0, MaskRule(cap, group), block=24).mask
    left, Hd = W.double().clone(), damped(H).double()
    for c in range(36):
        if c % group == 0 and c + group <= 36:
            columns = range(c, c + group)
            pivots = torch.stack([torch.linalg.inv(Hd[k:, k:])[0, 0] for k in columns])
            scores = left[:, columns].square() / pivots
            for n in range(6):
                best = scores[n].argsort()[-cap:]
                assert mask[n, c : c + group].nonzero().flatten().tolist() == sorted(best.tolist())
        inverse = torch.linalg.inv(Hd[c:, c:])
        removed = ~mask[:, c]
        left[removed, c:] -= left[removed, c, None] / inverse[0, 0] * inverse[0]


@pytest.mark.parametrize("rank", [3, 16])
def test_directions_followed_over_turns_are_those_of_an_exact_svd(rank):
    """OATS' turns on a matrix whose singular values hardly fall, as those of weights."""
    g = torch.Generator().manual_seed(0)
    A = torch.randn(120, 160, generator=g)
    errors = []
    for exact in (False, True):
        torch.manual_seed(0)
        S, basis = torch.zeros_like(A), None
        for _ in range(20):
            if exact:
                left, s, right = torch.linalg.svd(A - S, full_matrices=False)
                L = (left[:, :rank] * s[:rank]) @ right[:rank]
            else:
                U, V, basis = low_rank_again(A - S, rank, basis)
                L = U @ V
            S = (A - L) * top_per_row((A - L).abs(), 120 * 60)
        errors.append(float((A - L - S).norm()))
    assert errors[0] == pytest.approx(errors[1], rel=0.01)  # what the methods are held to against published code


@pytest.mark.parametrize("rank", [3, 16, 40])
def test_directions_followed_in_the_norm_of_the_inputs_are_those_of_a_whitened_svd(rank):
    W, H = problem(120, 160)
    G, basis = damped(H), None
    torch.manual_seed(0)
    for _ in range(10):
        U, V, basis = low_rank_again(W, rank, basis, G)
    root = torch.linalg.cholesky(G.double())
    best = float(torch.linalg.svdvals(W.double() @ root)[rank:].norm())
    assert float(((W - U @ V).double() @ root).norm()) == pytest.approx(best, rel=2e-3)
    assert torch.allclose(U.norm(dim=0), (V.double() @ root).norm(dim=1).float(), rtol=1e-3)


def test_three_basil_renews_rho_every_ten_iterations_and_ends_where_the_mask_has_settled(monkeypatch):
    W, H = problem(40, 60)
    changes = []
    monkeypatch.setattr(three_basil, "low_rank_again", counted := Counted(low_rank_again))
    for module in (alps, three_basil):
        monkeypatch.setattr(module, "top_overall", lambda *args: changes.append(top_overall(*args)) or changes[-1])
    solution = three_basil.solve(W, H, 1200, 4)
    assert counted.calls % three_basil.EVERY == 0
    assert counted.calls <= three_basil.ITERATIONS
    last = changes[counted.calls]  # one for the start, one in each iteration, one at the end
    assert int((last ^ changes[counted.calls - three_basil.EVERY]).sum()) <= three_basil.SETTLED * 1200
    assert (solution.mask == changes[-1]).all()


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


def test_the_svd_by_eigenvectors_is_that_of_lapack():
    g = torch.Generator().manual_seed(0)
    for shape in ((30, 50), (50, 30)):
        A = torch.randn(shape, generator=g) * torch.linspace(3, 0.01, shape[1])
        left, s, right = svd(A)
        assert torch.allclose(s, torch.linalg.svdvals(A), atol=1e-4)
        assert torch.allclose((left * s) @ right, A, atol=1e-4)
        assert torch.allclose(left.T @ left, torch.eye(30), atol=1e-5)
    assert all(torch.isfinite(part).all() for part in svd(torch.zeros(4, 6)))
