"""The host store between clients, each with a view of its own, as workers have."""

import dataclasses
import os
import time

import pytest
from served import served

from serving.residency.image import image_bytes
from serving.residency.store import HostStore, StoreClient

pytestmark = pytest.mark.cpu


def client(store, models):
    return StoreClient(dataclasses.replace(store.ref, directory_fd=os.dup(store.ref.directory_fd)), models)


def test_who_wants_an_image_that_another_is_to_read_waits_for_it_and_reads_nothing(tiny_checkpoints):
    models = served(tiny_checkpoints, ["mixtral", "qwen3_moe"])
    store = HostStore(sum(map(image_bytes, models)), "lru")
    store.promise(dict(enumerate(models)))
    early, late = client(store, models), client(store, models)
    early.prime([0])
    wants = os.fork()  # the directory's lock is a process's
    if not wants:
        read_ns = None
        try:
            _, read_ns = early.acquire(1)
        finally:
            os._exit(0 if read_ns == 0 else 1)
    time.sleep(0.05)
    assert os.waitpid(wants, os.WNOHANG) == (0, 0)
    late.prime([0, 1])  # 0 is there already
    assert os.waitpid(wants, 0) == (wants, 0)
    assert late.held() == {0, 1} and late.acquire(0)[1] == 0
    for one in (early, late, store):
        one.close()


def test_more_than_there_is_room_for_cannot_be_promised(tiny_checkpoints):
    models = served(tiny_checkpoints, ["mixtral", "qwen3_moe"])
    store = HostStore(image_bytes(models[0]), "lru")
    with pytest.raises(ValueError, match="no room for the image of"):
        store.promise(dict(enumerate(models)))
    store.close()
