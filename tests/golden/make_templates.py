#!/usr/bin/env python3
"""Golden tokens and masks for chat templates, from transformers.

Pinned: transformers==5.24.0 tokenizers==0.23.3 jinja2==3.1.6 (torch is not needed), Python 3.11.

    python make_templates.py --tokenizers DIR --datasets DIR --out tests/fixtures/templates

DIR of --tokenizers has one folder for each of smollm2, qwen2.5, qwen3, mistral-nemo, mistral-7b-v0.1 with a
tokenizer.json and a tokenizer_config.json as the Hugging Face hub has them; --datasets has home-robot/train.jsonl and
ha-datasets/function-calling-messages-test.jsonl. Without them only the tiny tokenizer's values are made.

What is written:
  tiny/             a byte-level BPE tokenizer of a few KB, trained here, with the special tokens of several families
  *.jinja           chat templates in the styles of those families; every one has `generation` tags
  golden.json       conversations; for each template, ids and mask of each conversation (or that it is refused)
  golden_real.json  the same for the real tokenizers and templates

How masks are obtained: transformers knows the assistant's tokens only where the template has `generation` tags. The
templates made here have them, placed by hand; the tests read each template with the tags and once more with the tags
taken out, when the spans have to be found. The real templates have none: `TAGGED` below places them by hand, and this
script checks that the tagged template writes the same text as the real one before it takes the mask from it.
"""

import argparse
import hashlib
import json
import pathlib
import re
import tempfile

import jinja2
import tokenizers
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

PINNED = {"transformers": "5.24.0", "tokenizers": "0.23.3", "jinja2": "3.1.6"}

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]",
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]
# Added, but not special: rows may hold them.
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

CORPUS = """
The robot drives to the kitchen and turns on the light. The user asks what the weather is like today.
The assistant answers: it is sunny, with a light breeze from the west. Please set an alarm for seven in the morning.
def answer(question): return question + " is a good question" # a function
You are a helpful assistant. What is the capital of France? The capital of France is Paris.
{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}
Could you play some music in the living room? I have turned the music on. Thank you very much, that is great.
""" * 3

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather <now> & \"soon\" in a city, e.g. Zürich",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Zürich", "東京"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 14.5, "default": 1e-07},
                "detailed": {"type": "boolean", "default": False, "x": None},
            },
            "required": ["city"],
        },
    },
}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def call(name, arguments, id):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATIONS = {
    "one-turn": {"messages": [user("What is the capital of France?"), assistant("The capital of France is Paris.")]},
    "system": {"messages": [system("You are terse."), user("Hello"), assistant("Hi.")]},
    "three-turns": {
        "messages": [
            system("You are a robot."), user("one"), assistant("two"), user("three"), assistant("four"),
            user("five"), assistant("six"),
        ]
    },
    "unicode": {
        "messages": [
            user("naïve café e\u0301 — 日本語 한국어 العربية \U0001F469\u200D\U0001F680 ﬁ \u00a0x\u2028y"),
            assistant("Grüße 👋🏽, 東京 и Москва; \U0001F1EB\U0001F1F7"),
        ]
    },
    "whitespace": {
        "messages": [
            system("  spaces around  "), user("\n\n leading and trailing \t\n"), assistant("  \n two lines\r\n\tand a tab  \n\n"),
            user(" "), assistant("\n"),
        ]
    },
    "empty": {"messages": [system(""), user(""), assistant("")]},
    "code": {
        "messages": [
            user("Fix `{{ x }}` and {% if y %} {# z #}"),
            assistant("```python\ndef f(x):\n    return {'a': [1, 2], \"b\": f\"{x!r}\"}\n```\n"),
        ]
    },
    "markup-like": {
        "messages": [user("What does <b> do? assistant\nuser\n<| not a token |>"), assistant("It makes text **bold**: <b>x</b> [INS] </ s>")]
    },
    "long": {
        "messages": [user("Tell me a story. " * 12), assistant("The robot drives on and on. " * 25), user("More!"), assistant("It stops.")]
    },
    "ends-with-user": {"messages": [user("a"), assistant("b"), user("c")]},
    "assistant-first": {"messages": [assistant("Welcome!"), user("Hi"), assistant("How can I help?")]},
    "two-assistants": {"messages": [user("a"), assistant("b"), assistant("c")]},
    "tools-unused": {"tools": [WEATHER], "messages": [user("Hello"), assistant("Hi.")]},
    "tool-call": {
        "tools": [WEATHER],
        "messages": [
            system("Use the tools."), user("Weather in Paris & Zürich?"),
            {"role": "assistant", "tool_calls": [call("get_weather", {"city": "Paris", "days": 2, "q": 'a"b<é>', "f": 1.0, "n": None, "t": True}, "abcdefgh1")]},
            {"role": "tool", "name": "get_weather", "content": "{\"temp\": 21.5}", "tool_call_id": "abcdefgh1"},
            assistant("It is 21.5 degrees."), user("Thanks"), assistant("You are welcome."),
        ],
    },
    "two-calls": {
        "tools": [WEATHER, WEATHER],
        "messages": [
            user("Both cities?"),
            assistant("", tool_calls=[call("get_weather", {"city": "Paris"}, "abcdefgh1"), call("get_weather", {}, "abcdefgh2")]),
            {"role": "tool", "content": "1", "tool_call_id": "abcdefgh1"}, {"role": "tool", "content": "2", "tool_call_id": "abcdefgh2"},
            assistant("One and two."),
        ],
    },
    "call-with-content": {
        "tools": [WEATHER],
        "messages": [user("And?"), assistant("Let me look.", tool_calls=[call("get_weather", {"city": "東京"}, "abcdefgh1")])],
    },
    "think": {
        "messages": [
            user("2+2?"), assistant("<think>\nEasy: four.\n</think>\n\n4"), user("3+3?"),
            assistant("<think>\nSix it is.\n</think>\n\n6"),
        ]
    },
    "reasoning-key": {
        "messages": [user("2+2?"), assistant("4", reasoning_content="Two and two."), user("3+3?"), assistant("6", reasoning="Three twice.")]
    },
}

