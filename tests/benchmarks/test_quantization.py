"""What quantisation costs the embedded model on held-out text stays within the promise."""

from __future__ import annotations

import jamba_lm
from benchmarks.quantization import SAMPLE, HeldOut, by_scheme
from tests.tolerances import QUANTIZED_BITS_PER_BYTE


def test_the_promised_bits_per_byte_are_kept_at_fewer_bytes():
    folder = jamba_lm.embedded_model_path()
    plain, *packed = by_scheme(HeldOut(folder, SAMPLE, 4000), folder, None)
    assert {one.name for one in packed} == set(QUANTIZED_BITS_PER_BYTE)
    for one in packed:
        allowed = 1 + QUANTIZED_BITS_PER_BYTE[one.name]
        assert one.bits_per_byte < plain.bits_per_byte * allowed, one.name
        assert one.num_bytes < plain.num_bytes
        assert one.divergence > 0
