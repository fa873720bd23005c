"""BOS, EOS and contradictions, from the files beside tokenizer.json."""

from __future__ import annotations

import shutil

import hypothesis
import hypothesis.strategies as st
import pytest

from jamba_lm.errors import TokenizerError
from jamba_lm.text.special_tokens import JAMBA_NAMES, read_special_tokens
from jamba_lm.text.tokenizer import load_tokenizer
from jamba_lm.text.tokenizer_file import read_tokenizer_file
from tests.text.folders import (
    family_folder,
    read,
    trained_folder,
    write,
)


@pytest.mark.parametrize(("family", "stop"), [("bom", "<|eom|>"), ("think", "<|im_end|>")])
def test_stop_ids_come_from_every_list(family, stop):
    tokenizer = load_tokenizer(family_folder(family))
    assert tokenizer.eos_ids == (2, tokenizer.token_id(stop))
    assert tokenizer.contradictions == ()


def test_the_ids_of_all_three_files_are_put_together():
    folder = family_folder("bom")
    special = read_special_tokens(folder, read_tokenizer_file(folder / "tokenizer.json"))
    assert (special.bos_id, special.pad_id, special.add_bos) == (1, 0, True)
    assert special.names == {f"{role}_token": name for role, name in JAMBA_NAMES.items()}


def test_a_lone_tokenizer_json_is_known_by_the_names_jamba_uses(tmp_path):
    shutil.copy(trained_folder("byte-level") / "tokenizer.json", tmp_path / "mine.json")
    tokenizer = load_tokenizer(tmp_path / "mine.json")
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (1, (2,), 0)
    assert tokenizer.chat_template is None
    with pytest.raises(TokenizerError, match="no chat template"):
        tokenizer.chat_ids([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("config.json", {"bos_token_id": 7}, "config.json says bos_token_id 7"),
        ("config.json", {"eos_token_id": [9]}, r"config.json says eos_token_id \(9,\)"),
        ("config.json", {"vocab_size": 600}, "vocab_size 600"),
        ("generation_config.json", {"eos_token_id": 9999}, "eos_token_id 9999 is no token"),
        ("tokenizer_config.json", {"add_bos_token": False}, "add_bos_token false"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"99": {"content": "<|eom|>"}}},
            "gives '<|eom|>' the id 99",
        ),
    ],
)
def test_contradictions_are_reported(tmp_path, caplog, file, changes, expected):
    folder = shutil.copytree(family_folder("bom"), tmp_path / "copy")
    write(folder / file, read(folder / file) | changes)
    tokenizer = load_tokenizer(folder)
    notes = "\n".join(tokenizer.contradictions)
    assert expected.replace("\\", "") in notes
    assert tokenizer.contradictions[0] in caplog.text
    if "add_bos_token" in changes:
        assert tokenizer.encode("a")[0] != 1
        assert tokenizer.encode("a", add_bos=True)[0] == 1


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("tokenizer_config.json", {"bos_token": "<nope>"}, "bos_token is '<nope>'"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template is 5"),
        ("tokenizer_config.json", {"chat_template": [5]}, "chat_template holds 5"),
        ("tokenizer_config.json", {"chat_template": "{% if %}"}, "malformed"),
        ("generation_config.json", {"eos_token_id": ["2"]}, "expected a token id"),
        ("config.json", {"bos_token_id": True}, "expected a token id"),
        ("config.json", {"pad_token_id": -1}, "expected a token id"),
    ],
)
def test_unusable_settings_are_refused_in_one_line(tmp_path, file, changes, expected):
    folder = shutil.copytree(family_folder("bom"), tmp_path / "copy")
    write(folder / file, read(folder / file) | changes)
    with pytest.raises(TokenizerError, match=expected) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_asking_for_a_bos_that_is_not_there_is_an_error(tmp_path):
    document = read(trained_folder("byte-level") / "tokenizer.json")
    document |= {"post_processor": None, "added_tokens": []}
    document["model"]["vocab"]["<renamed>"] = document["model"]["vocab"].pop("<|startoftext|>")
    write(tmp_path / "tokenizer.json", document)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id is None
    assert tokenizer.encode("a") == tokenizer.encode("a", add_bos=False)
    with pytest.raises(TokenizerError, match="no BOS"):
        tokenizer.encode("a", add_bos=True)


KEYS = {
    "tokenizer_config.json": "bos_token eos_token add_bos_token added_tokens_decoder chat_template",
    "generation_config.json": "bos_token_id eos_token_id pad_token_id",
    "config.json": "bos_token_id eos_token_id pad_token_id vocab_size",
}
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=6), st.just("<|eom|>")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["content", "name", "template", "5"]), inner, max_size=3),
    ),
    max_leaves=6,
)


@hypothesis.given(
    settings=st.sampled_from(list(KEYS)).flatmap(
        lambda name: st.tuples(
            st.just(name), st.dictionaries(st.sampled_from(KEYS[name].split()), VALUES)
        )
    )
)
@hypothesis.settings(max_examples=150)
def test_any_settings_are_refused_or_read(settings_folder, settings):
    name, values = settings
    for other in KEYS:
        write(settings_folder / other, values if other == name else {})
    try:
        tokenizer = load_tokenizer(settings_folder)
        assert all(isinstance(one, int) for one in (*tokenizer.eos_ids, tokenizer.bos_id or 0))
    except TokenizerError as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def settings_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    shutil.copy(family_folder("bom") / "tokenizer.json", folder / "tokenizer.json")
    return folder
