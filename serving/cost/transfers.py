"""What moving and mapping cost: boundary crossings and their control, host copies, weight loading, pages, launches.

Closed forms over :class:`~serving.cost.hardware.Hardware`, whose `sources` say where each number comes from.
"""

from __future__ import annotations

from dataclasses import dataclass

from serving.cost.hardware import Hardware

LOAD_SHARE = 0.8  # of the host link that streaming weights reaches (the swap baseline's requirement)


@dataclass(frozen=True)
class Crossing:
    """One hand-off of hidden rows between the pools, split into what overlaps with compute and what does not."""

    latency_s: float  # until the other side may start, the bytes' flight included
    host_s: float  # of that, time a host spends on control (a relaying host serves one step at a time)


def crossing(hardware: Hardware, message_bytes: float, lowered: bool, same_node: bool = True) -> Crossing:
    """One boundary crossing. `lowered`: both sides find each other; otherwise a third party relays every step."""
    if same_node:
        flight = message_bytes / hardware.peer_bandwidth
    else:
        flight = hardware.network_latency_s + message_bytes / hardware.network_bandwidth
    if lowered:
        return Crossing(hardware.crossing_lowered_s + flight, 0.0)
    host = hardware.relay_s + hardware.launch_eager_s
    return Crossing(hardware.crossing_eager_s + flight + host, host)


def shared_memory_exchange_s(hardware: Hardware, message_bytes: float, ranks: int) -> float:
    """Ranks on cores of one host post a message each and read everyone's: a hand-off, one write and `ranks` reads."""
    if ranks == 1:
        return 0.0
    return hardware.crossing_lowered_s + (ranks + 1) * message_bytes / hardware.peer_bandwidth


def host_copy_s(hardware: Hardware, copied_bytes: float) -> float:
    """A copy between host and device memory, either way, pinned."""
    return hardware.host_latency_s + copied_bytes / hardware.host_bandwidth


def weight_load_s(hardware: Hardware, weight_bytes: float, pieces: int = 1, share: float = LOAD_SHARE) -> float:
    """Weights of a model streamed from the host cache in `pieces` (layers), at `share` of the link."""
    return pieces * hardware.host_latency_s + weight_bytes / (share * hardware.host_bandwidth)


def page_map_s(hardware: Hardware, pages: int, created: bool = True) -> float:
    """Mapping `pages` pages: made ready by the driver's set-access call, and created first unless they wait in a pool."""
    each = hardware.page_map_s + hardware.page_access_s + (0.0 if created else hardware.page_create_s)
    return pages * each


def page_unmap_s(hardware: Hardware, pages: int) -> float:
    """Unmapping `pages` pages; synchronous on CUDA."""
    return pages * hardware.page_unmap_s


def launched_s(hardware: Hardware, device_s: float, kernels: int, graph: bool) -> float:
    """A stage of `kernels` kernels that takes the device `device_s`: in a graph one launch ahead of it, eager a launch each.

    Measured kernel times hold the gap between dependent kernels, so a graph adds nothing within the stage. Eager launches
    overlap with the device until they become the slower of the two.
    """
    if graph:
        return hardware.launch_graph_s + device_s
    return max(device_s, kernels * hardware.launch_eager_s)
