"""Chat templates: the same strings and the same ids as transformers' apply_chat_template, over a corpus of conversations."""

import dataclasses
import json
from pathlib import Path

import pytest
import transformers
from records import gpt2_record
from test_llama_tokenizers import TEXTS, trained

from milepost import ckpt
from milepost.ckpt.saved_tokenizer import tokenizer_files
from milepost.text import tokenization
from milepost.text.templates import chat_ids, render
from milepost.text.tokenizer_json import from_tokenizers_json

pytestmark = pytest.mark.exchange

CHATML = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
# In the manner of SmolLM2, which adds a system message; of Llama 3, which trims and takes bos_token; of Qwen2.5.
SMOL = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
LLAMA3 = """{{- bos_token }}
{%- set ns = namespace(first=true) %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and ns.first %}
        {%- set ns.first = false %}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '<|im_end|>\\n\\n' + message['content'] | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant<|im_end|>\\n\\n' }}
{%- endif %}
"""
BLOCKS = """
{% for message in messages %}
  {% if message.role == 'system' %}
<<{{ message.content | tojson }}>>
  {% elif message.role == 'assistant' %}
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}

  {% else %}
{% if loop.index0 > 9 %}{% break %}{% endif %}
Q: {{ message.content.strip() }}
  {% endif %}
{% endfor %}
"""


def conversations() -> list[list[dict[str, str]]]:
    talks = []
    for number, text in enumerate(TEXTS):
        other = TEXTS[number - 1]
        user, answer = {"role": "user", "content": text}, {"role": "assistant", "content": other}
        talks += [[user], [user, answer], [{"role": "system", "content": other}, user, answer, user, answer]]
    return talks


@pytest.mark.parametrize("template", [CHATML, SMOL, LLAMA3, BLOCKS])
def test_strings_and_ids_are_those_of_transformers(template: str, tmp_path: Path) -> None:
    library = trained("SmolLM2")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    theirs.chat_template = template
    save_model(theirs, tmp_path)
    described = ckpt.load(tmp_path).tokenizer  # the template as a folder of transformers has it
    assert described is not None
    ours = tokenization.from_dict(described)
    assert ours.chat_template is not None
    plain = tokenization.from_dict(from_tokenizers_json(json.loads(library.to_str())))
    assert plain.chat_template is None
    for talk in conversations():
        for answer in (False, True):
            text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=answer)
            assert render(talk, ours.chat_template, answer=answer) == text
            if not any("<|im_" in message["content"] for message in talk):  # of which ours makes ordinary text
                ids = theirs.apply_chat_template(talk, add_generation_prompt=answer, return_dict=False)
                assert chat_ids(talk, ours, ours.chat_template, answer=answer) == ids


def save_model(tokenizer: transformers.PreTrainedTokenizerFast, folder: Path) -> None:
    """A Llama of a few weights with this tokenizer, as transformers saves it."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_the_template_goes_back_to_transformers(tmp_path: Path) -> None:
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=trained("SmolLM2"), eos_token="<|im_end|>")
    theirs.chat_template = SMOL + "{{ eos_token }}"
    save_model(theirs, tmp_path)
    record = ckpt.load(tmp_path)
    folder = tmp_path / "again"
    folder.mkdir()
    for name, values in tokenizer_files(record).items():
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    again = transformers.AutoTokenizer.from_pretrained(folder)
    for talk in conversations():
        assert again.apply_chat_template(talk, tokenize=False) == theirs.apply_chat_template(talk, tokenize=False)


@pytest.mark.parametrize("begin", [None, "<|im_start|>"])
def test_the_plain_template_that_a_model_was_trained_on_is_in_its_folder(begin: str | None, tmp_path: Path) -> None:
    """transformers renders a conversation to the ids of the training; a model of a plain text has no template."""
    values = json.loads(trained("SmolLM2").to_str())
    if begin:
        before, text = {"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        (i,) = [token["id"] for token in values["added_tokens"] if token["content"] == begin]
        named = {begin: {"id": begin, "ids": [i], "tokens": [begin]}}
        values["post_processor"] = {
            "type": "TemplateProcessing", "single": [before, text], "pair": [before, text, text], "special_tokens": named
        }  # fmt: skip
    saved = from_tokenizers_json(values) | {"end": "<|im_end|>"}
    tokenizer = tokenization.from_dict(saved)
    for data, template in (({"template": None}, None), ({}, "none")):
        one = gpt2_record(
            settings={"vocab_size": tokenizer.vocab_size}, tokenizer=saved, data={"name": "talks", **data}
        )
        path = ckpt.save(dataclasses.replace(one, optimizer_state=None), tmp_path / f"{template}", layout="huggingface")
        theirs = transformers.AutoTokenizer.from_pretrained(path)
        if template == "none":
            assert theirs.chat_template is None
            continue
        for talk in conversations():
            if any("<|im_" in message["content"] for message in talk):  # of which ours makes ordinary text
                continue
            for answer in (False, True):
                found = theirs.apply_chat_template(talk, add_generation_prompt=answer, return_dict=False)
                assert list(found) == chat_ids(talk, tokenizer, None, answer=answer)
