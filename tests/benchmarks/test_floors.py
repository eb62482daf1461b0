"""The least time of what was counted."""

import floors


def test_floor_divides_by_the_rate_of_each_kind():
    counted, rates = (
        {"products": 30, "convolutions": 8},
        {"products": 10.0, "convolutions": 2.0, "float32 products": 1.0},
    )
    assert floors.floor(counted, rates) == 7.0
