"""What hypothesis draws."""

from __future__ import annotations

import math

from hypothesis import strategies as st

any_boundaries = (
    st.lists(st.floats(0, 998), max_size=6)
    .map(lambda b: {math.floor(x): x for x in b})
    .map(lambda b: tuple(sorted(b.values(), reverse=True)))
)
