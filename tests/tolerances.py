"""How far from its definition a result may be: one table, with the reason for each entry.

`assert_within` compares the largest absolute difference with the largest absolute expected value
(the "scale"), so that a tolerance means the same for logits of any size.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Whole against pieces, batches and packs: largest difference over the scale.
ANY_SPLIT = {
    # Sums in another order, nothing else: a few float32 roundings (6e-8 each) through the layers.
    "fp32": 1e-5,
    # Gradients pass through more sums, of both signs.
    "gradient": 5e-5,
    # Activations are rounded to 8 bits of mantissa (4e-3 each) at every layer.
    "bf16": 3e-2,
}

# Training in several processes against one: relative differences.
DISTRIBUTED = {
    # Gradients of the passes of a step are added in another order (6e-8 each); a few steps on, the
    # weights differ by the sum of that.
    "loss": 1e-5,
    # AdamW divides by the root of the second moment, which magnifies what is near zero.
    "weight": 1e-5,
}

# Probabilities of the next token against transformers' processors: both compute in float32.
SAMPLING = 1e-5

# A summed loss in pieces against one softmax over everything: float32 logits, sums in float64.
LOSS = 1e-5

# RMSNorm and the SiLU gate against float64: largest difference over the scale.
ROW_OPS = {
    # Sums of up to 512 float32 products, and an exp with an error of 3e-7.
    "fp32": 2e-6,
    # Inputs are the same; the result is rounded to 8 bits of mantissa once (4e-3) or, where the
    # norm rounds before the gain, twice.
    "bf16": 8e-3,
}


def assert_within(found: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Fail when `found` differs from `expected` by more than `tolerance` times its scale."""
    assert found.shape == expected.shape, f"{what} {found.shape} is not {expected.shape}"
    assert torch.isfinite(found).all(), f"{what} is not finite"
    found, expected = found.detach(), expected.detach()
    difference = float((found.float() - expected.float()).abs().max())
    scale = max(float(expected.float().abs().max()), 1e-30)
    assert difference <= tolerance * scale, (
        f"{what} differs by {difference / scale:.2e} of its scale, allowed {tolerance:.0e}"
    )


# A model read from a checkpoint against transformers' model of the same weights.
ORACLE = {
    # Same sums in another order through up to nine layers, with a prompt and 16 single steps.
    "fp32": 1e-4,
    # Our bfloat16 error over theirs, both against their float32: medians over the tokens of
    # several seeds. Measured 0.92 over 60 seeds; a median because now and then, here as often as
    # there, a rounding picks another expert and a token's error is ten times the others'.
    "bf16 noise ratio": 1.1,
}

# Training against float64 or torch's own optimizer: largest difference over the scale.
TRAINING = {
    # Sums over 40 logits in float32.
    "loss fp32": 1e-6,
    "loss gradient fp32": 1e-5,
    # Logits are rounded to 8 bits of mantissa once (4e-3), the gradients twice.
    "loss bf16": 1e-2,
    "loss gradient bf16": 2e-2,
    # Three steps of the same float32 formula, evaluated in another order.
    "adamw": 1e-5,
    # Sums over the same rows in another order, through four layers.
    "accumulated gradient": 2e-5,
    # The same formula, added on the way back instead of at the end.
    "penalty": 1e-5,
    # 200 additions of 1e-5 to float32 weights of up to 0.8: 200 roundings of up to 3e-8 in 2e-3.
    "many small steps": 1e-2,
}

# Several processes against one: largest difference over the scale.
PARALLEL = {
    # Sums over rows, channels and vocabulary in another order, through four layers.
    "gradient": 1e-5,
}

# The selective scan against its definition in float64: largest difference over the scale.
SCAN = {
    # Each step rounds a few times (6e-8 each) and its exp is within 1.6e-7; decay forgets both.
    "value": 2e-6,
    # Sums over up to 300 channels or tokens, of both signs, of products of such values.
    "gradient": 1e-5,
    # Recurrence and sums are in float32; what is stored as bfloat16 is rounded once (4e-3).
    "bf16": 4e-3,
    # The exp of the decay is within 6e-8 near one, over an effective memory of 10,000 tokens.
    "slow decay": 3e-4,
}

# The causal convolution against its definition in float64: largest difference over the scale.
CONV = {
    # Up to eight products, and for SiLU an exp within 3e-7.
    "fp32": 1e-6,
    # Gradients of the taps are sums over up to 200 rows.
    "gradient": 3e-6,
    # Inputs are the same; results are rounded to 8 bits of mantissa (4e-3) once, or twice where
    # autograd adds two bfloat16 gradients.
    "bf16": 8e-3,
}

# Attention against its definition in float64: largest difference over the scale.
ATTENTION = {
    # Softmax and sums over up to 300 positions.
    "fp32": 2e-6,
    "gradient": 5e-6,
    # torch's kernel rounds the weights to bfloat16 as well as the result.
    "bf16": 1.5e-2,
}

