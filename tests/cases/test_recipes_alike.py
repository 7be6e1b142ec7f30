"""A recipe that is like another one: its own keys stand in the place of the other's."""

import pytest

from fewstep.recipe.load import load_recipe, read_recipe
from fewstep.recipe.shipped import shipped_recipes
from fewstep.recipe.validate import RecipeError


def written(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


def test_what_it_says_itself_stands_in_the_others_place(tmp_path):
    mine = written(tmp_path, "mine.yaml", "like: scenes-64-tcd\nmethod: {guidance_scale: 2.0}\ndata: {size: 7}\n")
    other, found = read_recipe("scenes-64-tcd"), read_recipe(mine)
    assert found["method"] == {**other["method"], "guidance_scale": 2.0} and found["data"] == {
        **other["data"],
        "size": 7,
    }
    assert {k: v for k, v in found.items() if k not in ("method", "data")} == {
        k: v for k, v in other.items() if k not in ("method", "data")
    }
    assert load_recipe(mine, ["method.guidance_scale=5"]).method["guidance_scale"] == 5


def test_one_may_be_like_one_that_is_like_a_third_and_short_forms_are_the_same(tmp_path):
    first = written(tmp_path, "first.yaml", "like: scenes-64-tcd\nteacher: scenes-64\n")
    second = written(tmp_path, "second.yaml", f"like: {first}\nteacher: {{dtype: bf16}}\n")
    assert read_recipe(second)["teacher"] == {"path": "scenes-64", "dtype": "bf16"}


@pytest.mark.parametrize("like", ["[sd3-lcm]", "3", "{itself}"])
def test_what_names_no_other_recipe_is_refused(like, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("like: " + like.replace("{itself}", str(path)))
    with pytest.raises(RecipeError, match=r"like must name another recipe, not .+\.$"):
        read_recipe(path)


def test_a_name_that_is_none_is_refused_as_ever(tmp_path):
    with pytest.raises(RecipeError, match=r"There is no recipe 'sd3-lmc'\. Did you mean 'sd3-lcm'\?"):
        read_recipe(written(tmp_path, "mine.yaml", "like: sd3-lmc"))


def test_shipped_ones_are_short():
    alike = [path for name, path in shipped_recipes().items() if name.startswith("sana-") and "lightning" not in name]
    assert len(alike) == 8 and all(len(path.read_text().splitlines()) <= 6 for path in alike)
