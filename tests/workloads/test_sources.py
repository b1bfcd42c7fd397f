"""Real traces: read whole, with the statistics that are published; bad files are refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from workloads.config import Source
from workloads.errors import WorkloadError
from workloads.known import KNOWN_FILES
from workloads.report import source_statistics
from workloads.sources import load_source
from workloads.statistics import gap_cv

pytestmark = pytest.mark.cpu

AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
AZURE_ROW = "2023-11-16 18:15:46.6805900,374,44\n"
MOONCAKE_ROW = '{"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]}\n'
BURSTGPT = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,a,1.5,ChatGPT,472,18,490,Conversation log
45.5,b,2.5,GPT-4,1087,230,1317,API log
118,c,0.1,ChatGPT,417,0,417,API log
"""


@pytest.mark.parametrize("known", KNOWN_FILES, ids=lambda known: known.format)
def test_published_files_are_read_whole_with_their_statistics(traces_directory, known):
    if not (traces_directory / known.file).is_file():
        pytest.skip(f"{known.file} is not in the directory of traces")
    rows = load_source(Source(known.format, known.file, str(traces_directory)))
    assert rows.identity["sha256"] == known.sha256
    assert rows.identity["published_as"] == known.file
    for name, value in source_statistics(rows).items():
        assert value == pytest.approx(getattr(known, name), abs=5e-4, rel=1e-5), name


def test_the_numbers_of_the_traces_readme(traces_directory):
    """19,366 rows and a CV of about 1.1; 12,031 rows with inputs to 126k; 58,787 rows."""
    azure, mooncake, sharegpt = (
        load_source(Source(known.format, known.file, str(traces_directory))) for known in KNOWN_FILES
    )
    assert len(azure.prompt_tokens) == 19_366 and gap_cv(azure.arrival_s) == pytest.approx(1.1, abs=0.05)
    assert len(mooncake.prompt_tokens) == 12_031 and 126_000 <= mooncake.prompt_tokens.max() < 127_000
    assert len(sharegpt.prompt_tokens) == 58_787 and sharegpt.arrival_s is None


def test_mooncake_keeps_its_prefix_blocks(traces_directory, make):
    """Requests that shared blocks of 512 tokens when they were recorded share the same tokens when replayed."""
    source = {"format": "mooncake", "path": "mooncake_conversation.jsonl", "directory": str(traces_directory)}
    source["max_rows"] = 40
    content = {"arrivals": {"kind": "replay"}, "lengths": {"kind": "replay"}, "prompts": {"kind": "blocks"}}
    trace = make(1, duration_s=3600.0, source=source, **content)
    prompts = [request.prompt for request in trace]
    hashes = [trace.hashes.values[a:b].tolist() for a, b in zip(trace.hashes.offsets, trace.hashes.offsets[1:])]
    assert [len(prompt) for prompt in prompts] == trace.prompt_tokens.tolist()
    shared = 0
    for i in range(len(prompts)):
        for j in range(i):
            common = next((k for k, pair in enumerate(zip(hashes[i], hashes[j])) if pair[0] != pair[1]), 0)
            shared += common
            assert prompts[i][: 512 * common] == prompts[j][: 512 * common]
            assert prompts[i][512 * common : 512 * common + 64] != prompts[j][512 * common : 512 * common + 64]
    assert shared > 0


def test_replayed_lengths_stay_with_their_times(traces_directory, make):
    source = {"format": "azure", "path": "azure_llm_2023_conv.csv", "directory": str(traces_directory)}
    rows = load_source(Source(**source))
    arrivals = {"kind": "replay", "rate_scale": 2.0}
    trace = make(8, duration_s=100.0, arrivals=arrivals, lengths={"kind": "replay"}, source=source)
    count = len(trace)
    assert trace.arrival_s == pytest.approx(rows.arrival_s[:count] / 2)
    assert (trace.prompt_tokens == rows.prompt_tokens[:count]).all()
    assert rows.arrival_s[count] / 2 >= 100
    assert "assigned by popularity" in trace.summary()["assignment"]
    assert trace.summary()["source"]["published_as"] == "azure_llm_2023_conv.csv"


def test_empirical_lengths_keep_the_correlation_of_the_file(traces_directory, make):
    """Pearson's of Azure's pairs, 40,000 draws: within 4.5 standard errors of a normal pair's and some for the tail."""
    source = {"format": "azure", "path": "azure_llm_2023_conv.csv", "directory": str(traces_directory)}
    trace = make(2, duration_s=400.0, arrivals={"rate_rps": 100.0}, lengths={"kind": "empirical"}, source=source)
    found = np.corrcoef(trace.prompt_tokens, trace.output_tokens)[0, 1]
    assert found == pytest.approx(-0.1124, abs=4.5 / len(trace) ** 0.5)
    promised = trace.made["expected"]["prompt_tokens"]
    assert abs(trace.prompt_tokens.mean() - promised["mean"]) < 4.5 * promised["std"] / len(trace) ** 0.5


def test_burstgpt_drops_and_counts_failed_requests(tmp_path, monkeypatch):
    (tmp_path / "BurstGPT_1.csv").write_text(BURSTGPT)
    monkeypatch.setenv("WORKLOAD_TRACES", str(tmp_path))
    rows = load_source(Source("burstgpt", "BurstGPT_1.csv"))
    assert rows.arrival_s.tolist() == [5.0, 45.5]
    assert rows.output_tokens.tolist() == [18, 230]
    assert (rows.identity["rows"], rows.identity["dropped_rows"]) == (2, 1)
    assert rows.identity["published_as"] is None


