"""What the host has left: the least of what the kernel and a container's control group say."""

import pytest

from serving.errors import CapacityError
from serving.memory import host

pytestmark = pytest.mark.cpu

KERNEL = "MemTotal:       9000 kB\nMemFree:        1000 kB\nMemAvailable:   5000 kB\n"


def machine(tmp_path, **files):
    for name, content in {"proc/meminfo": KERNEL, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


def version_2(limit):
    return {
        "sys/fs/cgroup/memory.max": limit,
        "sys/fs/cgroup/memory.current": "700000\n",
        "sys/fs/cgroup/memory.stat": "anon 400000\nactive_file 100000\ninactive_file 200000\n",
    }


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 5000 << 10),
        (version_2("1000000\n"), 1000000 - 400000),
        (version_2("max\n"), 5000 << 10),
        (version_2("300000\n"), 0),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "4096\n",
                "sys/fs/cgroup/memory/memory.stat": "cache 0\n",
            },
            5000 << 10,
        ),
    ],
    ids=["kernel", "group", "no-limit", "full", "version-1-without-limit"],
)
def test_the_least_of_what_kernel_and_group_leave(files, available, tmp_path):
    assert host.available_bytes(machine(tmp_path, **files)) == available


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(host, "available_bytes", lambda: 3 << 20)
    host.require_available("copies", 3 << 20)
    with pytest.raises(
        CapacityError, match=r"copies need 4.0 MiB of host memory and 3.0 MiB are available; 1048576 bytes"
    ):
        host.require_available("copies", 4 << 20)


def test_this_machine_has_some():
    assert host.available_bytes() > 0


@pytest.mark.parametrize(
    ("files", "setting"),
    [
        ({"sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n"}, "madvise"),
        ({"sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n"}, "never"),
        ({}, "never"),
    ],
)
def test_the_setting_of_huge_pages_is_the_one_in_brackets(tmp_path, files, setting):
    assert host.huge_pages(machine(tmp_path, **files)) == setting
