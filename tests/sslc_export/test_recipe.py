import pytest

from sslc_common.errors import InputError
from sslc_export.recipe import CompressCommand, ExportRecipe, load_recipe, save_recipe

REQUIRED = {"model": "m", "out": "e.onnx"}


def test_a_saved_recipe_reads_back_to_the_same_build(tmp_path):
    recipe = load_recipe(ExportRecipe, None, {**REQUIRED, "budget": "0.6", "calibration": ["wiki.txt"]})
    save_recipe(recipe, tmp_path / "r.yaml")
    assert load_recipe(ExportRecipe, str(tmp_path / "r.yaml"), {}) == recipe


def test_flags_win_over_the_file(tmp_path):
    (tmp_path / "r.yaml").write_text("model: m\nout: a.onnx\nbudget: 0.7\nmethod: oats\n")
    recipe = load_recipe(ExportRecipe, str(tmp_path / "r.yaml"), {"out": "b.onnx", "budget": "0.4"})
    assert (recipe.out, recipe.budget, recipe.method) == ("b.onnx", 0.4, "oats")


@pytest.mark.parametrize("budget", ["0", "1.5", "abc", "nan", "-0.1", "", None, [0.5]])
def test_a_budget_that_is_none_names_the_flag_and_what_was_got(budget):
    with pytest.raises(InputError, match=r"--budget has a value that is not allowed"):
        load_recipe(ExportRecipe, None, {**REQUIRED, "budget": budget})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nout: e\nbudgett: 0.5\n", "unknown field budgett.*Allowed: .*budget, "),
        ("model: [unclosed\n", "not valid YAML"),
        ("- a list\n", "holds no fields"),
        ("out: e.onnx\n", "--model is missing"),
        ("model: m\nout: e\nbudget_in: bits\n", "--budget-in has a value.*Got: bits.*'params'"),
        ("model: m\nout: e\nthreads: 0\n", "--threads has a value"),
        ("", "--model is missing"),
    ],
)
def test_each_wrong_recipe_has_its_own_message(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_recipe(ExportRecipe, str(tmp_path / "r.yaml"), {})


def test_a_recipe_that_is_not_there():
    with pytest.raises(InputError, match=r"no recipe nowhere\.yaml"):
        load_recipe(CompressCommand, "nowhere.yaml", {})


def test_a_recipe_that_is_not_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="not valid YAML"):
        load_recipe(ExportRecipe, str(tmp_path / "r.yaml"), {})
