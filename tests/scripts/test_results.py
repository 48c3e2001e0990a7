"""The scores in the README are those of the files in weights/scores, and these are of the bundled weights."""

import json

import results
from conftest import ROOT


def test_the_table_in_the_readme_is_that_of_the_files():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert results.with_table(readme) == readme
    assert results.with_table(readme.replace("FID |", "?")) == readme


def test_every_score_is_of_the_weights_that_are_there():
    files = {path.stem: json.loads(path.read_text()) for path in results.FOLDER.glob("*.json")}
    assert files and files.keys() <= results.SCORES.keys()
    for name, metrics in files.items():
        weights, flags = results.SCORES[name]
        assert results.is_current(name, metrics)
        assert metrics["protocol"]["checkpoint"]["file"] == f"weights/{weights}"
        assert f"--num_samples {metrics['scores']['num_images']}" in flags
