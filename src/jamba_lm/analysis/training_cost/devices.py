"""How fast a device and its network are: every number with where it is from, and what follows.

Needs no torch. "data sheet" is what the maker says, "measured" what one such device did in a probe
of this project, "chosen" a guess that nobody here could check. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from jamba_lm.analysis.memory import GIB
from jamba_lm.analysis.training_cost.activations import LOGIT_ROWS
from jamba_lm.analysis.training_cost.exchanges import Exchange
from jamba_lm.analysis.training_cost.operations import Operation, flops_of
from jamba_lm.config_json import closest, shown
from jamba_lm.errors import InputError

LARGEST_PASS = 2**20

Origin = Literal["data sheet", "measured", "chosen"]


@dataclass(frozen=True, slots=True)
class Assumption:
    """A number that a prediction rests on.

    Attributes:
        value: in `unit`.
        unit: for a person.
        origin: how it is known.
        source: where it is from.
    """

    value: float
    unit: str
    origin: Origin
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A kind of device, and the network between many of them.

    Attributes:
        product_flops: of large bfloat16 products without sparsity, a second.
        product_share: of that reached by products that go on for seconds.
        half_size: smallest side of a product that reaches half of that.
        attention_share: of `product_flops` reached by attention, forward.
        attention_backward_share: likewise with gradients.
        memory_bytes: read or written a second.
        memory_share: of that reached by operations on rows.
        scan_updates: state updates of the scan a second, forward.
        scan_backward: how many times as long its gradients take.
        node: devices with fast links among each other.
        link_bytes: each way between devices of a node, a second.
        network_bytes: each way between a device and other nodes, a second.
        link_share: of `link_bytes` reached.
        network_share: of `network_bytes` reached.
        link_latency: seconds that an exchange within a node takes at least.
        network_latency: likewise between nodes.
        imbalance: rows of the fullest expert rank, over the mean.
        others: share of the time that nothing here accounts for.
        reserve: GiB of the device's memory that a program cannot use.
    """

    product_flops: Assumption
    product_share: Assumption
    half_size: Assumption
    attention_share: Assumption
    attention_backward_share: Assumption
    memory_bytes: Assumption
    memory_share: Assumption
    scan_updates: Assumption
    scan_backward: Assumption
    node: Assumption
    link_bytes: Assumption
    network_bytes: Assumption
    link_share: Assumption
    network_share: Assumption
    link_latency: Assumption
    network_latency: Assumption
    imbalance: Assumption
    others: Assumption
    reserve: Assumption

    @property
    def workers(self) -> int:
        """Passes at the same time: one is all that a device needs."""
        return 1

    @property
    def largest_pass(self) -> int:
        """Tokens in one pass, beyond which nothing is gained by more."""
        return LARGEST_PASS

    @property
    def node_size(self) -> int:
        """Devices with fast links among each other."""
        return int(self.node.value)

    @property
    def others_share(self) -> float:
        """Share of the time that nothing here accounts for."""
        return self.others.value

    @property
    def reserve_bytes(self) -> int:
        """Bytes of a device that a program cannot use."""
        return int(self.reserve.value * GIB)

    @property
    def peak_flops(self) -> float:
        """What a share of the peak is a share of."""
        return self.product_flops.value

    def seconds(self, one: Operation, width: int) -> tuple[float, float]:
        """Return what an operation takes forward and backward, all its repetitions together."""
        flops = flops_of(one)
        forward_bytes, backward_bytes = moved_bytes(one, width)
        moved = self.memory_bytes.value * self.memory_share.value
        forward, backward = one.count * forward_bytes / moved, one.count * backward_bytes / moved
        peak = self.product_flops.value
        if one.kind == "product":
            rate = peak * self.product_share.value * self._fullness(min(one.sizes))
            spread = self.imbalance.value if one.part == "experts" else 1.0
            forward = max(forward, spread * flops.forward / rate)
            backward = max(backward, spread * flops.backward / rate)
        elif one.kind == "loss":
            rate = peak * self.product_share.value * self._fullness(min(one.sizes))
            forward, backward = forward + flops.needed / rate, backward
        elif one.kind == "attention":
            forward = max(forward, flops.forward / (peak * self.attention_share.value))
            again = flops.backward + flops.again
            backward = max(backward, again / (peak * self.attention_backward_share.value))
        elif one.kind == "scan":
            rows, channels, states = one.sizes
            alone = one.count * rows * channels * states / self.scan_updates.value
            forward = max(forward, alone)
            backward = max(backward, self.scan_backward.value * alone)
        return forward, backward

    def _fullness(self, smallest: int) -> float:
        return smallest / (smallest + self.half_size.value)

    def optimizer_seconds(self, values: int, width: int) -> float:
        """Return what a step of AdamW takes: every array read and most of them written once."""
        # The norm reads gradients; the step reads and writes weights and moments, and rounds.
        num_bytes = values * (4 + 4 + 3 * 8 + width)
        return num_bytes / (self.memory_bytes.value * self.memory_share.value)

    def exchange_seconds(self, one: Exchange) -> float:
        """Return what an exchange takes, all its repetitions together, when nothing disturbs it.

        Within a node data goes over its links; between nodes the members in one node share their
        network cards. Whichever takes longer counts.
        """
        node = int(self.node.value)
        size, near = one.group.size, one.group.in_a_node(node)
        link = self.link_bytes.value * self.link_share.value
        network = self.network_bytes.value * self.network_share.value
        far = size > near
        latency = self.network_latency.value if far else self.link_latency.value
        if one.pattern == "send":
            return one.count * (one.num_bytes / (network if far else link) + latency)
        if one.pattern == "all-to-all":
            over_links = one.num_bytes * (near - 1) / size / link
            over_network = one.num_bytes * (size - near) / size / network
            return one.count * (max(over_links, over_network) + latency)
        times = 2 if one.pattern == "all-reduce" else 1
        over_links = one.num_bytes * (size - 1) / size / link if near > 1 else 0.0
        nodes = size / near
        over_network = one.num_bytes * (nodes - 1) / nodes / (near * network)
        return one.count * (times * max(over_links, over_network) + latency)

    def assumptions(self) -> Iterator[tuple[str, Assumption]]:
        """Yield every number with its name."""
        for name in self.__slots__:
            yield name, getattr(self, name)


