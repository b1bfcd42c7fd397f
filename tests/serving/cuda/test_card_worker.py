"""The loop of a card's worker, with a runner that only says when steps are done: what it does between two steps, and in which order."""

import threading
import time

import pytest

from serving.batching import StepLimits
from serving.cuda.worker import CardWorker
from serving.memory.kv_pool import KVPool
from serving.shm.bell import Bell
from serving.shm.region import SharedRegion
from serving.shm.ring import BelledRing, Ring
from serving.spec import spec_from_config
from serving.workers.counters import REGION_BYTES, Counters
from serving.workers.messages import PoolUse, Stop, Submit, Tokens, decode, encode
from serving.workers.model_worker import HostedModel

pytestmark = pytest.mark.cpu

PAGE_BYTES = 4096


class Steps:
    """A runner whose steps are done at once; every row's token is 5."""

    bytes_crossed = 0

    def __init__(self, seen):
        self._seen, self._wanted = seen, {}

    def launch(self, lane, model, plan):
        self._wanted[lane] = len(plan.logit_rows)
        self._seen.append(("launch", tuple(sequence.request_id for sequence, _ in plan.items)))

    def done(self, lane):
        return True

    def result(self, lane):
        return [5] * self._wanted[lane]

    def close(self):
        self._seen.append(("close", ()))


class Told(Ring):
    """The ring of tokens, where what is pushed is seen."""

    def __init__(self, seen):
        super().__init__(SharedRegion(1 << 20))
        self._seen = seen

    def push(self, data):
        message = decode(data)
        if isinstance(message, Tokens):
            self._seen.append(("told", tuple(message.items)))
        elif isinstance(message, PoolUse):
            self._seen.append(("pages", message.pages))
        return super().push(data)


@pytest.fixture
def serve():
    """Serve requests of (id, prompt, new tokens) with so many lanes; what was launched and told, in order."""

    def run(requests, lanes=1, max_batch=2):
        seen = []
        spec = spec_from_config(
            {
                "model_type": "mixtral", "num_hidden_layers": 2, "hidden_size": 40, "vocab_size": 64, "num_attention_heads": 4,
                "num_key_value_heads": 2, "head_dim": 10, "num_local_experts": 4, "num_experts_per_tok": 2,
                "intermediate_size": 32, "max_position_embeddings": 200,
            },
            "m",
        )  # fmt: skip
        pool = KVPool(64, PAGE_BYTES, [(spec, "float32")], 8)
        control, counters = BelledRing(SharedRegion(1 << 16), Bell()), Counters(SharedRegion(REGION_BYTES))
        runner = Steps(seen)
        worker = CardWorker(
            runner, [HostedModel(0, None, pool.models["m"], runner, 0, 2)], [("kv", pool)], StepLimits(max_batch, 16), lanes,
            control, Told(seen), counters, 1e9,
        )  # fmt: skip
        for number, prompt, new in requests:
            control.push(encode(Submit(number, 0, tuple(range(prompt)), new, ())))
        thread = threading.Thread(target=worker.run)
        thread.start()
        wanted, began = sum(new for _, _, new in requests), time.monotonic()
        while sum(len(items) for what, items in tuple(seen) if what == "told") < wanted:
            assert time.monotonic() - began < 20
            time.sleep(0.001)
        control.push(encode(Stop()))
        thread.join(20)
        assert not thread.is_alive()
        assert pool.lender.lent_pages == 0
        pool.close()
        return seen, counters.read()

    return run


def test_the_next_step_is_launched_before_the_last_one_is_told(serve):
    seen, counted = serve([(7, 4, 4)])
    order = [(what, items) for what, items in seen if what in ("launch", "told")]
    token = [("told", ((7, 5, False),)), ("told", ((7, 5, True),))]
    launch = ("launch", (7,))
    assert order == [launch, launch, token[0], launch, token[0], launch, token[0], token[1]]
    assert counted["steps"] == 4


def test_whoever_is_told_of_an_end_has_been_told_that_its_pages_are_free(serve):
    seen, _ = serve([(7, 4, 2)])
    end = seen.index(("told", ((7, 5, True),)))
    what, pages = seen[end - 1]
    assert what == "pages" and not any(count for _, by_model in pages for count in by_model.values())


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_every_request_gets_its_tokens_and_ends_once(serve, lanes):
    requests = [(number, 3 + 7 * number, 2 + number) for number in range(7)]
    seen, _ = serve(requests, lanes)
    told = [item for what, items in seen if what == "told" for item in items]
    for number, _, new in requests:
        assert [last for request, _, last in told if request == number] == [False] * (new - 1) + [True]