# The vector functions of native/vector_math.h, in float32, against numpy's in float64.
VECTOR_FUNCTIONS = {
    # Polynomial 5.3e-8 (AVX-512) or 1.0e-7, and two or three roundings of 3e-8 to 6e-8.
    "exp2 absolute": 1.6e-7,
    # The same of smaller values: a unit in the last place is up to 1.2e-7 of the value.
    "exp2 relative": 2.6e-7,
    # Where k is zero: half a unit below one (3e-8), and 1e-5 of the argument, at most 1/256.
    "exp2 near one": 7e-8,
    # A rounding of the reduced argument more.
    "exp relative": 3e-7,
    # log1p multiplies the error of exp by at most one and adds three roundings.
    "softplus relative": 4e-7,
    # A reciprocal by a Newton step, and a product.
    "sigmoid relative": 5e-7,
}

# Drafting, as pure arithmetic on a made-up clock.
DRAFTING = {
    # An estimate moves a tenth of the way at each call: after 60 of them, (1 - 0.1)^60 is left.
    "estimate": 0.01,
    # The account pays one hundredth of each call (INTEREST), and the credit it begins with and the
    # debt it is allowed are a handful of calls.
    "most lost": 1.03,
    "most lost at first": 6.0,
    # What drafting promises: free text at no less than this share of the speed without.
    "free text": 0.97,
}

# GGUF files read by both, against llama.cpp: largest difference over the scale of the logits.
LLAMA_CPP = {
    # Both in float32: sums in another order.
    "fp32": 1e-5,
    # llama.cpp rounds the inputs of every product to 8 bits of a block (4e-3 each), we do not.
    "quantised activations": 6e-2,
    # The same formula on the same bits; a few types multiply scales in another order.
    "decoded values": 1e-6,
}

# A model that went through a GGUF file and back.
GGUF_ROUND_TRIP = {
    # A_log is stored as -exp(A_log), rounded to float32: half a unit in the last place of the
    # exponential (6e-8) is an absolute error of the logarithm.
    "decay": 1.5e-7,
}

# A product with a packed matrix against float64 with the matrix that it stands for: largest
# difference over the scale.
PACKED_LINEAR = {
    # Sums of up to 2,048 float32 products of both signs.
    "fp32": 3e-6,
    # Inputs are the same; the result is rounded to 8 bits of mantissa once (4e-3).
    "bf16": 4e-3,
    # Native kernels round the inputs of few rows to 15 bits below the largest of their row: 1.5e-5
    # of it each, with either sign; the largest is a few times the typical one.
    "native fp32": 1e-4,
    # Of many rows, native code rounds the matrix to 8 bits of mantissa first.
    "native bf16": 8e-3,
}

# A quantised model's bits per byte on held-out text, above those of the model it was made from.
QUANTIZED_BITS_PER_BYTE = {
    # The project's promise. Measured: less than 0.01 % either way (docs/quantization.md).
    "experts-int8": 1e-3,
    "int8": 1e-3,
    # Experts do less than the rest does in 8 bits.
    "experts-int4": 1e-3,
    "experts-int4-32": 1e-3,
    # Likewise; measured 0.1 to 0.2 %.
    "int4": 1.5e-2,
    "int4-32": 1.5e-2,
}

# A native step against the modules: largest difference over the scale.
STEP = {
    # Sums in another order through up to six layers.
    "fp32": 1e-5,
    # The modules round every activation to 8 bits of mantissa (4e-3 each); the step does not.
    "bf16": 3e-2,
    # Inputs of packed matrices are rounded to 15 bits below the largest of their row.
    "packed": 1e-3,
}

# Of the sum of the magnitudes of all terms.
FEW_ROW_PRODUCTS = {
    "fp32": 1e-6,
    # A row is two bfloat16 numbers, 16 bits in all: 2^-17 of each term.
    "bf16": 8e-6,
    # A row is 15 bits below its largest value, which is a few times the typical one.
    "int8": 5e-5,
    "int4": 5e-5,
}

MANY_ROWS = {
    # Sums of a thousand products in another order than float64's.
    "torch.float32": 3e-6,
    # The result is rounded to 8 bits of mantissa.
    "torch.bfloat16": 4e-3,
    # So are the weights, before.
    "rounded": 6e-3,
}

PREFILL = {
    # Sums in another order through up to six layers, and through a thousand tokens of states: twice
    # as much as the modules of one instruction set differ from those of another.
    "fp32": 3e-5,
}

# The mean of independent agreements lies within four standard deviations of what is estimated, but
# for one time in sixteen thousand; the seeds are fixed.
MINHASH_DEVIATIONS = 4.0

# Fine-tuning: largest difference over the scale.
FINETUNING = {
    # An adapter inside its matrix or beside it: float32 sums in another order.
    "merged": 1e-5,
    # Gradients of a batch against those of its examples alone, through four layers.
    "packed": 5e-5,
    # A gradient through packed matrices against that through those that they stand for: the same
    # products, and sums in another order.
    "through packed, reference": 1e-4,
    # Native products round the inputs of few rows to 15 bits (1.5e-5), at every matrix of four
    # layers, and norms and gates between them enlarge it.
    "through packed, native": 3e-3,
}

# A pass in segments against the pass as a whole: largest difference over the scale.
SEGMENTS = {
    # Sums over rows in another order, through up to four layers.
    "fp32": 2e-5,
    "loss": 1e-5,
    # A gradient this much smaller than the largest is a difference of what cancels.
    "vanishing": 1e-5,
    # Every activation is rounded to 8 bits of mantissa (4e-3 each), in both.
    "bf16": 6e-2,
    # Three steps of AdamW, which divides small gradients by their own size.
    "run": 1e-3,
}
