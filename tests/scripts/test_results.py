"""The scores in the README are those of the files in weights/scores, and these are of the bundled weights."""

import copy
import json

import results
from conftest import ROOT


def test_the_table_in_the_readme_is_that_of_the_files():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert results.with_table(readme) == readme
    assert results.with_table(readme.replace("FID |", "?")) == readme


def test_every_score_is_of_the_weights_that_are_there_and_by_the_flags_of_the_table():
    files = {path.stem: json.loads(path.read_text()) for path in results.FOLDER.glob("*.json")}
    assert files and files.keys() <= results.SCORES.keys()
    for name, metrics in files.items():
        assert results.is_current(name, metrics)
        assert metrics["protocol"]["checkpoint"]["file"] == f"weights/{results.SCORES[name][0]}"
        for part, key, other in (("reference", "split", "another"), ("generated", "timesteps", [500])):
            changed = copy.deepcopy(metrics)
            changed["protocol"][part][key] = other
            assert not results.is_current(name, changed)


def test_numbers_beside_the_table_are_those_of_the_file():
    scores = json.loads((results.FOLDER / "fashion-mnist.json").read_text())["scores"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())  # wherever its lines break
    assert f"dimension is {scores['bits_per_dim']:.3f} ± {scores['bits_per_dim_error']:.3f} " in readme
    assert f" {scores['nearest_flagged']:.1%} of the generated images" in readme


def test_the_first_two_files_are_as_short_as_the_readme_says():
    files = (ROOT / "src/diffusion.py", ROOT / "src/samplers.py")
    lines = [len(file.read_text(encoding="utf-8").splitlines()) for file in files]
    assert sum(lines) < 400 and "first two together have fewer than 400 lines" in (ROOT / "README.md").read_text()