def moved_bytes(one: Operation, width: int) -> tuple[float, float]:
    """Return the bytes that one repetition reads and writes, forward and backward."""
    if one.kind == "product":
        rows, inputs, outputs = one.sizes
        once = (rows * inputs + inputs * outputs + rows * outputs) * width
        return once, 2 * once
    if one.kind == "attention":
        queries, past, heads, groups, head = one.sizes
        once = (2 * queries * heads + 2 * (queries + past) * groups) * head * width
        return once, 2 * once
    if one.kind == "scan":
        rows, channels, states = one.sizes
        points = rows / 16 * channels * states * 4
        return 3 * rows * channels * width + points, 5 * rows * channels * width + points
    if one.kind == "route":
        rows, model, experts, taken = one.sizes
        # Rows are gathered, put end to end, brought back in order, weighed and summed.
        once = rows * (8 * taken * model * width + model * width + 6 * experts * 4)
        return once, once
    if one.kind == "lookup":
        rows, model, vocab = one.sizes
        return 2 * rows * model * width, (2 * rows * model + 2 * vocab * model) * width
    if one.kind == "loss":
        rows, model, vocab = one.sizes
        # The softmax goes over its logits seven times in float32; the head's gradient is summed
        # in float32 once for each piece of rows.
        pieces = -(-rows // LOGIT_ROWS)
        return 7 * rows * vocab * 4 + pieces * 3 * vocab * model * 4, 3 * vocab * model * 4
    rows, columns = one.sizes[:2]
    forward, backward = {
        "convolution": (2, 3),
        "norm": (2, 3),
        "gate": (3, 5),
        "move": (3, 3),
    }[one.kind]
    return forward * rows * columns * width, backward * rows * columns * width


_SHEET = "NVIDIA, H100 Tensor Core GPU data sheet, SXM5"
_PROBE = "one H100 80GB HBM3 at 700 W, torch 2.11, CUDA 13"
_NETWORK = "NVIDIA, DGX H100: eight ConnectX-7 of 400 Gbit/s for eight GPUs"

DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "h100": Device(
            product_flops=Assumption(
                989.4e12, "FLOP/s", "data sheet", f"{_SHEET}, without sparsity"
            ),
            product_share=Assumption(
                0.71, "", "measured", f"{_PROBE}: [8192, 4096] x [4096, 14336] for 15 s, 686 T"
            ),
            half_size=Assumption(
                120, "rows", "measured", f"{_PROBE}: 256 to 8192 rows, 68 to 100 % of the most"
            ),
            attention_share=Assumption(
                0.62, "", "measured", f"{_PROBE}: causal, 32 heads of 128, 4K to 32K: 546 to 645 T"
            ),
            attention_backward_share=Assumption(
                0.52, "", "measured", f"{_PROBE}: the same with gradients, 446 to 559 T"
            ),
            memory_bytes=Assumption(3.35e12, "bytes/s", "data sheet", _SHEET),
            memory_share=Assumption(
                0.80, "", "measured", f"{_PROBE}: copies 0.91, AdamW 0.80; the lower one"
            ),
            scan_updates=Assumption(
                1.1e12, "1/s", "chosen", "30 % of 132 x 16 exponentials a cycle at 1.75 GHz"
            ),
            scan_backward=Assumption(3.0, "", "chosen", "states again, and their gradients"),
            node=Assumption(8, "GPUs", "data sheet", "NVIDIA, DGX H100"),
            link_bytes=Assumption(450e9, "bytes/s", "data sheet", f"{_SHEET}: 900 GB/s both ways"),
            network_bytes=Assumption(50e9, "bytes/s", "data sheet", _NETWORK),
            link_share=Assumption(0.75, "", "chosen", "no machine with links was at hand"),
            network_share=Assumption(0.75, "", "chosen", "no cluster was at hand"),
            link_latency=Assumption(10e-6, "s", "chosen", "no machine with links was at hand"),
            network_latency=Assumption(30e-6, "s", "chosen", "no cluster was at hand"),
            imbalance=Assumption(1.15, "", "chosen", "the balance loss is not zero"),
            others=Assumption(0.08, "", "chosen", "stragglers, launches, input, saving"),
            reserve=Assumption(6, "GiB", "chosen", "CUDA and NCCL, and fragments"),
        ),
    }
)


def device_named(name: str) -> Device:
    """Return the device called `name`.

    Raises:
        InputError: none is known.
    """
    if name not in DEVICES:
        raise InputError(
            f"no device {shown(name)} among {', '.join(DEVICES)}{closest(name, DEVICES)}; "
            "--this-machine measures the processor here"
        )
    return DEVICES[name]
