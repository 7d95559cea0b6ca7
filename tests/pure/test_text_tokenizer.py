"""The tokenizer's face: encode, decode, single tokens, templates, threads, and errors of missing or damaged files."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_tokenizers import CORPUS, byte_level, small, wrapped

from quire.errors import CheckpointError, ModelNotFoundError, ValidationError
from quire.text import load_tokenizer

TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if tools %}tools={{ tools | length }}\n{% endif %}{% if mood %}mood={{ mood }}\n{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
MESSAGES = [{"role": "user", "content": "hello"}]


def test_importing_text_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, quire.text; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("kind", ["byte_level", "space_marked", "space_kept", "word_piece"])
def test_encode_is_what_the_library_encodes(kind: str) -> None:
    tokenizer = small(kind)
    for text in [*CORPUS[:3], "", "<|user|> hi </s>"]:
        for special in (True, False):
            assert tokenizer.encode(text, special) == tokenizer.library.encode(text, add_special_tokens=special)


def test_special_and_added_tokens() -> None:
    tokenizer = small("byte_level")
    ids = tokenizer.encode("<s></s><|user|><tool>", add_special_tokens=False)
    assert len(ids) == 4
    assert tokenizer.special_ids == set(ids[:3])
    assert tokenizer.added_tokens[ids[3]] == "<tool>"
    assert tokenizer.vocab_size == len(tokenizer.library) == ids[3] + 1
    assert tokenizer.eos_token_id == ids[1]
    assert tokenizer.decode([*ids, 10**6]) == "<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s></s><|user|><tool>"


def test_single_tokens_keep_their_space_and_their_bytes() -> None:
    for kind in ("byte_level", "space_marked"):
        tokenizer = small(kind)
        ids = tokenizer.encode("was a", add_special_tokens=False)
        assert "".join(tokenizer.token_string(token) for token in ids).lstrip() == "was a"
        owl = tokenizer.encode("🦉", add_special_tokens=False)
        assert b"".join(tokenizer.token_bytes(token) for token in owl).strip() == "🦉".encode()
        assert "\ufffd" in tokenizer.token_string(owl[-1])
    assert small("word_piece").token_string(small("word_piece").encode("time", False)[0])


def test_half_a_surrogate_pair_is_a_clients_mistake() -> None:
    with pytest.raises(ValidationError, match="surrogate"):
        small("byte_level").encode("a\ud800b")


def test_many_threads_share_one_tokenizer() -> None:
    tokenizer = small("word_piece"), small("byte_level")
    meant = [(each.encode(text), each.decode(each.encode(text))) for each in tokenizer for text in CORPUS[:3]]

    def work(_: int) -> bool:
        return meant == [
            (each.encode(text), each.decode(each.encode(text))) for each in tokenizer for text in CORPUS[:3]
        ]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))


def test_the_given_template_wins_and_none_at_all_is_an_error() -> None:
    bare = wrapped(byte_level())
    with pytest.raises(ValidationError, match="no chat template"):
        bare.apply_chat_template(MESSAGES)
    assert bare.apply_chat_template(MESSAGES, chat_template="{{ messages[0].content }}!") == "hello!"
    own = wrapped(byte_level(), chat_template=TEMPLATE)
    assert own.apply_chat_template(MESSAGES) == "<|user|>user: hello\nassistant:"
    own.given_template = "given"
    assert own.apply_chat_template(MESSAGES) == "given"
    assert own.apply_chat_template(MESSAGES, chat_template="nearer") == "nearer"


def test_scripts_for_transformers_may_switch_tokenizing_off() -> None:
    tokenizer = wrapped(byte_level(), chat_template=TEMPLATE)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text == tokenizer.apply_chat_template(MESSAGES)
    with pytest.raises(ValidationError, match="encode"):
        tokenizer.apply_chat_template(MESSAGES, tokenize=True)


def test_named_templates() -> None:
    named = wrapped(byte_level(), chat_template={"default": "plain", "tool_use": "with tools", "rag": "rag"})
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert named.apply_chat_template(MESSAGES) == "plain"
    assert named.apply_chat_template(MESSAGES, tools=tools) == "with tools"
    assert named.apply_chat_template(MESSAGES, chat_template="rag") == "rag"
    with pytest.raises(ValidationError, match="'other'"):
        wrapped(byte_level(), chat_template={"other": "x"}).apply_chat_template(MESSAGES)


def test_template_variables_are_filtered_and_guarded() -> None:
    own = wrapped(byte_level(), chat_template=TEMPLATE)
    assert "mood=gay" in own.apply_chat_template(MESSAGES, template_kwargs={"mood": "gay", "unheard_of": 1})
    for name in ("chat_template", "tokenize", "add_generation_prompt", "messages", "return_dict"):
        with pytest.raises(ValidationError, match=name):
            own.apply_chat_template(MESSAGES, template_kwargs={name: "x"})


def test_going_on_with_the_last_message() -> None:
    own = wrapped(byte_level(), chat_template=TEMPLATE)
    talk = [*MESSAGES, {"role": "assistant", "content": "Well, I "}]
    text = own.apply_chat_template(talk, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("assistant: Well, I ")
    with pytest.raises(ValidationError, match="exclude"):
        own.apply_chat_template(talk, continue_final_message=True)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "not valid Jinja"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
        ("{{ ''.__class__.__mro__ }}", "cannot render"),
        ("{{ messages.append(1) }}", "cannot render"),
    ],
)
def test_what_the_template_refuses_is_the_clients_error(template: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        small("byte_level").apply_chat_template(MESSAGES, chat_template=template)


def test_a_folder_without_and_with_a_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelNotFoundError, match="skip_tokenizer_init"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {')
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_loading_what_was_saved(tmp_path: Path) -> None:
    own = wrapped(byte_level(), chat_template=TEMPLATE)
    own.library.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, chat_template="{{ messages[0].role }}")
    assert loaded.encode(CORPUS[1]) == own.encode(CORPUS[1])
    assert loaded.pieces is not None
    assert loaded.apply_chat_template(MESSAGES) == "user"
