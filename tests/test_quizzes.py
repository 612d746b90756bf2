"""Quizzes: each has its figure or table, and what is shown is what the checks read."""

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from hpclab.course import checks, quizzes
from hpclab.tables import Table

SOURCES = sorted((Path(__file__).resolve().parents[1] / "notebooks" / "source").glob("*.py"))


@pytest.mark.parametrize("quiz", quizzes._SHOWN)
def test_a_quiz_shows_its_figure_or_table_in_its_own_notebook(quiz):
    before = set(plt.get_fignums())
    table = quizzes.show(quiz)
    new = set(plt.get_fignums()) - before
    assert isinstance(table, Table) or len(new) == 1
    for number in new:
        plt.close(number)
    assert quiz in checks.ids()
    slug = quiz.partition(".")[0]
    asking = [path.stem.partition("_")[2] for path in SOURCES if f'quizzes.show("{quiz}")' in path.read_text("utf-8")]
    assert asking == [slug.replace("-", "_")] or asking == [slug]


def test_an_unknown_quiz_is_answered_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"quiz \(='start.quiz'\) must be one of start.quiz_race, "):
        quizzes.show("start.quiz")
