"""How soon the playground answers: from a slider's release to the first point of a new run, against a first launch.

Run it with ``make bench``. Each move replaces a run of two ranks that is under way, as in a notebook; the browser isn't
part of it.
"""

import argparse
import statistics
import time

from IPython.display import HTML

import hpclab
from hpclab.course.playground import Playground
from hpclab.tables import Table


class Place:
    """Stands for the output below the sliders, and notes when a run's first figure comes to be shown there."""

    def __init__(self, play: Playground) -> None:
        self.play, self.run, self.shown_at = play, play.run, 0.0

    def update(self, page: HTML) -> None:
        """Take note of a page."""
        if "data:image/png" in page.data and self.play.run is not self.run:
            self.shown_at, self.run = time.perf_counter(), self.play.run  # who waits looks at the run


def answer(play: Playground, place: Place, batch: int) -> tuple[float, float]:
    """Move the slider; seconds to the first step of a new run, on its own clock, and to its point in the figure."""
    before, moved = place.run, time.perf_counter()
    play.controls["batch"].value = batch
    while place.run is before:
        time.sleep(0.001)
    first = min(row["time_s"] for row in play.run.rows if row["kind"] == "step")
    return first, place.shown_at - moved


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moves", type=int, default=20)
    options = parser.parse_args()
    with hpclab.connect(workers=2) as client:
        play = Playground(client, "CNN", "fashion_mnist", steps=100_000)
        play.place = place = Place(play)  # type: ignore[assignment]
        cold = answer(play, place, 256)
        time.sleep(2)
        moves = []
        for number in range(options.moves):
            moves.append(answer(play, place, (64, 256)[number % 2]))
            time.sleep(1)
        play.stop.click()
        play.wait()
        print(
            Table(
                {
                    "until": what,
                    "median (s)": f"{statistics.median(took):.2f}",
                    "range (s)": f"{min(took):.2f}-{max(took):.2f}",
                    "first launch over it": f"{first / statistics.median(took):.1f}",
                }
                for what, first, took in zip(
                    ("launch to first step", "move to first point"), cold, zip(*moves, strict=True), strict=True
                )
            )
        )


if __name__ == "__main__":
    main()
