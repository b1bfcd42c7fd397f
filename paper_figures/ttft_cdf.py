"""Time to first token by system, as a CDF over requests."""

from __future__ import annotations

import numpy as np

from paper_figures.cdf_figure import CDFFigure
from paper_figures.records import Run


class TTFTCDF(CDFFigure):
    name = "ttft_cdf"
    title = "Time to first token (TTFT) by system, from the planned arrival, over completed requests"
    x_label = "TTFT (ms)"

    def samples_ms(self, run: Run) -> np.ndarray:
        return run.ttft_ms()
