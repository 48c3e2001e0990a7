"""Scores → a table for people."""

from typing import Any

MISSING = "unavailable"
# What a row is called; the names of its score and of its deviation, through Inception and through the classifier.
ROWS = [
    ("Fréchet distance, FID (lower)", ("fid",), ("classifier_fd",), ".2f"),
    ("kernel distance, KID (lower)", ("kid_mean", "kid_std"), ("classifier_kd_mean", "classifier_kd_std"), ".4f"),
    ("precision (higher: convincing)", ("precision",), ("classifier_precision",), ".3f"),
    ("recall (higher: varied)", ("recall",), ("classifier_recall",), ".3f"),
    (
        "exp E KL, Inception Score (higher)",
        ("inception_score_mean", "inception_score_std"),
        ("classifier_score_mean", "classifier_score_std"),
        ".3f",
    ),
]


def table(scores: dict[str, Any], about: dict[str, Any]) -> str:
    """What `eval.py` prints: scores side by side, then facts, then notes.

    Args:
        scores: by their names in metrics.json; those of a network that was not used are absent.
        about: the protocol, as metrics.json has it.
    """
    columns = [("Inception", 1)] if "extractor" in about else []
    columns += [("classifier", 2)] if "classifier" in about else []
    lines = [" " * 38 + "".join(f"{name:>20}" for name, _ in columns)] if columns else []
    for row in ROWS if columns else []:
        lines.append(f"  {row[0]:36}" + "".join(f"{_number(scores, row[i], row[3]):>20}" for _, i in columns))
    lines += [""] if columns else []
    lines += [f"  {name:24}{value}" for name, value in _facts(scores, about)]
    return "\n".join(lines + [f"  note: {note}" for note in scores["notes"]])


def _number(scores: dict[str, Any], names: tuple[str, ...], form: str) -> str:
    values = [scores[name] for name in names]
    if values[0] is None:
        return MISSING
    return " ± ".join(f"{value:{form}}" for value in values if value is not None)


def _facts(scores: dict[str, Any], about: dict[str, Any]) -> list[tuple[str, str]]:
    made, reference = about["generated"], about["reference"]
    facts = []
    if scores["class_histogram"] is not None:
        facts.append(("classes", ", ".join(f"{name} {n}" for name, n in scores["class_histogram"].items())))
    if scores["class_accuracy"] is not None:
        facts.append(("classified as asked", f"{scores['class_accuracy']:.1%}"))
    if "bits_per_dim" in scores:
        bits, error, of = scores["bits_per_dim"], scores["bits_per_dim_error"], about["bits_per_dim"]["images"]
        facts.append(
            ("bits per dimension", f"at most {bits:.3f} ± {error:.3f} (variational bound, {of:,} test images)")
        )
    facts += [
        (
            "nearest training image",
            f"at {scores['nearest_median']:.2f} (median; of test images {scores['nearest_median_test']:.2f})",
        ),
        (
            "suspiciously near",
            f"{scores['nearest_flagged']:.2%} of images, below {scores['nearest_threshold']:.2f} (1% of test images)",
        ),
        (
            "generated",
            f"{made['images']:,} images{_asked(made)}, {made['sampler']}, {made['steps']} steps, seed {made['seed']}",
        ),
        ("reference", f"{reference['images']:,} images, {reference['split']} split of {reference['dataset']}"),
    ]
    if "classifier" in about:
        facts.append(("classifier", f"{about['classifier']['test_accuracy']:.1%} of the test images right"))
    return [*facts, ("checkpoint", about["checkpoint"]["file"])]


def _asked(made: dict[str, Any]) -> str:
    if not made["classes"]:
        return ""
    return f" of {', '.join(made['classes'])} (guidance {made['guidance_scale']:g})"
