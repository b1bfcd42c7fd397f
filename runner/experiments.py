"""The artifact's experiments, one after the other.

`./run_all.sh MODE` runs those of its mode through `bench.py`; each writes its records to the folder of its own name. A mode
with more seeds or points adds cells to the same folder: cells that are there already are not run again.
"""

from __future__ import annotations

from runner.experiment import Experiment

MODES = ("smoke", "fast", "full")

_SEED = "workload.seeds.schedule"
_RATE, _SKEW, _PROMPT = "workload.arrivals.rate_rps", "workload.popularity.alpha", "workload.lengths.prompt_max"
_DURATION, _BINS = "workload.duration_s", "workload.lengths.bins"
_LONG = ("fast", "full")
_SCARCE = ("conf=smoke",)
_HEADLINE = ("crosspool", "static", "swap", "quota")
_CAPPED = ("elastic-cap", "elastic-placement-cap", "quota-cap")
_UNCAPPED = ("crosspool", "static", "static-searched", "elastic", "elastic-placement", "quota", "swap", "swap-token")
_ALL = (*_UNCAPPED, "swap-zero-cost", *_CAPPED)
_PAPER_THREE = ("paper-crosspool", "paper-static", "paper-elastic")
_GPU_TBT_FIGURES = (
    "tbt_vs_rate",
    "tbt_by_model",
    "latency_vs_rate",
    "kv_capacity",
    "placement",
    "outcomes",
    "summary",
)
_GPU_THREE = ("gpu-crosspool", "gpu-static", "gpu-elastic")
_GPU_ONE = (
    "gpu1-crosspool",
    "gpu1-crosspool-one-batch",
    "gpu-static",
    "gpu-elastic",
    "gpu-elastic-mps",
    "gpu-elastic-placement",
    "gpu-quota",
    "gpu-swap",
)
_PLACES_SYSTEMS = ("gpu1-crosspool", "gpu1-crosspool-one-batch", "gpu-static", "gpu-elastic-mps")
_PLACES_SWEEP = {"system.options.max_batch": (2, 4, 8), _SEED: (0, 1, 2)}
_PAPER_RATES = (0.2, 0.5, 0.8, 1.0)