# Conversations of which the ids of a prompt for generation are kept too.
PROMPTS = ["three-turns", "tool-call", "ends-with-user"]

TEXTS = ["Hello world", " leading space", "naïve 日本語 \U0001F469\u200D\U0001F680", "a\n\nb\n", "", "x = [1, 2]  # code", "\ttab"]
PAIRS = [["The capital of France is", " Paris."], ["Translate: chat\n", "cat"], ["", "only a completion"], ["un", "even boundaries"], ["q", ""]]

TEMPLATES = {
    # ChatML with a default system prompt, as SmolLM2 and Qwen2.5 have.
    "chatml": """{%- for message in messages %}
{%- if loop.first and message.role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
    {%- generation -%}
    {{- message.content if message.content else '' }}
    {%- for call in message.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}
    {{- '<|im_end|>' }}
    {%- endgeneration -%}
{%- else %}
    {{- message.content + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
""",
    # Headers, a date, contents trimmed, tools in the first user turn: Llama 3.
    "llama3": """{{- bos_token }}
{%- if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% else %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- set ns = namespace(first=true) %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + ('ipython' if message.role == 'tool' else message.role) + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == 'user' and ns.first and tools is not none %}
        {%- set ns.first = false %}
        {{- "Functions:\\n" }}
        {%- for t in tools %}{{ t | tojson(indent=4) }}{{ "\\n\\n" }}{% endfor %}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {%- if 'tool_calls' in message %}
                {%- if not message.tool_calls|length == 1 %}{{ raise_exception("This model only supports single tool-calls at once!") }}{% endif %}
                {%- set tool_call = message.tool_calls[0].function %}
                {{- '{"name": "' + tool_call.name + '", "parameters": ' + tool_call.arguments | tojson + "}" }}
            {%- else %}
                {{- message['content'] | trim }}
            {%- endif %}
            {{- '<|eot_id|>' }}
        {%- endgeneration %}
    {%- elif message.content is mapping or message.content is not string and message.content is iterable %}
        {{- message.content | tojson + '<|eot_id|>' }}
    {%- else %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
""",
    # No role tokens, an end token only behind the assistant, the system text inside a user turn: Mistral, Llama 2.
    "inst": """{%- if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}{% set loop_messages = messages[1:] %}
{%- else %}{% set loop_messages = messages %}{% endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system_message is defined %}{{ '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- elif loop.index0 == loop_messages|length - 2 and system_message is defined %}{{ '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}
    {%- elif message['role'] == 'assistant' %}
        {%- generation %}{{ ' ' + message['content'] | trim + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
""",
    # Role names that are plain text, as in Zephyr and TinyLlama.
    "zephyr": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration +%}

