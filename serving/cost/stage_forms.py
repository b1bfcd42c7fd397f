"""Whole stages of one model as measured on this machine: straight lines in rows, tokens and distinct experts.

On the CPU a stage is a few tens of small operators whose sum is what counts. A calibration measures each stage as the
engine runs it and fits a line; the table over it does the rest. `variant` is the model's name. Times do not depend on the
hardware description: they hold for the machine that was measured.
"""

from __future__ import annotations

from serving.cost.form import NS, US, Coefficients, Columns, Form, Kernel
from serving.cost.hardware import Hardware


def decode(p: Coefficients, x: Columns, hw: Hardware, kernel: Kernel):
    """The attention half of one layer for `batch_size` sequences of `context` tokens on average; alone, or what they add to a
    chunk's (`stage_beside`)."""
    tokens = x["batch_size"] * x["context"]
    return p["t0_us"] * US + p["row_us"] * US * x["batch_size"] + p["token_ns"] * NS * tokens


def prefill(p: Coefficients, x: Columns, hw: Hardware, kernel: Kernel):
    """The attention half of one layer for a chunk of `isl` tokens after `past` of one sequence."""
    rows, past = x["isl"], x["past"]
    pairs = rows * (past + rows / 2.0)
    line = p["t0_us"] * US + p["row_us"] * US * rows + p["token_ns"] * NS * (past + rows)
    return line + p["pair_ns"] * NS * pairs


def routed(p: Coefficients, x: Columns, hw: Hardware, kernel: Kernel):
    """The FFN half of one routed layer: `num_tokens` rows that hit `distinct` experts."""
    return p["t0_us"] * US + p["row_us"] * US * x["num_tokens"] + p["expert_us"] * US * x["distinct"]


def per_row(p: Coefficients, x: Columns, hw: Hardware, kernel: Kernel):
    """A dense FFN; what a step does once, at its begin (the embedding and more) and at its end (the head and more)."""
    return p["t0_us"] * US + p["row_us"] * US * x["rows"]


_LINE = {"t0_us": 50.0, "row_us": 20.0}
STAGE_FORMS = {
    form.operator: form
    for form in (
        *(
            Form(name, decode, ("hidden_size",), ("batch_size", "context"), {**_LINE, "token_ns": 50.0})
            for name in ("stage_decode", "stage_beside")
        ),
        Form(
            "stage_prefill",
            prefill,
            ("hidden_size",),
            ("isl", "past"),
            {**_LINE, "token_ns": 5.0, "pair_ns": 5.0},
        ),
        Form("stage_routed", routed, ("hidden_size",), ("num_tokens",), {**_LINE, "expert_us": 50.0}),
        *(Form(f"stage_{name}", per_row, ("hidden_size",), ("rows",), _LINE) for name in ("dense", "begin", "end")),
    )
}
