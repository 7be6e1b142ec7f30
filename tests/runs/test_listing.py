"""The data folder is listed once in a run and once in a plan, and anew in the next."""

import pytest
from PIL import Image

from fewstep.data import folder as folders
from fewstep.data import images
from fewstep.data.find import Place, find_captions, find_images, held_out_captions
from fewstep.data.listing import forget, listed_once
from tests.command_line import inside, sets


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(27):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / f"pictures/{number}.png")
        (tmp_path / f"pictures/{number}.txt").write_text(f"image {number}")
    return tmp_path / "pictures"


@pytest.fixture
def walks(monkeypatch):
    """The folders that were walked through."""
    seen = []

    def walk(folder):
        seen.append(folder.name)
        return images.walk(folder)

    monkeypatch.setattr(folders, "walk", walk)
    return seen


def test_what_is_held_out_is_listed_with_the_rest(pictures, walks):
    place = Place("folder", str(pictures), held_out=9)
    with listed_once():
        with listed_once():
            assert len(find_captions(place)) == 18 and len(held_out_captions(place)) == 9
        assert len(find_images(Place("folder", str(pictures))).images) == 27 and walks == ["pictures"]
        assert len(find_captions(place, 26)) == 18 and len(walks) == 2  # another limit is another question
        forget()
        (pictures / "0.txt").unlink()
        assert len(find_captions(Place("folder", str(pictures)))) == 26 and len(walks) == 3
    (pictures / "1.txt").unlink()
    assert len(find_captions(Place("folder", str(pictures)))) == 25 and len(walks) == 4


@pytest.mark.slow
def test_a_run_and_a_plan_list_their_folder_once(short, pictures, walks, monkeypatch, capsys):
    """The teacher's samples, held-out captions and a plan with its advice ask for it too."""
    more = [*short, "data.source=folder", f"data.path={pictures}", "data.size=null", "sample.every=100"]
    distil = ["distill", "scenes-64-tcd", "--out", "run", "-q", *sets(more)]
    assert inside(monkeypatch, capsys, pictures.parent, *distil)[0] == 0 and walks == ["pictures"]
    walks.clear()
    planned = [
        "doctor",
        "--plan",
        "scenes-64-dmd",
        *sets([*more, "pairs.num_inference_steps=2", "training.batch_size=8"]),
    ]
    assert inside(monkeypatch, capsys, pictures.parent, *planned)[0] == 0 and walks == ["pictures"]
