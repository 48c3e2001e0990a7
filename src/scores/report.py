"""The table of scores that eval.py prints."""

from dataclasses import dataclass
from typing import Any

from src.scores import copies
from src.utils.progress import counted

MISSING = "unavailable"


@dataclass(frozen=True)
class Row:
    """A row of the table: one score through each network.

    Attributes:
        title: what the table calls it.
        inception, classifier: the names in metrics.json of the score and, if it has one, of its standard deviation.
        form: format of the numbers.
    """

    title: str
    inception: tuple[str, ...]
    classifier: tuple[str, ...]
    form: str


ROWS = [
    Row("Fréchet distance, FID (lower)", ("fid",), ("classifier_fd",), ".2f"),
    Row("kernel distance, KID (lower)", ("kid_mean", "kid_std"), ("classifier_kd_mean", "classifier_kd_std"), ".4f"),
    Row("precision (higher: convincing)", ("precision",), ("classifier_precision",), ".3f"),
    Row("recall (higher: varied)", ("recall",), ("classifier_recall",), ".3f"),
    Row(
        "exp E KL, Inception Score (higher)",
        ("inception_score_mean", "inception_score_std"),
        ("classifier_score_mean", "classifier_score_std"),
        ".3f",
    ),
]


def table(scores: dict[str, Any], protocol: dict[str, Any]) -> str:
    """The scores through both networks side by side, then the other scores and the protocol, then the notes.

    Args:
        scores: by their names in metrics.json; those of a network that was not used are absent.
        protocol: as in metrics.json.
    """
    columns = {"Inception": "extractor" in protocol, "classifier": "classifier" in protocol}
    titles = [title for title, used in columns.items() if used]
    lines = []
    if titles:
        lines.append(" " * 38 + "".join(f"{title:>20}" for title in titles))
        for row in ROWS:
            names = [getattr(row, title.lower()) for title in titles]
            lines.append(f"  {row.title:36}" + "".join(f"{_number(scores, pair, row.form):>20}" for pair in names))
        lines.append("")
    lines += [f"  {name:24}{value}" for name, value in _facts(scores, protocol)]
    return "\n".join(lines + [f"  note: {note}" for note in scores["notes"]])


def _number(scores: dict[str, Any], names: tuple[str, ...], form: str) -> str:
    """A score, with ± its standard deviation if there is one."""
    values = [scores[name] for name in names]
    if values[0] is None:
        return MISSING
    return " ± ".join(f"{value:{form}}" for value in values if value is not None)


def _facts(scores: dict[str, Any], protocol: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines below the table, as pairs of a name and a text."""
    generated, reference = protocol["generated"], protocol["reference"]
    facts = []
    if scores["class_histogram"] is not None:
        facts.append(("classes", ", ".join(f"{name} {n}" for name, n in scores["class_histogram"].items())))
    if scores["class_accuracy"] is not None:
        facts.append(("class accuracy", f"{scores['class_accuracy']:.1%}"))
    if "bits_per_dim" in scores:
        bits, error, images = scores["bits_per_dim"], scores["bits_per_dim_error"], protocol["bits_per_dim"]["images"]
        plus_minus = "" if error is None else f" ± {error:.3f}"
        bound = f"at most {bits:.3f}{plus_minus} (variational bound, {counted(images, 'test image')})"
        facts.append(("bits per dimension", bound))
    median, median_test = scores["nearest_median"], scores["nearest_median_test"]
    flagged, threshold = scores["nearest_flagged"], scores["nearest_threshold"]
    classes = {
        "in turn": f" of {', '.join(generated['classes'])} in turn",
        "drawn": " of classes drawn with their frequencies in training",
        "none": " without a class",
    }[generated["class_choice"]]
    if generated["guidance_scale"] != 1:
        classes += f" (guidance {generated['guidance_scale']:g})"
    split = "held out of the train split" if reference["split"] == "held_out" else f"{reference['split']} split"
    sampling = f"{generated['sampler']}, {counted(generated['steps'], 'step')}, seed {generated['seed']}"
    facts += [
        ("nearest training image", f"at {median:.2f} (median; of test images {median_test:.2f})"),
        ("suspiciously near", f"{flagged:.2%} of images, below {threshold:.2f} ({copies.RARE:.0%} of test images)"),
        ("generated", f"{counted(generated['images'], 'image')}{classes}, {sampling}"),
        ("reference", f"{counted(reference['images'], 'image')}, {split} of {reference['dataset']}"),
    ]
    if "classifier" in protocol:
        facts.append(("classifier", f"{protocol['classifier']['test_accuracy']:.1%} of the test images right"))
    return [*facts, ("checkpoint", protocol["checkpoint"]["file"])]