{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
""",
    # A generation prompt that opens a thought which turns of the past do not have. What it writes is not learnt.
    "thinking": """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- if loop.last %}{{ '<think>\\n' }}{% endif %}
        {%- generation -%}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.last %}{{ (message.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}
        {{- content + '<|im_end|>' }}
        {%- endgeneration -%}
    {%- else %}{{ message.content + '<|im_end|>' }}{% endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}
""",
}
# The template's bos and eos tokens.
TOKENS = {
    "chatml": (None, "<|im_end|>"), "llama3": ("<|begin_of_text|>", "<|eot_id|>"), "inst": ("<s>", "</s>"),
    "zephyr": ("<s>", "</s>"), "thinking": (None, "<|im_end|>"),
}


def swap(template, *pairs):
    for old, new in pairs:
        assert template.count(old) == 1, (template.count(old), old)
        template = template.replace(old, new)
    return template


# Where the tags go in the real templates. Bodies that begin with the header are captured and cut.
TAGGED = {
    "smollm2": lambda t: swap(
        t,
        (
            "+ '\n' + message['content'] + '<|im_end|>' + '\n'}}",
            "+ '\n'}}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
            "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
        ),
    ),
    "qwen2.5": lambda t: swap(
        t,
        (
            """(message.role == "assistant" and not message.tool_calls) %}""",
            """false %}""",
        ),
        (
            """{%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}""",
            """{%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- set body %}
        {%- if message.content or not message.tool_calls %}
            {{- '\\n' + message.content }}""",
        ),
        (
            """        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}""",
            """{%- endset %}
        {%- generation %}{{ body[1:] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
    {%- elif message.role == "tool" %}""",
        ),
    ),
    "qwen3": lambda t: swap(
        t,
        ("{%- if loop.index0 > ns.last_query_index %}", "{%- set body %}{%- if loop.index0 > ns.last_query_index %}"),
        (
            """        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}""",
            """        {{- '<|im_end|>\\n' }}
        {%- endset %}{{ body[:22] }}{% generation %}{{ body[22:-1] }}{% endgeneration %}{{ '\\n' }}
    {%- elif message.role == "tool" %}""",
        ),
    ),
    "mistral-nemo": lambda t: swap(
        t,
        ("""{{- "[TOOL_CALLS][" }}""", """{%- generation %}{{- "[TOOL_CALLS][" }}"""),
        (
            """{{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}""",
            """{{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}{%- endgeneration %}""",
        ),
        (
            """{{- message["content"] + eos_token}}""",
            """{%- generation %}{{- message["content"] + eos_token}}{%- endgeneration %}""",
        ),
    ),
}


def untag(template):
    """The template with `if true` in place of `generation`: the same text, nothing known about spans."""
    template = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", template)


def runs(mask):
    """Half-open ranges of ones."""
    out, start = [], None
    for i, m in enumerate([*mask, 0]):
        if m and start is None:
            start = i
        elif not m and start is not None:
            out.append([start, i])
            start = None
    return out


def encode(tokenizer, conversation, tagged):
    """Ids and mask of a conversation, or None when the template refuses it."""
    arguments = dict(conversation=conversation["messages"], tools=conversation.get("tools"))
    try:
        plain = tokenizer.apply_chat_template(**arguments, tokenize=False)
    except (jinja2.exceptions.TemplateError, TypeError):
        return None
    assert tokenizer.apply_chat_template(**arguments, chat_template=tagged, tokenize=False) == plain, plain
    out = tokenizer.apply_chat_template(
        **arguments, chat_template=tagged, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return {"ids": out["input_ids"], "learnt": runs(out["assistant_masks"])}


def prompt(tokenizer, conversation):
    """Ids up to where the assistant would speak after the last message, or None."""
    try:
        return tokenizer.apply_chat_template(
            conversation["messages"], tools=conversation.get("tools"),
            add_generation_prompt=True, tokenize=True, return_dict=False,
        )
    except (jinja2.exceptions.TemplateError, TypeError):
        return None


def plain_texts(tokenizer):
    """Texts as TRL tokenises them: the end token behind the text, then whatever the tokenizer adds."""
    eos = tokenizer.eos_token
    return {
        "special": [tokenizer(t)["input_ids"] for t in TEXTS],
        "texts": [tokenizer(t + eos)["input_ids"] for t in TEXTS],
        "pairs": [tokenizer(p + c + eos)["input_ids"] for p, c in PAIRS],
    }


def make_tiny(out):
    """Trains the tiny tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)


def tiny_config(name):
    bos, eos = TOKENS[name]
    # transformers ignores add_bos_token where a tokenizer.json is; it stands here so that we are seen to do the same.
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "unk_token": "<|endoftext|>",
        "add_bos_token": True,
    }


def post_processor(name):
    """One of the tokenizers puts its bos token before a text; another is byte-level and trims offsets."""
    if name == "inst":
        return json.loads(processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 3)]).__getstate__())
    if name == "zephyr":
        return json.loads(processors.ByteLevel(trim_offsets=True).__getstate__())
    return None