def _gpu_tbt(
    name: str,
    question: str,
    gpus: int,
    gpu_gib: float,
    systems: tuple[str, ...],
    rates: tuple[float, ...] = _PAPER_RATES[1:],
) -> Experiment:
    """The paper's TBT experiment measured on `gpus` GPUs, by the preset of the same name."""
    return Experiment(
        name=name,
        question=question,
        base=(f"conf={name}",),
        sweeps={"full": {_RATE: rates, _SEED: (0, 1, 2)}},
        figures=_GPU_TBT_FIGURES,
        cell_s=75,
        memory_gib=16,
        gpus=gpus,
        gpu_gib=gpu_gib,
        paper="Fig. 7",
        systems=systems,
    )


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        name="smoke",
        question="Do all systems serve four models of four architectures whose KV hardly fits?",
        base=_SCARCE,
        sweeps={
            "smoke": {_SEED: (0,), _DURATION: (10,)},
            "fast": {_SEED: (0, 1, 2), _DURATION: (10,)},
            "full": {_SEED: (0, 1, 2, 3, 4), _DURATION: (10,)},
        },
        figures=(
            "summary",
            "tbt_cdf",
            "ttft_cdf",
            "kv_pages_over_time",
            "active_kv",
            "kv_capacity",
            "placement",
            "outcomes",
            "tbt_by_model",
        ),
        cell_s=19,
        systems=_HEADLINE,
    ),
    Experiment(
        name="baselines",
        question="Where does each system win and lose, under the same traces and the same total memory?",
        base=("conf=baselines",),
        sweeps={
            "fast": {"system": _UNCAPPED, _RATE: (6,), _SKEW: (0.7,), _DURATION: (8,)},
            "full": {_RATE: (3, 6, 10), _SKEW: (0.7, 2.1), _SEED: (0, 1, 2), _DURATION: (8,)},
        },
        figures=("comparison", "comparison_by_model", "comparison_by_rate", "tbt_by_model", "outcomes", "summary"),
        figures_of={"swap_breakdown": "swap"},
        cell_s=18,
        cell_s_in={"fast": 15},
        systems=_ALL,
    ),
    Experiment(
        name="rate",
        question="How do latency and goodput change with the offered rate?",
        base=_SCARCE,
        sweeps={
            "fast": {_RATE: (2, 5, 11), _DURATION: (10,)},
            "full": {_RATE: (1, 2, 5, 8, 11, 14), _SEED: (0, 1, 2, 3, 4)},
        },
        figures=("latency_vs_rate", "tbt_vs_rate", "goodput", "outcomes", "summary"),
        cell_s=25,
        cell_s_in={"fast": 19},
        paper="Fig. 7",
    ),
    Experiment(
        name="skew",
        question="Who gains when few models get most requests?",
        base=_SCARCE,
        sweeps={
            "fast": {_SKEW: (0.0, 2.1), _DURATION: (10,)},
            "full": {_SKEW: (0.0, 0.7, 0.9, 1.3, 1.7, 2.1), _SEED: (0, 1, 2)},
        },
        figures=("skew", "outcomes", "summary"),
        cell_s=25,
        cell_s_in={"fast": 19},
    ),
    Experiment(
        name="context",
        question="At what rate can prompts of a length be served, before a share of KV is too small for them?",
        base=(*_SCARCE, "workload.lengths.kind=fixed", "workload.lengths.output_max=48"),
        sweeps={
            "fast": {_PROMPT: (96, 384), _RATE: (2, 6), _DURATION: (6,)},
            "full": {_PROMPT: (96, 192, 288, 384), _RATE: (1, 2, 4, 6, 9), _SEED: (0, 1, 2), _DURATION: (8,)},
        },
        figures=("rate_by_context", "context", "outcomes", "summary"),
        cell_s=18,
        cell_s_in={"fast": 16},
        paper="Fig. 6",
    ),
    Experiment(
        name="models",
        question="What does one more model cost when memory and total rate stay as they are?",
        base=("devices.0.memory_mib=12", "devices.1.memory_mib=12", "system.options.page_bytes=4096"),
        sweeps={"full": {"conf": ("models-2", "models-4", "models-8"), _SEED: (0, 1, 2)}},
        figures=("model_count", "outcomes", "summary"),
        cell_s=45,
    ),
    Experiment(
        name="ablation",
        question="What do the pipeline and lowered control bring, alone and together, at saturation?",
        base=("conf=ablation", "timeline=true"),
        sweeps={
            "fast": {"system.options.lanes": (1, 2), "system.options.control": ("host", "lowered")},
            "full": {
                "system.options.lanes": (1, 2, 3),
                "system.options.control": ("host", "lowered"),
                _SEED: (0, 1, 2),
            },
        },
        figures=("ablation", "pipeline_timeline"),
        cell_s=40,
        memory_gib=8,
        disk_gib=1,
        paper="Table 3",
        systems=("crosspool",),
    ),
    Experiment(
        name="popularity",
        question="How few tokens do the coldest models take, and how much less KV than the sum of peaks do all need?",
        base=("conf=popularity",),
        sweeps={"fast": {_SEED: (0,)}, "full": {_SEED: (0, 1, 2)}},
        figures=("popularity", "active_kv"),
        cell_s=15,
        paper="Fig. 1",
        systems=("crosspool",),
    ),
    Experiment(
        name="paper-tbt",
        question="The paper's TBT experiment at its own scale: three models on five A100 40 GB, simulated.",
        base=("conf=paper-tbt",),
        sweeps={
            "fast": {_RATE: _PAPER_RATES, _DURATION: (120,)},
            "full": {_RATE: _PAPER_RATES, _SEED: (0, 1, 2)},
        },
        figures=("tbt_vs_rate", "tbt_by_model", "latency_vs_rate", "kv_capacity", "placement", "outcomes", "summary"),
        cell_s=4.4,
        paper="Fig. 7",
        systems=_PAPER_THREE,
    ),
    Experiment(
        name="paper-tbt-turns",
        question="The same with engines that take turns on a GPU, as processes do without MPS, simulated.",
        base=("conf=paper-tbt-turns",),
        sweeps={"full": {_RATE: _PAPER_RATES, _SEED: (0, 1, 2)}},
        figures=("tbt_vs_rate", "tbt_by_model", "latency_vs_rate", "outcomes", "summary"),
        cell_s=5,
        paper="Fig. 7",
        systems=("paper-crosspool", "paper-elastic-turns"),
    ),
    Experiment(
        name="paper-ablation",
        question="The pipeline and lowered control at the paper's scale, simulated.",
        base=("conf=paper-ablation",),
        sweeps={
            mode: {"system.options.lanes": (1, 2), "system.options.control": ("host", "lowered")} for mode in _LONG
        },
        figures=("ablation",),
        cell_s=5,
        paper="Table 3",
        systems=("paper-crosspool",),
    ),
    Experiment(
        name="paper-context",
        question="The highest rate served by length of context at the paper's scale, simulated.",
        base=("conf=paper-context",),
        sweeps={
            "fast": {_BINS: ("[4-8K]", "[16-32K]", "[64-128K]"), _RATE: (0.1, 0.8), _DURATION: (120,)},
            "full": {
                _BINS: ("[4-8K]", "[8-16K]", "[16-32K]", "[32-64K]", "[64-128K]"),
                _RATE: (0.1, 0.2, 0.4, 0.8, 1.6, 3.2),
                _SEED: (0, 1, 2),
            },
        },
        figures=("rate_by_context", "outcomes", "summary"),
        cell_s=4,
        paper="Fig. 6",
        systems=_PAPER_THREE,
    ),
    Experiment(
        name="paper-models",
        question="What does one more model cost at the size of real checkpoints, on 64 H200, simulated?",
        base=(),
        sweeps={"full": {"conf": tuple(f"paper-models-{count}" for count in (2, 4, 8, 16, 32, 64))}},
        figures=("model_count", "outcomes", "summary"),
        cell_s=20,
        systems=("crosspool", "static", "elastic", "quota", "swap"),
    ),
    Experiment(
        name="paper-sensitivity",
        question="What Fig. 7's ratio rests on that the paper does not say: here the batch cap, simulated.",
        base=("conf=paper-sensitivity",),
        sweeps={
            "fast": {"system.options.max_batch": (2, 8), _DURATION: (120,)},
            "full": {"system.options.max_batch": (2, 4, 8, 16), "workload.lengths.output_median": (115, 229, 458)},
        },
        figures=("sensitivity",),
        cell_s=6,
        paper="Fig. 7",
        systems=("paper-crosspool", "paper-elastic"),
    ),
    Experiment(
        name="places",
        question="What is due to how many sequences of a model are served at once? Two models on one H200, simulated.",
        base=("conf=places",),
        sweeps={"full": _PLACES_SWEEP},
        figures=("places", "outcomes", "summary"),
        cell_s=2,
        systems=_PLACES_SYSTEMS,
    ),
    Experiment(
        name="paper-active-kv",
        question="Active KV of four models at 0.2 requests a second each, simulated.",
        base=("conf=paper-active-kv",),
        sweeps={"fast": {_DURATION: (900,)}, "full": {_DURATION: (3600,)}},
        figures=("active_kv",),
        cell_s=14,
        paper="Fig. 1b",
        systems=("crosspool",),
    ),
    Experiment(
        name="planner-overflow",
        question="Is demand above the planner's budget as rarely as its quantile promises?",
        base=(),
        sweeps={mode: {} for mode in ("fast", "full")},
        figures=("planner_overflow",),
        cell_s=8,
        studies=(("planner-overflow", "conf/planner/cpu2.yaml"), ("planner-overflow", "conf/planner/paper.yaml")),
    ),
    Experiment(
        name="rate-estimate",
        question="At what rate would contexts of a length be served, by the memory of the paper's placements alone?",
        base=(),
        sweeps={mode: {} for mode in _LONG},
        figures=("rate_estimate",),
        cell_s=8,
        paper="Fig. 6",
        studies=(("rate-estimate",),),
    ),
    Experiment(
        name="kernels",
        question="How near do the kernels come to the ceilings of this machine?",
        base=(),
        sweeps={mode: {} for mode in ("fast", "full")},
        figures=("kernel_roofline",),
        cell_s=30,
        studies=(("kernels",),),
    ),
    Experiment(
        name="card",
        question="What do lowered control and pools cost a decode step on this machine's GPU?",
        base=(),
        sweeps={"full": {}},
        figures=(),
        cell_s=60,
        memory_gib=16,
        gpus=1,
        studies=(("card", "--models", "deepseek-v2-lite", "--controls", "fused,lowered,host", "--memory-gib", "36"),),
    ),
    _gpu_tbt(
        "gpu-tbt",
        "The paper's TBT experiment on two GPUs that are given the memory of its five, measured.",
        gpus=2,
        gpu_gib=102,
        systems=_GPU_THREE,
    ),
    _gpu_tbt(
        "gpu-tbt-groups",
        "The same with the baselines' models over both GPUs, as the paper spreads them over several; engines in turns and through MPS.",
        gpus=2,
        gpu_gib=102,
        systems=("gpu-crosspool", "gpu-crosspool-one-batch", "gpu2-static", "gpu2-elastic", "gpu2-elastic-mps"),
    ),
    _gpu_tbt(
        "gpu4-tbt",
        "The paper's TBT experiment on four GPUs that are given the memory of its five, with placements after Table 2.",
        gpus=4,
        gpu_gib=52,
        systems=("gpu-crosspool-cut", "gpu4-static", "gpu4-elastic"),
        rates=_PAPER_RATES,
    ),
    _gpu_tbt(
        "gpu5-tbt",
        "The paper's TBT experiment on five GPUs capped to 40 GiB, with its placements, measured.",
        gpus=5,
        gpu_gib=42,
        systems=("gpu-crosspool-cut", "gpu5-static", "gpu5-elastic"),
        rates=_PAPER_RATES,
    ),
    Experiment(
        name="gpu-mixtral",
        question="Mixtral-8x7B beside one more model and beside three at the same total rate, on two GPUs.",
        base=("conf=gpu-mixtral",),
        sweeps={"full": {"model": ("seeded-mixtral", "seeded-four"), _SKEW: (0.0, 0.9, 2.1), _SEED: (0, 1, 2)}},
        figures=("tbt_by_model", "placement", "outcomes", "summary"),
        cell_s=75,
        memory_gib=16,
        gpus=2,
        gpu_gib=114,
        systems=_GPU_THREE,
    ),
    Experiment(
        name="gpu-one",
        question="Two DeepSeek models on one GPU of 80 GB, every system with the same memory, measured.",
        base=("conf=gpu-one",),
        sweeps={"full": {_RATE: (0.5, 1.0, 1.5), _SEED: (0, 1, 2)}},
        figures=_GPU_TBT_FIGURES,
        cell_s=65,
        memory_gib=70,
        gpus=1,
        gpu_gib=75,
        systems=_GPU_ONE,
    ),
    Experiment(
        name="gpu-one-40gb",
        question="The same models on 40 GB, which hold one of them at a time: what does swapping cost?",
        base=("conf=gpu-one-40gb",),
        sweeps={"full": {_RATE: (0.1, 0.2), _SEED: (0, 1, 2)}},
        figures=("tbt_by_model", "outcomes", "summary"),
        cell_s=107,
        memory_gib=70,
        gpus=1,
        gpu_gib=39,
        systems=("gpu-swap", "gpu-swap-token"),
    ),
    Experiment(
        name="gpu-one-mixtral",
        question="Mixtral-8x7B and DeepSeek-MoE-16B on one GPU of 141 GB: skew at a fixed total rate, measured.",
        base=("conf=gpu-one-mixtral",),
        sweeps={"full": {_SKEW: (0.0, 0.9, 2.1), _SEED: (0, 1, 2)}},
        figures=("tbt_by_model", "placement", "outcomes", "summary"),
        cell_s=75,
        memory_gib=16,
        gpus=1,
        gpu_gib=128,
        systems=("gpu1-crosspool", "gpu-static", "gpu-elastic", "gpu-elastic-mps"),
    ),
    Experiment(
        name="gpu-places",
        question="What is due to how many sequences of a model are served at once? Two models on one GPU of 80 GB, measured.",
        base=("conf=gpu-one", "workload.rate=1.5"),
        sweeps={"full": _PLACES_SWEEP},
        figures=("places", "outcomes", "summary"),
        cell_s=65,
        memory_gib=16,
        gpus=1,
        gpu_gib=75,
        systems=_PLACES_SYSTEMS,
    ),
    Experiment(
        name="gpu-pair",
        question="Two of the paper's models on two GPUs of 80 GB, measured.",
        base=("conf=gpu-pair",),
        sweeps={"full": {_RATE: (0.8, 1.6), _SEED: (0, 1, 2)}},
        figures=("tbt_by_model", "latency_vs_rate", "placement", "outcomes", "summary"),
        cell_s=70,
        memory_gib=16,
        gpus=2,
        gpu_gib=75,
        systems=_GPU_THREE,
    ),
    Experiment(
        name="baselines-100m",
        question="The same comparison with four models of 100M parameters, where weights outweigh the interpreter.",
        base=("conf=baselines-100m",),
        sweeps={"full": {_RATE: (0.5, 1.0, 2.0), _SKEW: (0.9,), _SEED: (0, 1, 2)}},
        figures=("comparison", "comparison_by_model", "comparison_by_rate", "tbt_cdf", "ttft_cdf", "summary"),
        figures_of={"swap_breakdown": "swap"},
        cell_s=60,
        memory_gib=10,
        disk_gib=3,
        systems=_UNCAPPED,
    ),
)


def of_mode(mode: str) -> list[Experiment]:
    """The experiments that `mode` runs, in order."""
    return [experiment for experiment in EXPERIMENTS if mode in experiment.sweeps]
