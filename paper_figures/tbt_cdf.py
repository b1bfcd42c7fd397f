"""Time between tokens by system, as a CDF over all gaps between a request's tokens."""

from __future__ import annotations

import numpy as np

from paper_figures.cdf_figure import CDFFigure
from paper_figures.records import Run


class TBTCDF(CDFFigure):
    name = "tbt_cdf"
    title = "Time between tokens (TBT) by system, pooled over the tokens of completed requests"
    x_label = "TBT (ms)"

    def samples_ms(self, run: Run) -> np.ndarray:
        return run.itl_ms()
