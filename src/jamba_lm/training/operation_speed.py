"""How fast this machine carries out the operations of a training pass, measured one at a time.

Every operation is timed at the size that the pass has it in, forward and backward, by our own
kernels and torch; a prediction then adds them up as often as the pass does them. Knows operations,
and no model.

M rows, D width, C Mamba channels, N state size, W convolution taps, H query heads, G key/value
heads, P head width, X experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from jamba_lm.analysis.machine import peak_memory
from jamba_lm.analysis.machine_speed import product_speed
from jamba_lm.analysis.memory import GIB
from jamba_lm.analysis.training_cost.devices import Assumption
from jamba_lm.analysis.training_cost.exchanges import Exchange
from jamba_lm.analysis.training_cost.operations import Operation
from jamba_lm.config import JambaConfig
from jamba_lm.errors import InputError
from jamba_lm.kernels import ops
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.initialization import initialize
from jamba_lm.training.loss import summed_losses
from jamba_lm.training.optimizer import MasterAdamW
from jamba_lm.training.recipe import OptimizerSection

# Each operation is tried for this long, and at least this often; the best try counts.
SECONDS_EACH, FEWEST_TRIES = 0.08, 3
# A decoder whose optimizer does not fit into any cache: seconds a value are then those of memory.
OPTIMIZER_SAMPLE = JambaConfig(
    vocab_size=4096,
    d_model=512,
    d_ff=1024,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    num_experts=4,
)
# Rows of a product are then many enough, and what a pass keeps leaves the caches in any case.
LARGEST_PASS = 2048
DTYPES = {2: torch.bfloat16, 4: torch.float32}

Forward = Callable[[], Tensor]


class MeasuredMachine:
    """This machine, as `analysis.training_cost.step` asks it.

    Times are processor seconds divided by the number of workers, so that what else runs here counts
    as little as it can.
    """

    def __init__(self, workers: int = 1) -> None:
        """Measure with as many operations at the same time as training has workers.

        Args:
            workers: threads that each compute alone, as `training.workers` does.
        """
        self._workers = workers
        self._pool = ThreadPoolExecutor(
            workers, "probe", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._known: dict[tuple[str, tuple[int, ...], int], tuple[float, float]] = {}
        self._optimizer: dict[int, float] = {}
        self._peak: float | None = None
        self._reserve = peak_memory()

    @property
    def workers(self) -> int:
        """Passes at the same time, each on a core of its own."""
        return self._workers

    @property
    def largest_pass(self) -> int:
        """Tokens in one pass, beyond which nothing is gained by more."""
        return LARGEST_PASS

    @property
    def node_size(self) -> int:
        """This machine, which is one."""
        return 1

    @property
    def others_share(self) -> float:
        """Nothing is added: reading text, validation and saving are not part of a step."""
        return 0.0

    @property
    def reserve_bytes(self) -> int:
        """Bytes that Python and torch took before anything was measured."""
        return self._reserve

    def assumptions(self) -> Iterator[tuple[str, Assumption]]:
        """Yield what a prediction rests on, by name."""
        product = "[512, 2048] x [2048, 2048], bfloat16"
        yield "product_flops", _found(self.peak_flops, "FLOP/s", product)
        yield "operations", _found(len(self._known), "sizes", "with gradients, the best of tries")
        for width, seconds in self._optimizer.items():
            yield "optimizer", _found(1e9 * seconds, "ns/value", f"AdamW, weights of {width} bytes")
        yield "reserve", _found(self._reserve / GIB, "GiB", "Python and torch before training")

    @property
    def peak_flops(self) -> float:
        """Operations a second of a large bfloat16 product on one core, times the workers."""
        if self._peak is None:
            self._peak = self._workers * self._pool.submit(product_speed, torch.bfloat16).result()
        return self._peak

    def seconds(self, one: Operation, width: int) -> tuple[float, float]:
        """Return what an operation takes forward and backward, all repetitions together."""
        key = one.kind, one.sizes, width
        if key not in self._known:
            self._known[key] = self._probe(one, DTYPES[width])
        forward, backward = self._known[key]
        return one.count * forward, one.count * backward

    def optimizer_seconds(self, values: int, width: int) -> float:
        """Return what collecting gradients and a step of AdamW take, from a smaller decoder's."""
        if width not in self._optimizer:
            self._optimizer[width] = self._optimizer_sample(DTYPES[width])
        return values * self._optimizer[width]

    def exchange_seconds(self, one: Exchange) -> float:
        """Refuse: workers share memory, and have nothing to send.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"{one.purpose} would be sent among {one.group.size} ranks, and this machine is one: "
            "its workers share its memory; plan without --this-machine for a mesh"
        )

    def _probe(self, one: Operation, dtype: torch.dtype) -> tuple[float, float]:
        """Time an operation in all workers at the same time."""
        makers = [_PROBES[one.kind](one.sizes, dtype) for _ in range(self._workers)]
        forward = backward = float("inf")
        spent, tries = 0.0, 0
        while tries < FEWEST_TRIES or spent < SECONDS_EACH:
            started = time.process_time()
            outputs = list(self._pool.map(lambda make: make(), makers))
            there = (time.process_time() - started) / self._workers
            slopes = [torch.ones_like(y) for y in outputs]
            started = time.process_time()
            if outputs[0].requires_grad:
                list(self._pool.map(torch.autograd.backward, outputs, slopes))
            back = (time.process_time() - started) / self._workers
            if tries:
                # The first try finds nothing warm.
                forward, backward = min(forward, there), min(backward, back)
            spent, tries = spent + there + back, tries + 1
        return forward, backward

    def _optimizer_sample(self, dtype: torch.dtype) -> float:
        with torch.device("meta"):
            decoders = [Decoder(OPTIMIZER_SAMPLE) for _ in range(self._workers)]
        for decoder in decoders:
            initialize(decoder, 0)
        optimizer = MasterAdamW(decoders[0], OptimizerSection())
        for decoder in decoders:
            decoder.to(dtype)
        optimizer.share_out(decoders[1:], lambda work, items: list(self._pool.map(work, items)))
        best = float("inf")
        for _ in range(FEWEST_TRIES):
            for decoder in decoders:
                for one in decoder.parameters():
                    one.grad = torch.full_like(one, 1e-3)
            started = time.process_time()
            optimizer.collect(self._workers)
            optimizer.gradient_norms()
            optimizer.step(1e-5, 1.0)
            best = min(best, (time.process_time() - started) / self._workers)
        return best / sum(one.numel() for one in decoders[0].parameters())


def _found(value: float, unit: str, how: str) -> Assumption:
    return Assumption(value, unit, "measured", f"this machine, now: {how}")


def _leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).mul_(0.1).to(dtype).requires_grad_()


def _product(sizes: Sequence[int], dtype: torch.dtype) -> Forward:
    rows, inputs, outputs = sizes
    x_MI, weight_OI = _leaf(rows, inputs, dtype=dtype), _leaf(outputs, inputs, dtype=dtype)

    def run() -> Tensor:
        x_MI.grad = weight_OI.grad = None
        return F.linear(x_MI, weight_OI)

    return run


def _attention(sizes: Sequence[int], dtype: torch.dtype) -> Forward:
    queries, past, heads, groups, width = sizes
    q_THP = _leaf(queries, heads, width, dtype=dtype)
    k_SGP, v_SGP = (_leaf(past + queries, groups, width, dtype=dtype) for _ in "kv")
    offsets = torch.tensor([0, queries])

    def run() -> Tensor:
        q_THP.grad = k_SGP.grad = v_SGP.grad = None
        return ops.attention(q_THP, [[k_SGP]], [[v_SGP]], offsets, width**-0.5)

    return run


def _scan(sizes: Sequence[int], dtype: torch.dtype) -> Forward:
    rows, channels, states = sizes
    u_MC, dt_MC = (_leaf(rows, channels, dtype=dtype) for _ in range(2))
    B_MN, C_MN = (_leaf(rows, states, dtype=dtype) for _ in range(2))
    bias_C = _leaf(channels, dtype=dtype)
    skip_C = _leaf(channels, dtype=torch.float32)
    log_CN = torch.arange(1.0, states + 1).log().repeat(channels, 1).requires_grad_()
    offsets = torch.tensor([0, rows])
    leaves = (u_MC, dt_MC, B_MN, C_MN, bias_C, skip_C, log_CN)

    def run() -> Tensor:
        for one in leaves:
            one.grad = None
        A_CN = -log_CN.exp()
        y_MC, _ = ops.selective_scan(u_MC, dt_MC, bias_C, A_CN, B_MN, C_MN, skip_C, offsets)
        return y_MC

    return run


def _convolution(sizes: Sequence[int], dtype: torch.dtype) -> Forward:
    rows, channels, taps = sizes
    # The left half of in_proj's result.
    both_MC = _leaf(rows, 2 * channels, dtype=dtype)
    weight_CW, bias_C = _leaf(channels, taps, dtype=dtype), _leaf(channels, dtype=dtype)
    offsets = torch.tensor([0, rows])
    x_MC = both_MC.detach()[:, :channels].requires_grad_()

    def run() -> Tensor:
        x_MC.grad = weight_CW.grad = bias_C.grad = None
        y_MC, _ = ops.causal_conv(x_MC, weight_CW, bias_C, offsets, silu=True)
        return y_MC

    return run


def _norm(sizes: Sequence[int], dtype: torch.dtype) -> Forward:
    x_MD, weight_D = _leaf(*sizes, dtype=dtype), _leaf(sizes[1], dtype=dtype)

    def run() -> Tensor:
        x_MD.grad = weight_D.grad = None
        return ops.rms_norm(x_MD, weight_D, 1e-6)

    return run


def _gate(sizes: Sequence[int], dtype: torch.dtype) -> Forward:
    x_MD, gate_MD = (_leaf(*sizes, dtype=dtype) for _ in range(2))

    def run() -> Tensor:
        x_MD.grad = gate_MD.grad = None
        return ops.silu_gate(x_MD, gate_MD)

    return run


def _move(sizes: Sequence[int], dtype: torch.dtype) -> Forward:
    x_MD, y_MD = (_leaf(*sizes, dtype=dtype) for _ in range(2))

    def run() -> Tensor:
        # The gradient that is there has another added to it, as where a stream branches.
        if x_MD.grad is None:
            x_MD.grad = torch.zeros_like(x_MD)
        y_MD.grad = None
        return x_MD + y_MD

    return run


def _route(sizes: Sequence[int], dtype: torch.dtype) -> Forward:
    rows, width, experts, taken = sizes
    x_MD, logits_MX = _leaf(rows, width, dtype=dtype), _leaf(rows, experts, dtype=dtype)

    def run() -> Tensor:
        # What model/moe.py does beside the products of router and experts.
        x_MD.grad = logits_MX.grad = None
        weight_MK, expert_MK = logits_MX.float().softmax(-1).topk(taken, dim=-1)
        order_E = expert_MK.flatten().argsort(stable=True)
        shares = torch.bincount(expert_MK.flatten(), minlength=experts).tolist()
        parts = [
            x_MD.index_select(0, rows_E)
            for rows_E in (order_E // taken).split(shares)
            if len(rows_E)
        ]
        out_MKD = torch.cat(parts).index_select(0, order_E.argsort()).unflatten(0, (-1, taken))
        return (out_MKD * weight_MK[..., None].to(dtype)).sum(1)

    return run


def _lookup(sizes: Sequence[int], dtype: torch.dtype) -> Forward:
    rows, width, vocab = sizes
    weight_VD, ids_M = _leaf(vocab, width, dtype=dtype), torch.randint(0, vocab, (rows,))

    def run() -> Tensor:
        weight_VD.grad = None
        return F.embedding(ids_M, weight_VD)

    return run


def _loss(sizes: Sequence[int], dtype: torch.dtype) -> Forward:
    rows, width, vocab = sizes
    hidden_MD, weight_VD = _leaf(rows, width, dtype=dtype), _leaf(vocab, width, dtype=dtype)
    targets_M = torch.randint(0, vocab, (rows,))

    def run() -> Tensor:
        hidden_MD.grad = weight_VD.grad = None
        return summed_losses(hidden_MD, weight_VD, targets_M).total

    return run


_PROBES = {
    "product": _product,
    "attention": _attention,
    "scan": _scan,
    "convolution": _convolution,
    "norm": _norm,
    "gate": _gate,
    "move": _move,
    "route": _route,
    "lookup": _lookup,
    "loss": _loss,
}
