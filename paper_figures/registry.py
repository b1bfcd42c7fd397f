"""Exhibits by name: the one list that commands, the artifact's table and tests go by."""

from __future__ import annotations

from paper_figures.ablation import Ablation
from paper_figures.active_kv import ActiveKV
from paper_figures.comparison import Comparison, ComparisonByModel, ComparisonByRate
from paper_figures.context import Context
from paper_figures.exhibit import Exhibit
from paper_figures.goodput import Goodput
from paper_figures.kernel_roofline import KernelRoofline
from paper_figures.kv_capacity import KVCapacity
from paper_figures.kv_pages_over_time import KVPagesOverTime
from paper_figures.kv_share import KVShare
from paper_figures.latency_vs_rate import LatencyVsRate
from paper_figures.model_count import ModelCount
from paper_figures.model_table import ModelTable
from paper_figures.outcomes import Outcomes
from paper_figures.pipeline_timeline import PipelineTimeline
from paper_figures.placement import Placement
from paper_figures.places import Places
from paper_figures.planner_overflow import PlannerOverflow
from paper_figures.popularity import Popularity
from paper_figures.rate_by_context import RateByContext
from paper_figures.rate_estimate import RateEstimate
from paper_figures.sensitivity import Sensitivity
from paper_figures.skew import Skew
from paper_figures.summary import Summary
from paper_figures.swap_breakdown import SwapBreakdown
from paper_figures.tbt_by_model import TBTByModel
from paper_figures.tbt_cdf import TBTCDF
from paper_figures.tbt_vs_rate import TBTVsRate
from paper_figures.ttft_cdf import TTFTCDF
from paper_figures.validation import Validation

EXHIBITS: dict[str, Exhibit] = {
    kind.name: kind()
    for kind in (
        Summary, TBTCDF, TTFTCDF, KVPagesOverTime, Outcomes, TBTByModel, LatencyVsRate, Goodput, Skew, ModelCount,
        Context, Ablation, KVShare, ModelTable, Popularity, ActiveKV, RateByContext, TBTVsRate, Placement, KVCapacity, Places,
        Comparison, ComparisonByModel, ComparisonByRate, RateEstimate, PipelineTimeline, PlannerOverflow, SwapBreakdown, Validation, Sensitivity, KernelRoofline,
    )
}  # fmt: skip
