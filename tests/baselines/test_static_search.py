"""The searched placement: it fits, is never predicted worse than the naive one, follows the load, and says what is missing."""

import dataclasses
import random
from pathlib import Path

import pytest
import test_token_equality as equality
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.static.layout import equal_groups, lay_out
from baselines.static.options import StaticOptions
from baselines.static.predict import Predictor
from baselines.static.search import PlacementSearch, cuts
from serving import registry
from serving.checkpoints.sizes import config_of
from serving.cost.cards import stages_on
from serving.cost.table1 import PAPER_MODELS, published_spec
from serving.errors import CapacityError
from serving.generate import cpu_cluster, generate
from serving.interface import Cluster, Demand, Device, ServedModel
from serving.spec import spec_from_config

pytestmark = pytest.mark.cpu

OPTIONS = StaticOptions(placement="searched", page_bytes=4096, prefill_chunk=64)


def spec_of(architecture, size, name):
    return spec_from_config(config_of(architecture, size, "float32"), name)


def model_of(architecture, size="tiny"):
    return ServedModel(spec_of(architecture, size, architecture), Path())


def paper_cluster(count, memory_gib=40):
    return Cluster(tuple(Device(f"gpu{i}", "cuda", i, memory_gib << 30) for i in range(count)))


def searched(cluster, models, demand, **options):
    system = registry.create("static", {"placement": "searched", "page_bytes": 4096, **options})
    return system.plan(cluster, models, demand)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.floats(0.1, 400), min_size=3, max_size=3),
    st.integers(1, 4),
    st.sampled_from([3, 4, 8, 40]),
    st.integers(8, 200),
)
def test_what_is_found_fits_and_is_never_predicted_worse_than_equal_shares(rates, devices, memory_mib, prompt):
    models = [model_of(name) for name in ("mixtral", "deepseek_v2", "qwen3_moe")]
    demand = Demand(
        dict(zip([m.name for m in models], rates, strict=True)), {m.name: [(prompt, 30), (prompt, 90)] for m in models}
    )
    cluster = cpu_cluster(devices, memory_mib << 20)
    predictor = Predictor({m.name: stages_on("cpu2", m) for m in models}, demand, OPTIONS)
    try:
        naive = predictor.score(lay_out(cluster, equal_groups(cluster, models), OPTIONS)[1])
    except CapacityError:
        naive = None
    try:
        found = PlacementSearch(cluster, models, OPTIONS, predictor).run()
    except CapacityError as error:
        assert naive is None and "infeasible" in str(error)
        return
    assert naive is None or found.score.key >= naive.key
    assert {model.name for model, _ in found.seated} == {model.name for model in models}
    for plan in lay_out(cluster, found.seated, OPTIONS, found.kv_weight)[0]:
        assert sum(plan.weights_bytes.values()) + plan.kv_bytes <= plan.device.memory_bytes
        assert sum(plan.kv_quota_bytes.values()) <= plan.kv_bytes
    assert PlacementSearch(cluster, models, OPTIONS, predictor).run() == found


def test_the_papers_models_at_equal_rates_get_the_papers_placement():
    """Table 2: Qwen3-30B-A3B and GLM-4.7-Flash on two cards each, DeepSeek-V2-Lite on one; MLA with data-parallel attention."""
    models = [ServedModel(published_spec(name), Path(), "bfloat16", dummy=True) for name in PAPER_MODELS]
    demand = Demand(dict.fromkeys(PAPER_MODELS, 0.5), {name: [(200, 200), (1000, 300)] for name in PAPER_MODELS})
    placement = searched(paper_cluster(5), models, demand, page_bytes=2 << 20, max_batch=16, prefill_chunk=1024)
    shape = {i["model"]: (len(i["devices"]), i["tp"], i["dp"]) for i in placement.options["instances"]}
    assert shape == {"qwen3-30b-a3b": (2, 2, 1), "glm-4.7-flash": (2, 1, 2), "deepseek-v2-lite": (1, 1, 1)}


@pytest.mark.parametrize("hot", ["a", "b"])
def test_the_hot_model_gets_the_spare_device(hot):
    """Two alike models on three devices, each with room for one whole model."""
    models = [dataclasses.replace(model_of("mixtral", "100m"), spec=spec_of("mixtral", "100m", name)) for name in "ab"]
    rates = {"a": 0.02, "b": 0.02} | {hot: 2.0}
    demand = Demand(rates, {name: [(200, 200)] for name in rates})
    instances = searched(cpu_cluster(3, 560 << 20), models, demand).options["instances"]
    devices = {name: sum(len(i["devices"]) for i in instances if i["model"] == name) for name in rates}
    assert devices.pop(hot) > max(devices.values()), instances


def test_long_requests_are_served_where_their_kv_fits():
    """One long request needs the KV of a model that is not squeezed beside another."""
    models = [model_of("mixtral", "100m"), model_of("deepseek", "100m")]
    demand = Demand(dict.fromkeys(("mixtral", "deepseek"), 0.1), {"deepseek": [(3900, 100)], "mixtral": [(10, 10)]})
    cluster = cpu_cluster(2, 760 << 20)
    predictor = Predictor({m.name: stages_on("cpu2", m) for m in models}, demand, OPTIONS)
    found = PlacementSearch(cluster, models, OPTIONS, predictor).run()
    assert found.score.served == pytest.approx(1.0, abs=0.01)


def test_infeasible_cells_say_what_is_missing():
    models = [ServedModel(published_spec(name), Path(), "bfloat16", dummy=True) for name in PAPER_MODELS]
    with pytest.raises(CapacityError, match=r"infeasible: weights of 3 models need .* GiB.*\d+ bytes are missing"):
        searched(paper_cluster(3), models, Demand())
    with pytest.raises(CapacityError, match=r"infeasible: no placement of 1 models on 1 devices; at best 0 fit, then"):
        searched(cpu_cluster(1, 3 << 20), [model_of("mixtral")], Demand(), page_bytes=1 << 20)


@pytest.mark.parametrize(("nodes", "count"), [((1,), 1), ((4,), 5), ((8,), 22), ((12,), 12), ((4, 2), 4)])
def test_devices_are_cut_into_groups_within_nodes_in_every_way_that_is_promised(nodes, count):
    devices = [Device(f"{n}.{i}", "cuda", i, 1, node=n) for n, size in enumerate(nodes) for i in range(size)]
    found = list(cuts(devices))
    assert len({str(groups) for groups in found}) == len(found) == count
    for groups in found:
        assert sorted(name for group in groups for name in group) == sorted(device.name for device in devices)
        assert all(len({name.split(".")[0] for name in group}) == 1 for group in groups)


def test_a_searched_placement_computes_the_same(tiny_checkpoints):
    models = equality.served(tiny_checkpoints, ["mixtral", "deepseek_v2"])
    demand = Demand({"mixtral": 9.0, "deepseek_v2": 0.1}, {m.name: [(40, 30)] for m in models})
    system = registry.create("static", {**equality.OPTIONS, "placement": "searched"})
    requests = [r for i, m in enumerate(models) for r in equality.ragged_requests(m, 5, random.Random(i), 50 * i)]
    try:
        system.start(system.plan(cpu_cluster(2, 64 << 20), models, demand))
        equality.assert_equal_to_judge(requests, generate(system, requests), tiny_checkpoints)
    finally:
        system.stop()
