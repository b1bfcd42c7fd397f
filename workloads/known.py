"""Published traces that this project has been run on: checksums and the statistics that a reader must find in them.

The files are data of others and are not shipped. A file whose checksum is here is the published one to the byte; another
file is read all the same, and its record says that it is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownFile:
    """A file and what is in it. Percentiles are the smallest value that so many rows do not exceed; `gap_cv` is None where it has no times."""

    file: str
    format: str
    sha256: str
    origin: str
    licence: str
    rows: int
    span_s: float | None  # first to last arrival
    gap_cv: float | None
    prompt_mean: float
    prompt_p50: float
    prompt_p99: float
    prompt_max: int
    output_mean: float
    output_p50: float
    output_p99: float
    output_max: int
    correlation: float  # of prompt and output


KNOWN_FILES = (
    KnownFile(
        file="azure_llm_2023_conv.csv",
        format="azure",
        sha256="2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
        origin="Azure/AzurePublicDataset, AzureLLMInferenceTrace_conv.csv",
        licence="CC-BY-4.0",
        rows=19_366,
        span_s=3501.722,
        gap_cv=1.0942,
        prompt_mean=1154.697,
        prompt_p50=1020,
        prompt_p99=4142,
        prompt_max=14_050,
        output_mean=211.126,
        output_p50=129,
        output_p99=601,
        output_max=1000,
        correlation=-0.1124,
    ),
    KnownFile(
        file="mooncake_conversation.jsonl",
        format="mooncake",
        sha256="b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df",
        origin="kvcache-ai/Mooncake, FAST'25 release",
        licence="Apache-2.0",
        rows=12_031,
        span_s=3536.999,
        gap_cv=3.0337,  # timestamps are multiples of about three seconds: ten requests share one
        prompt_mean=12_035.061,
        prompt_p50=6909,
        prompt_p99=85_401,
        prompt_max=126_195,
        output_mean=342.619,
        output_p50=350,
        output_p99=1120,
        output_max=2000,
        correlation=0.0719,
    ),
    KnownFile(
        file="sharegpt_lengths.csv",
        format="lengths",
        sha256="4738e04a0377c192e5d46e0f050a9b64a07449310c46b28e93a3742ecc89d0f7",
        origin="efeslab/Nanoflow, datasets/traces/sharegpt.csv",
        licence="Apache-2.0",
        rows=58_787,
        span_s=None,
        gap_cv=None,
        prompt_mean=298.798,
        prompt_p50=36,
        prompt_p99=3474,
        prompt_max=241_402,
        output_mean=323.727,
        output_p50=280,
        output_p99=999,
        output_max=37_622,
        correlation=0.0109,
    ),
)


def known_by_checksum(sha256: str) -> KnownFile | None:
    """The published file with this checksum, None for an unknown one."""
    return next((known for known in KNOWN_FILES if known.sha256 == sha256), None)