BAD_FILES = {
    "empty": ("azure", "", "a.csv: the file is empty"),
    "header only": ("azure", AZURE_HEADER, "a.csv: the file has no rows"),
    "other columns": ("azure", "a,b\n1,2\n", "a.csv:1: no column TIMESTAMP, ContextTokens"),
    "missing field": ("azure", AZURE_HEADER + AZURE_ROW + "2023-11-16 18:15:47,,44\n", "a.csv:3: no ContextTokens"),
    "short row": ("azure", AZURE_HEADER + AZURE_ROW + "2023-11-16 18:15:47,5\n", "a.csv:3: .* 3 fields"),
    "fraction": ("azure", AZURE_HEADER + "2023-11-16 18:15:47,3.5,44\n", "a.csv:2: ContextTokens is '3.5'"),
    "negative": (
        "azure",
        AZURE_HEADER + AZURE_ROW * 2 + "2023-11-16 18:15:47,5,-1\n",
        "a.csv:4: GeneratedTokens is '-1'",
    ),
    "no time": ("azure", AZURE_HEADER + "yesterday,5,5\n", "a.csv:2: TIMESTAMP is 'yesterday'"),
    "unsorted": ("azure", AZURE_HEADER + AZURE_ROW + "2023-11-16 18:15:40,5,5\n", "a.csv:3: .* in order of time"),
    "no numbers": ("lengths", AZURE_HEADER + "XXX,1,2\nXXX,one,2\n", "a.csv:3: ContextTokens is 'one'"),
    "no answers": ("burstgpt", BURSTGPT.splitlines()[0] + "\n1,a,1,x,5,0,5,y\n", "no row has response tokens"),
    "nan time": ("burstgpt", BURSTGPT + "nan,a,1,x,5,5,10,y\n", "a.csv:5: Timestamp is 'nan'"),
    "no json": ("mooncake", MOONCAKE_ROW + "{broken\n", "a.csv:2: no JSON"),
    "json list": ("mooncake", MOONCAKE_ROW + "[1]\n", "a.csv:2: a JSON object is wanted, got list"),
    "json blank lines": ("mooncake", MOONCAKE_ROW + "\n\n" + '{"timestamp": 1}\n', "a.csv:4: no input_length"),
    "json fraction": ("mooncake", MOONCAKE_ROW.replace("700", "700.5"), "a.csv:1: input_length is 700.5"),
    "json text": ("mooncake", MOONCAKE_ROW + MOONCAKE_ROW.replace("700", '"x"'), "a.csv:2: input_length is 'x'"),
    "json hashes": ("mooncake", MOONCAKE_ROW.replace("[0, 1]", '["a"]'), "a.csv:1: hash_ids is"),
    "json unsorted": ("mooncake", MOONCAKE_ROW.replace(": 0,", ": 9,") + MOONCAKE_ROW, "a.csv:2: .* in order of time"),
}


@pytest.mark.parametrize(("form", "text", "says"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_in_one_line_that_names_the_place(tmp_path, form, text, says):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=says) as caught:
        load_source(Source(form, str(path)))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_names_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKLOAD_TRACES", str(tmp_path))
    with pytest.raises(WorkloadError, match=f"no file gone.csv .*{tmp_path}.*WORKLOAD_TRACES"):
        load_source(Source("azure", "gone.csv"))


def test_text_is_counted_by_each_models_own_tokenizer(tmp_path, text_models):
    """A tokenizer of words and one of letters see different lengths of the same prompts, and prompts are their ids."""
    from workloads.config import workload_from_dict
    from workloads.generate import build_trace

    turns = [[("system", "s"), ("human", f"ab cd {'ef ' * n}"), ("gpt", "gh ij")] for n in range(6)]
    rows = [{"conversations": [{"from": who, "value": text} for who, text in row]} for row in turns]
    rows.append({"conversations": [{"from": "gpt", "value": "no question"}]})
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(rows))
    content = {
        "duration_s": 50.0,
        "arrivals": {"rate_rps": 4.0},
        "lengths": {"kind": "empirical"},
        "prompts": {"kind": "text"},
        "source": {"format": "sharegpt", "path": str(path)},
    }
    trace = build_trace(workload_from_dict(content), text_models)
    assert trace.summary()["source"]["dropped_rows"] == 1
    words, letters = (set(trace.prompt_tokens[trace.model == index].tolist()) for index in (0, 1))
    assert words == {2, 3, 4, 5, 6, 7}
    assert letters == {4, 6, 8, 10, 12, 14}
    assert set(trace.output_tokens[trace.model == 1].tolist()) == {4}
    for request in trace:
        assert len(request.prompt) == request.prompt_tokens


def test_longalign_and_bad_text(tmp_path):
    from workloads.text import load_texts

    path = Path(tmp_path / "long.jsonl")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.write_text(json.dumps({"messages": messages, "length": 9}) + "\n")
    texts = load_texts(Source("longalign", str(path)), path)
    assert (texts.prompts, texts.answers) == (["q"], ["a"])
    with pytest.raises(WorkloadError, match="no column conversations, which sharegpt has; columns: messages, length"):
        load_texts(Source("sharegpt", str(path)), path)
    path.write_text("not json")
    with pytest.raises(WorkloadError, match="long.jsonl: cannot be loaded"):
        load_texts(Source("longalign", str(path)), path)
