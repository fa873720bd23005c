"""A checkpoint read without torch says, bit for bit, what the same checkpoint says with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jamba_lm.checkpoint.huggingface import write_decoder
from jamba_lm.config import JambaConfig
from jamba_lm.errors import InputError
from jamba_lm.generation import generate
from jamba_lm.kernels.native_layers import Floats
from jamba_lm.kernels.native_step import STEP_ROWS
from jamba_lm.language_model import load
from jamba_lm.native_model import NativeModel, load_native, open_native
from jamba_lm.native_plan import NativePlan
from jamba_lm.presets import embedded_model_path
from jamba_lm.quantization.policy import all_schemes
from jamba_lm.quantization.rewrite import quantize_decoder
from jamba_lm.readable_model import ReadableModel
from jamba_lm.sampling import Sampling
from jamba_lm.stepper import Stepper
from jamba_lm.tensor_file import TensorFile, write_tensors
from tests.arms import ARMS, SMALL, random_ids, shaken_model

PLANNED = [arm for arm, config in ARMS.items() if config.position == "none"]
WIDE = SMALL.replace(d_model=64, d_ff=128, d_head=16, dt_rank=4)
WEIGHTS = "model.safetensors"


def logits_of(model: ReadableModel, ids: list[list[int]]) -> Floats:
    return np.asarray(model.next_logits(ids))


def saved(folder: Path, config: JambaConfig = SMALL, dtype: str = "bf16") -> Path:
    shaken_model(config, dtype=dtype).save(folder)
    return folder


def opened(folder: Path) -> NativeModel:
    found = open_native(folder)
    assert isinstance(found, NativeModel), found
    return found


def assert_same_logits(folder: Path) -> None:
    """Read prompts in pieces, long and short, several at once, and compare every logit."""
    ours, theirs = opened(folder), load(folder)
    vocab = ours.config
    assert (ours.type_name, ours.scheme) == (theirs.type_name, theirs.scheme)
    assert ours.weight_bytes == theirs.weight_bytes
    mine, other = ([model.new_state() for _ in "abc"] for model in (ours, theirs))
    for turn, lengths in enumerate([(70, 3, 20), (1, 1, 1), (2, 5, 1), (STEP_ROWS, 30, 1)]):
        ids = [random_ids(vocab, length, seed=turn + length) for length in lengths]
        counts = [min(length, 3) for length in lengths]
        found = ours.last_logits(ids, counts, mine)
        expected = theirs.last_logits(ids, counts, other)
        for one, two in zip(found, expected, strict=True):
            assert np.array_equal(one, two.numpy()), f"turn {turn}"
    found_BV = ours.next_logits(ids, mine)
    assert np.array_equal(found_BV, theirs.next_logits(ids, other).numpy())
    assert [state.ids for state in mine] == [state.ids for state in other]
    assert [state.num_bytes for state in mine] == [state.num_bytes for state in other]
    for state, expected_state in zip(mine, other, strict=True):
        like = theirs.new_state()
        like.read_arrays(state)
        for layer, wanted in zip(like.layers, expected_state.layers, strict=True):
            for name, tensor in wanted.tensors().items():
                assert torch.equal(layer.tensors()[name], tensor), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("arm", PLANNED)
def test_it_says_what_the_model_with_torch_says(arm: str, dtype: str, tmp_path: Path):
    assert_same_logits(saved(tmp_path / "model", ARMS[arm], dtype))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("scheme", all_schemes(), ids=lambda scheme: scheme.label)
def test_a_quantised_one_as_well(scheme, dtype: str, tied: bool, tmp_path: Path):
    model = shaken_model(WIDE.replace(tie_embeddings=tied, proj_bias=True), dtype=dtype)
    quantize_decoder(model.decoder, scheme)
    model.save(tmp_path / "model")
    assert_same_logits(tmp_path / "model")


def test_shards_are_read_too(tmp_path: Path):
    model = shaken_model(SMALL, dtype="bf16")
    write_decoder(tmp_path / "model", SMALL, model.decoder, shard_bytes=20_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    assert_same_logits(tmp_path / "model")


@pytest.mark.parametrize("draft", [None, "lookup"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_writes_the_same_text(draft: str | None, temperature: float, tmp_path: Path):
    folder = saved(tmp_path / "model")
    sampling = Sampling(temperature=temperature, seed=5)
    prompt = random_ids(SMALL, 40)
    found, expected = (
        [
            (token.id, token.logprob)
            for token in generate(
                model, prompt, max_new_tokens=60, sampling=sampling, draft=draft, num_logprobs=1
            )
        ]
        for model in (opened(folder), load(folder))
    )
    assert found == expected


def test_a_state_can_be_forked_and_taken_back(tmp_path: Path):
    model = opened(saved(tmp_path / "model"))
    state = model.new_state()
    model.next_logits([random_ids(SMALL, 70)], [state])
    point, fork = state.snapshot(), state.fork()
    first = model.next_logits([[1, 2, 3]], [state])
    model.next_logits([[9, 9]], [fork])
    state.rewind(point)
    assert state.num_tokens == 70
    assert np.array_equal(model.next_logits([[1, 2, 3]], [state]), first)
    assert np.array_equal(model.next_logits([[1, 2, 3]], [point._state.fork()]), first)


def test_what_was_taken_over_in_tensors_is_not_written_again(tmp_path: Path):
    """A loop writes the memory of Mamba layers again, unless somebody else has it."""
    folder = saved(tmp_path / "model")
    model, state = opened(folder), opened(folder).new_state()
    stepper, kept = Stepper(model), load(folder).new_state()
    for token in random_ids(SMALL, 5):
        stepper.read([[token]], [1], [state])
    kept.read_arrays(state)
    before = [tensor.clone() for layer in kept.layers for tensor in layer.fork().tensors().values()]
    for token in random_ids(SMALL, 5, seed=1):
        stepper.read([[token]], [1], [state])
    after = [tensor for layer in kept.layers for tensor in layer.tensors().values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_states_of_another_model_are_refused(tmp_path: Path):
    model = opened(saved(tmp_path / "model"))
    other = opened(saved(tmp_path / "other", SMALL, "fp32"))
    with pytest.raises(InputError, match="state 0 was made for a model"):
        model.next_logits([[1]], [other.new_state()])
    with pytest.raises(InputError, match="state 0 was made for a model"):
        next(iter(generate(model, [1], state=load(tmp_path / "model").new_state())))


@pytest.mark.parametrize(
    ("sequences", "words"),
    [
        ([], "no sequences"),
        ([[1], []], "sequence 1 is empty"),
        ([[1, SMALL.vocab_size]], "out of range"),
        ([[-1]], "out of range"),
        ([[1.5]], "expected an int"),
    ],
)
def test_what_native_code_would_believe_is_refused(sequences, words: str, tmp_path: Path):
    model = opened(saved(tmp_path / "model"))
    with pytest.raises(InputError, match=words):
        model.next_logits(sequences)
    with pytest.raises(InputError, match=words):
        model.last_logits(sequences, [1] * len(sequences))


def test_a_state_for_each_sequence_and_none_twice(tmp_path: Path):
    model = opened(saved(tmp_path / "model"))
    state = model.new_state()
    with pytest.raises(InputError, match="same state"):
        model.next_logits([[1], [2]], [state, state])
    with pytest.raises(InputError, match="1 states given for 2"):
        model.next_logits([[1], [2]], [state])


def test_no_torch_is_imported_to_generate(tmp_path: Path):
    code = (
        "import sys\n"
        "from jamba_lm.cli.main import main\n"
        "status = main(['generate', 'demo', '--prompt', 'one two three', '--max-tokens', '3'])\n"
        "sys.exit(status or ('torch' in sys.modules and 'torch was imported'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "new tokens" in run.stderr


def test_a_program_can_load_and_generate_without_torch():
    code = (
        "import sys\n"
        "from jamba_lm import embedded_model_path, generate, load_native, load_tokenizer\n"
        "model = load_native(embedded_model_path())\n"
        "tokenizer = load_tokenizer(embedded_model_path())\n"
        "ids = tokenizer.encode('one two three')\n"
        "assert len(list(generate(model, ids, max_new_tokens=3, tokenizer=tokenizer))) == 3\n"
        "sys.exit('torch' in sys.modules and 'torch was imported')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_program_is_told_why_not_and_what_to_do(tmp_path: Path):
    folder = saved(tmp_path / "model", SMALL.replace(position="rope"))
    with pytest.raises(InputError, match=r"knows positions\): use jamba_lm.load"):
        load_native(folder)


def test_the_embedded_model_is_one(monkeypatch: pytest.MonkeyPatch):
    assert isinstance(open_native(embedded_model_path(), backend="native"), NativeModel)
    assert "back-end" in str(open_native(embedded_model_path(), backend="reference"))
    monkeypatch.setenv("JAMBA_BACKEND", "reference")
    assert "back-end" in str(open_native(embedded_model_path()))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int, tmp_path: Path):
    folder = saved(tmp_path / "model", WIDE)
    model = open_native(folder, threads=threads)
    assert isinstance(model, NativeModel)
    plan: NativePlan = model.step_plan()
    assert plan.threads == threads
    ids = [random_ids(WIDE, 50)]
    assert np.array_equal(logits_of(model, ids), logits_of(opened(folder), ids))
    assert np.array_equal(logits_of(model, ids), logits_of(load(folder), ids))


def rewritten(folder: Path, change) -> None:
    """Write the weights of a folder again, after `change` of the dictionary of tensors."""
    with TensorFile(folder / WEIGHTS) as file:
        tensors = {name: file.tensor(name).clone() for name in file.names}
    change(tensors)
    # Wider types first, so that every tensor is aligned to its type.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    write_tensors(folder / WEIGHTS, dict(ordered), {})


HEAD, NORM = "lm_head.weight", "model.final_layernorm.weight"
UNUSUAL = {
    "half precision": lambda t: t.update({name: x.half() for name, x in t.items()}),
    "mixed types": lambda t: t.update({HEAD: t[HEAD].float()}),
    "a tensor too few": lambda t: t.pop(NORM),
    "a tensor too many": lambda t: t.update({"more": torch.zeros(2, dtype=torch.bfloat16)}),
    "another shape": lambda t: t.update({HEAD: t[HEAD][:-1].clone()}),
    "another name": lambda t: t.update({"model.norm": t.pop(NORM)}),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_what_is_unusual_is_left_to_the_model_with_torch(what: str, tmp_path: Path):
    folder = saved(tmp_path / "model")
    rewritten(folder, lambda tensors: None)
    assert isinstance(open_native(folder), NativeModel)
    rewritten(folder, UNUSUAL[what])
    assert isinstance(open_native(folder), str)


def test_tensors_between_two_places_are_left_to_it_too(tmp_path: Path):
    folder = saved(tmp_path / "model")
    data = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    # A space more in the header, and everything behind it lies at an odd place.
    header = data[8:end] + b" "
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    assert "lies between" in str(open_native(folder))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_scales_that_are_none_are_left_to_it_too(scheme: str, bad: float, tmp_path: Path):
    model = shaken_model(WIDE, dtype="bf16")
    quantize_decoder(model.decoder, next(one for one in all_schemes() if one.name == scheme))
    model.save(tmp_path / "model")
    assert isinstance(open_native(tmp_path / "model"), NativeModel)
    name = "model.layers.0.feed_forward.up_proj.weight.scale"
    rewritten(tmp_path / "model", lambda t: t[name].reshape(-1)[3:4].fill_(bad))
    assert name in str(open_native(tmp_path / "model"))


def test_positions_files_and_absent_folders_are_left_to_it(tmp_path: Path):
    rotary = saved(tmp_path / "rotary", SMALL.replace(position="rope"))
    assert "positions" in str(open_native(rotary))
    assert isinstance(open_native(tmp_path / "nothing"), str)
    assert isinstance(open_native(rotary / WEIGHTS), str)


def test_no_list_is_made_of_ten_thousand_layers_that_are_not_there(tmp_path: Path):
    folder = saved(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10_000}))
    assert "too few" in str(open_native(folder))


def test_shards_that_disagree_with_their_index_are_left_to_it(tmp_path: Path):
    folder = tmp_path / "model"
    write_decoder(folder, SMALL, shaken_model(SMALL).decoder, shard_bytes=20_000)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    shutil.copy(second, first)
    assert "index" in str(open_native(folder))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 3000), byte=st.integers(0, 255), cut=st.integers(0, 200))
def test_a_damaged_file_never_ends_in_anything_but_a_model_or_a_reason(
    place: int, byte: int, cut: int, tmp_path: Path
):
    folder = tmp_path / "model"
    if not (tmp_path / "sound").is_file():
        saved(folder)
        shutil.copy(folder / WEIGHTS, tmp_path / "sound")
    data = bytearray((tmp_path / "sound").read_bytes())
    data[place] = byte
    (folder / WEIGHTS).write_bytes(data[: len(data) - cut])
    found = open_native(folder)
    assert isinstance(found, NativeModel | str)
    if cut:
        assert isinstance(found, str)
    elif isinstance(found, NativeModel):
        assert found.next_logits([[1, 2]]).shape == (1, SMALL.vocab_size)
