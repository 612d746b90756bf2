"""The records of Piz Daint, and what the notebook *scaling* says of forecasts of them."""

import numpy as np
import pytest

from hpclab import laws
from hpclab.course import daint


@pytest.mark.parametrize(
    ("gigabits", "nodes", "off"),
    [
        (10, 128, -0.03),
        (10, 64, 0.08),
        (8, 128, -0.21),
        (12, 128, 0.14),
        (4, 64, -0.45),
        (4, 128, -0.58),
        (4, 8, -0.34),
    ],
)
def test_forecasts_are_as_far_off_as_the_text_says(gigabits, nodes, off):
    place = daint.NODES.tolist().index(nodes)
    rate = daint.forecast(gigabits)[place]["samples_per_s"]
    assert rate / daint.RATES[place] - 1 == pytest.approx(off, abs=0.006)


def test_the_table_has_a_row_for_each_record_and_a_column_for_each_forecast():
    law = laws.fit_usl(daint.NODES[: daint.KNOWN], daint.RATES[: daint.KNOWN])
    table = daint.table({"10 Gb/s": daint.forecast(10)}, law)
    assert [row["nodes"] for row in table] == daint.NODES.tolist()
    assert [*table[0]] == ["nodes", "recorded", "usl", "10 Gb/s"]
    shown = float(table[-1]["usl"].split()[0].replace(",", ""))
    assert shown == pytest.approx(law([128])[0], abs=0.5)
    assert shown / daint.RATES[-1] - 1 == pytest.approx(0.23, abs=0.006)
    assert [row["samples_per_s"] for row in daint.RECORDED] == daint.RATES.tolist()
    assert {row["source"] for row in daint.RECORDED} == {"recorded"}
    assert np.all(np.diff(daint.SECONDS) > 0)
