"""hf.py: tokenizers and chat templates against transformers (where installed), stop tokens, hostile
templates; a repository id found in the cache, fetched, or refused in one line."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf

CHATML = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- continue %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- else %}
        {{- '<think>\\n' }}
    {%- endif %}
{%- endif %}
"""
TOOLS = """{{ bos_token }}{% set ns = namespace(turn=0) %}
{% if tools is not none %}
{{ tools | tojson(indent=4) }}
{% endif %}
{% for message in messages %}
    {% set ns.turn = ns.turn + 1 %}
    {% if message['role'] not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('unknown role ' + message['role']) }}
    {% endif %}
[{{ ns.turn }}] {{ message | tojson }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}"""
CONVERSATIONS = [
    [{"role": "user", "content": 'What is 1 < 2 & "é"? \n 日本 🙂 '}],
    [
        {"role": "system", "content": "Be <brief>."},
        {"role": "user", "content": "a\\b\n"},
        {"role": "assistant", "content": "'c'"},
        {"role": "user", "content": ""},
    ],
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A byte-level BPE trained here, as tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"],
    )
    backend.train_from_iterator(
        ["the user asks, the assistant thinks and answers: 12 + 34 = 46\n"] * 20, trainer
    )
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    backend.save(str(file))
    return file


def tokenizer(folder, bpe, **files):
    """A Tokenizer of a folder with the given JSON files beside tokenizer.json."""
    folder.mkdir(exist_ok=True)
    shutil.copy(bpe, folder / "tokenizer.json")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return hf.Tokenizer(folder)


@pytest.mark.parametrize("template", [CHATML, TOOLS], ids=["chatml", "tojson"])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_template_parity(tmp_path, bpe, template, messages):
    """The prompt's text and ids are those of transformers' apply_chat_template, whatever the
    template's switch."""
    transformers = pytest.importorskip("transformers")
    shutil.copy(bpe, tmp_path / "raw.json")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "raw.json"),
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    theirs.chat_template = template
    theirs.save_pretrained(tmp_path)
    mine = hf.Tokenizer(tmp_path)
    for switch in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        want = theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **switch
        )
        assert mine.render(messages, **switch) == want
        assert mine.encode(want) == theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, **switch
        )
    assert want.endswith("<think>\n") or template is TOOLS


def test_template_sources(tmp_path, bpe):
    """chat_template.jinja wins over tokenizer_config.json, whose template may be a list; none means
    plain text."""
    messages = CONVERSATIONS[0]
    assert tokenizer(tmp_path / "base", bpe).render(messages) == messages[0]["content"]
    one = {
        "chat_template": "one {{ messages | length }}{{ eos_token }}",
        "eos_token": {"content": "<|im_end|>"},
    }
    assert (
        tokenizer(tmp_path / "one", bpe, tokenizer_config=one).render(messages) == "one 1<|im_end|>"
    )
    named = {
        "chat_template": [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": "two"},
        ]
    }
    assert tokenizer(tmp_path / "list", bpe, tokenizer_config=named).render(messages) == "two"
    (tmp_path / "list" / "chat_template.jinja").write_text("three")
    assert hf.Tokenizer(tmp_path / "list").render(messages) == "three"


def test_template_refuses(tmp_path, bpe):
    """A template's own raise_exception, and a template that does not parse, are ValueErrors with
    its words."""
    template = {"chat_template": TOOLS, "bos_token": "<s>", "eos_token": None}
    with pytest.raises(ValueError, match="unknown role tool"):
        tokenizer(tmp_path, bpe, tokenizer_config=template).render(
            [{"role": "tool", "content": ""}]
        )
    with pytest.raises(ValueError, match="template"):
        tokenizer(tmp_path, bpe, tokenizer_config={"chat_template": "{% if %}"}).render(
            CONVERSATIONS[0]
        )


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.mro() }}",
        "{{ raise_exception.__globals__ }}x{{ 1 }}",
        "{{ messages.__init__.__globals__['os'].system('touch ' + messages[0].content) }}",
        "{{ cycler.__init__.__globals__.os.system('touch ' + messages[0].content) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
    ],
)
def test_hostile_template(tmp_path, bpe, template):
    """A downloaded template must not reach Python's objects, run a command or change the
    conversation."""
    mark = tmp_path / "executed"
    messages = [{"role": "user", "content": str(mark)}]
    mine = tokenizer(tmp_path / "t", bpe, tokenizer_config={"chat_template": template})
    try:
        text = mine.render(messages)
    except ValueError:
        pass
    else:
        assert text == "x1"  # an attribute that is withheld prints as nothing
        assert "raise_exception" in template
    assert not mark.exists() and messages == [{"role": "user", "content": str(mark)}]


@settings(max_examples=100, deadline=None, database=None)
@given(text=st.text())
def test_text_round_trip(bpe, text):
    """Any text survives encode and decode (byte-level), and encode adds nothing."""
    mine = hf.Tokenizer(bpe.parent)
    assert mine.decode(mine.encode(text), special=True) == text
    assert (
        "".join(mine.decode([i], special=True) for i in mine.encode("plain")) == "plain"
        and mine.encode("") == []
    )


def test_special_tokens(bpe):
    """Special tokens in a prompt's text are single ids; decode leaves them out unless asked."""
    mine = hf.Tokenizer(bpe.parent)
    ids = mine.encode("<|im_start|>é🙂<|im_end|>")
    assert ids[0] == 1 and ids[-1] == 2
    assert (
        mine.decode(ids) == "é🙂"
        and mine.decode(torch.tensor(ids), special=True) == "<|im_start|>é🙂<|im_end|>"
    )


@pytest.mark.parametrize(
    "generation, config, stop",
    [
        ({"eos_token_id": 2}, {"eos_token_id": 0}, (2,)),
        ({"eos_token_id": [2, 0]}, {}, (2, 0)),
        ({}, {"eos_token_id": 0}, (0,)),
        ({}, {"eos_token_id": [0, 2]}, (0, 2)),
        ({"eos_token_id": 0}, {}, (0,)),
        ({}, {}, ()),
    ],
)
def test_stop_tokens(tmp_path, bpe, generation, config, stop):
    """generation_config.json decides, else config.json; one id or several; an id of 0 is an id."""
    assert tokenizer(tmp_path, bpe, generation_config=generation, config=config).stop == stop


def test_no_tokenizer(tmp_path):
    """A folder without a readable tokenizer.json is named."""
    with pytest.raises(ValueError, match="tokenizer.json"):
        hf.Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json"):
        hf.Tokenizer(tmp_path)