def load(tokenizer_json, config, post):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        tokenizer = json.loads(tokenizer_json.read_text())
        tokenizer["post_processor"] = post
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return transformers.AutoTokenizer.from_pretrained(folder)


def freeze_date():
    """Training rows are rendered on a fixed day; here Python's clock is set to it."""
    import datetime

    from transformers.utils import chat_template_utils

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 7, 26)

    chat_template_utils.datetime = Frozen


def digest(result):
    """Eight hex digits over ids and mask."""
    if result is None:
        return "refused"
    text = ",".join(map(str, result["ids"])) + ";" + ",".join(f"{a}-{b}" for a, b in result["learnt"])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def write(path, value):
    """JSON with one line for each case."""

    def lines(value, depth):
        if depth and isinstance(value, dict):
            inner = ",\n".join(f"{json.dumps(k)}: {lines(v, depth - 1)}" for k, v in value.items())
            return "{\n" + inner + "\n}"
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    path.write_text(lines(value, 3) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--tokenizers", type=pathlib.Path)
    parser.add_argument("--datasets", type=pathlib.Path)
    options = parser.parse_args()
    versions = {m.__name__: m.__version__ for m in (transformers, tokenizers, jinja2)}
    if versions != PINNED:
        print(f"warning: made with {versions}, pinned are {PINNED}")
    freeze_date()

    make_tiny(options.out / "tiny")
    tiny = options.out / "tiny" / "tokenizer.json"
    golden = {"versions": versions, "conversations": CONVERSATIONS, "texts": TEXTS, "pairs": PAIRS, "templates": {}}
    for name, template in TEMPLATES.items():
        (options.out / f"{name}.jinja").write_text(template)
        config, post = tiny_config(name), post_processor(name)
        tokenizer = load(tiny, config, post)
        tokenizer.chat_template = untag(template)
        golden["templates"][name] = {
            "config": config,
            "post_processor": post,
            "rows": {key: encode(tokenizer, c, template) for key, c in CONVERSATIONS.items()},
            "prompts": {key: prompt(tokenizer, CONVERSATIONS[key]) for key in PROMPTS},
            "plain": plain_texts(tokenizer),
        }
    write(options.out / "golden.json", golden)
    if not options.tokenizers:
        return

    real = {"versions": versions, "tokenizers": {}}
    for name, tag in TAGGED.items():
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.tokenizers / name)
        tagged = tag(tokenizer.chat_template)
        entry = {
            "rows": {key: encode(tokenizer, c, tagged) for key, c in CONVERSATIONS.items()},
            "prompts": {key: prompt(tokenizer, CONVERSATIONS[key]) for key in PROMPTS},
            "plain": plain_texts(tokenizer),
        }
        if options.datasets:
            entry["home-robot"] = [
                digest(encode(tokenizer, json.loads(line), tagged))
                for line in (options.datasets / "home-robot" / "train.jsonl").open().readlines()[:200]
            ]
            rows = [json.loads(line) for line in (options.datasets / "ha-datasets" / "function-calling-messages-test.jsonl").open().readlines()[:40]]
            rows = [{key: json.loads(row[key]) for key in ("messages", "tools")} for row in rows]
            entry["ha-datasets"] = [digest(encode(tokenizer, row, tagged)) for row in rows]
        real["tokenizers"][name] = entry
    # Mistral 7B v0.1 has no chat template of its own.
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.tokenizers / "mistral-7b-v0.1")
    tokenizer.chat_template = untag(TEMPLATES["inst"])
    real["tokenizers"]["mistral-7b-v0.1"] = {
        "template": "inst",
        "rows": {key: encode(tokenizer, c, TEMPLATES["inst"]) for key, c in CONVERSATIONS.items()},
        "prompts": {},
        "plain": plain_texts(tokenizer),
    }
    write(options.out / "golden_real.json", real)


if __name__ == "__main__":
    main()
