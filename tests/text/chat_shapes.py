"""Chat templates in the shapes that published models use, and conversations to render with them."""

import itertools

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}

# Re-created, not copied; a comment says what each is here for. {name: (source, its control tokens)}
TEMPLATES: dict[str, tuple[str, tuple[str, ...]]] = {
    # the plainest
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    # a default system turn before the first
    "smollm2": (
        "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    # slices, strip, alternation, bos and eos
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}{% set system = false %}"
        "{% endif %}{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if loop.index0 == 0 and system != false %}"
        "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}{% else %}"
        "{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
    ),
    # dates, tools, one call a turn, the ipython role, tojson with indent
    "llama-3.1": (
        "{{- bos_token }}\n{%- if not date_string is defined %}\n"
        "    {%- set date_string = strftime_now('%d %b %Y') %}\n{%- endif %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n    {%- set system = messages[0]['content']|trim %}\n"
        "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system = '' %}\n{%- endif %}\n"
        "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n{%- if tools is not none %}\n"
        "    {{- 'Environment: ipython\\n' }}\n{%- endif %}\n{{- 'Today Date: ' + date_string + '\\n\\n' }}\n"
        "{%- if tools is not none %}\n    {%- for t in tools %}\n        {{- t | tojson(indent=4) }}\n"
        "        {{- '\\n\\n' }}\n    {%- endfor %}\n{%- endif %}\n{{- system }}\n{{- '<|eot_id|>' }}\n"
        "{%- for m in messages %}\n"
        "    {%- if not (m.role == 'ipython' or m.role == 'tool' or 'tool_calls' in m) %}\n"
        "        {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'+ m['content'] | "
        "trim + '<|eot_id|>' }}\n    {%- elif 'tool_calls' in m %}\n"
        "        {%- if not m.tool_calls|length == 1 %}\n"
        "            {{- raise_exception('This model only supports single tool-calls at once!') }}\n"
        "        {%- endif %}\n        {%- set call = m.tool_calls[0].function %}\n"
        "        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n<|python_tag|>' -}}\n"
        "        {{- '{\"name\": \"' + call.name + '\", ' }}\n        {{- '\"parameters\": ' }}\n"
        "        {{- call.arguments | tojson }}\n        {{- '}' }}\n        {{- '<|eom_id|>' }}\n"
        "    {%- else %}\n        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}\n"
        "        {%- if m.content is mapping or m.content is iterable and m.content is not string %}\n"
        "            {{- m.content | tojson }}\n        {%- else %}\n            {{- m.content }}\n"
        "        {%- endif %}\n        {{- '<|eot_id|>' }}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
        "{%- endif %}\n",
        ("<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
    ),
    # namespace, selectattr, the last user turn, calls written as JSON
    "mistral": (
        "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}"
        "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}\n"
        "{%- set users = loop_messages | selectattr('role', 'equalto', 'user') | list %}\n"
        "{%- set ns = namespace(index=0) %}\n{{- bos_token }}\n{%- for m in loop_messages %}\n"
        "    {%- if m.role == 'user' %}\n        {%- if tools is not none and (m == users[-1]) %}\n"
        "            {{- '[AVAILABLE_TOOLS] [' }}\n            {%- for t in tools %}\n"
        "                {{- t | tojson }}{{ ', ' if not loop.last else ']' }}\n            {%- endfor %}\n"
        "            {{- '[/AVAILABLE_TOOLS]' }}\n        {%- endif %}\n"
        "        {%- if loop.last and system is defined %}\n"
        "            {{- '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}\n        {%- else %}\n"
        "            {{- '[INST] ' + m.content + '[/INST]' }}\n        {%- endif %}\n"
        "        {%- set ns.index = ns.index + 1 %}\n"
        "    {%- elif m.tool_calls is defined and m.tool_calls is not none %}\n        {{- '[TOOL_CALLS] [' }}\n"
        "        {%- for c in m.tool_calls %}\n            {%- set out = c.function|tojson %}\n"
        "            {{- out[:-1] }}\n            {{- ', \"id\": \"' + c.id + '\"}' }}"
        "{{ ', ' if not loop.last else ']' + eos_token }}\n        {%- endfor %}\n"
        "    {%- elif m.role == 'assistant' %}\n        {{- ' ' + m.content + eos_token }}\n"
        "    {%- elif m.role in ['tool', 'tool_results'] %}\n"
        "        {{- '[TOOL_RESULTS] {\"content\": ' + m.content|string + ', \"n\": ' ~ ns.index ~ "
        "'}[/TOOL_RESULTS]' }}\n    {%- else %}\n"
        "        {{- raise_exception('Only user and assistant roles are supported') }}\n    {%- endif %}\n"
        "{%- endfor %}\n",
        ("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]"),
    ),
    # block trimming; <|user|> is ordinary text there, eos is not
    "zephyr": (
        "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
        "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
        "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        ("</s>",),
    ),
    # a renamed role
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        ("<s>", "<start_of_turn>", "<end_of_turn>"),
    ),
    # a token around a role
    "phi": (
        "{% for m in messages %}{% if m['role'] == 'system' and 'tools' in m and m['tools'] is not none %}"
        "{{ '<|' + m['role'] + '|>' + m['content'] + '<|tool|>' + m['tools'] + '<|/tool|>' + '<|end|>' }}"
        "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
        ("</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|/tool|>", "<|end|>"),
    ),
    # the same as text and expressions, with format
    "glm": (
        "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>{{ m.metadata }}\n{% if m.content is string %}"
        "{{ m.content }}{% else %}{% for p in m.content or [] %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|{}|>'.format('assistant') }}{% endif %}",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
    ),
    # tools as tags, results gathered under a user turn
    "qwen-2.5": (
        "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {%- if messages[0]['role'] == 'system' %}\n"
        "        {{- messages[0]['content'] }}\n    {%- endif %}\n    {{- \"\\n\\n# Tools\\n\\n<tools>\" }}\n"
        '    {%- for t in tools %}\n        {{- "\\n" }}\n        {{- t | tojson }}\n    {%- endfor %}\n'
        "    {{- \"\\n</tools><|im_end|>\\n\" }}\n{%- elif messages[0]['role'] == 'system' %}\n"
        "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n{%- endif %}\n"
        "{%- for m in messages %}\n"
        '    {%- if (m.role == "user") or (m.role == "system" and not loop.first) or (m.role == '
        '"assistant" and not m.tool_calls) %}\n'
        "        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}\n"
        "    {%- elif m.role == \"assistant\" %}\n        {{- '<|im_start|>' + m.role }}\n"
        "        {%- if m.content %}\n            {{- '\\n' + m.content }}\n        {%- endif %}\n"
        "        {%- for c in m.tool_calls %}\n            {%- if c.function is defined %}\n"
        "                {%- set c = c.function %}\n            {%- endif %}\n"
        '            {{- \'\\n<tool_call>\\n{"name": "\' }}\n            {{- c.name }}\n'
        '            {{- \'", "arguments": \' }}\n            {{- c.arguments | tojson }}\n'
        "            {{- '}\\n</tool_call>' }}\n        {%- endfor %}\n        {{- '<|im_end|>\\n' }}\n"
        '    {%- elif m.role == "tool" %}\n'
        '        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}\n'
        "            {{- '<|im_start|>user' }}\n        {%- endif %}\n        {{- '\\n<tool_response>\\n' }}\n"
        "        {{- m.content }}\n        {{- '\\n</tool_response>' }}\n"
        '        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}\n'
        "            {{- '<|im_end|>\\n' }}\n        {%- endif %}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
        ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"),
    ),
    # thinking kept after the last question only; </think> is a control token here, the hard case
    "qwen-3": (
        "{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}\n"
        "{%- for m in messages[::-1] %}\n    {%- set index = (messages|length - 1) - loop.index0 %}\n"
        '    {%- if ns.multi_step_tool and m.role == "user" and m.content is string and '
        "not(m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}\n"
        "        {%- set ns.multi_step_tool = false %}\n        {%- set ns.last = index %}\n    {%- endif %}\n"
        "{%- endfor %}\n{%- for m in messages %}\n    {%- if m.content is string %}\n"
        "        {%- set content = m.content %}\n    {%- else %}\n        {%- set content = '' %}\n"
        '    {%- endif %}\n    {%- if m.role != "assistant" %}\n'
        "        {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n    {%- else %}\n"
        "        {%- set reasoning = '' %}\n        {%- if m.reasoning_content is string %}\n"
        "            {%- set reasoning = m.reasoning_content %}\n        {%- elif '</think>' in content %}\n"
        "            {%- set reasoning = "
        "content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}\n"
        "            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n        {%- endif %}\n"
        "        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}\n"
        "            {{- '<|im_start|>' + m.role + '\\n<think>\\n' + reasoning.strip('\\n') + "
        "'\\n</think>\\n\\n' + content.lstrip('\\n') }}\n        {%- else %}\n"
        "            {{- '<|im_start|>' + m.role + '\\n' + content }}\n        {%- endif %}\n"
        "        {{- '<|im_end|>\\n' }}\n    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|im_start|>assistant\\n' }}\n"
        "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
        "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}",
        ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    ),
    # tokens beyond ASCII, flags on a namespace
    "deepseek": (
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
        "{% set ns = namespace(is_tool=false, system='') %}{%- for m in messages %}"
        "{%- if m['role'] == 'system' %}{% set ns.system = m['content'] %}{%- endif %}{%- endfor %}"
        "{{ bos_token }}{{ ns.system }}{%- for m in messages %}{%- if m['role'] == 'user' %}"
        "{%- set ns.is_tool = false -%}{{ '<｜User｜>' + m['content'] }}{%- endif %}"
        "{%- if m['role'] == 'assistant' and m['content'] is defined %}{% set content = m['content'] %}"
        "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor -%}"
        "{% if add_generation_prompt and not ns.is_tool %}{{ '<｜Assistant｜>' }}{% endif %}",
        ("<s>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    ),
    # documents, macros, loop controls
    "command-r": (
        "{{- bos_token }}{% macro turn(name, text) %}<|START_OF_TURN_TOKEN|><|{{ name }}_TOKEN|>{{ text }}"
        "<|END_OF_TURN_TOKEN|>{% endmacro %}{% for m in messages %}{% if m.role == 'tool' %}{% continue %}"
        "{% endif %}{% if m.role == 'system' %}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{{ m.content }}"
        "<|END_OF_TURN_TOKEN|>{% elif m.role == 'user' %}<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{ m.content }}"
        "<|END_OF_TURN_TOKEN|>{% else %}"
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' ~ m.content ~ '<|END_OF_TURN_TOKEN|>' }}{% endif %}"
        "{% endfor %}{% if documents %}{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><results>' }}"
        "{% for d in documents %}\nDocument: {{ loop.index0 }}\n{% for key, value in d.items() %}{{ key }}"
        ": {{ value }}\n{% endfor %}{% endfor %}{{ '</results><|END_OF_TURN_TOKEN|>' }}{% endif %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        (
            "<s>",
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
        ),
    ),
    # plain words and eos
    "alpaca": (
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] ~ '\n\n' }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content|trim }}\n\n"
        "{% elif m.role == 'assistant' %}### Response:\n{{ m.content|trim }}{{ eos_token }}\n\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}",
        ("</s>",),
    ),
    # generation blocks and parts
    "marked": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}<|image|>{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}"
        "<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>", "<|image|>"),
    ),
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather's <b>state</b> & 'temperature' — näher",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich 😀"}}}
DOCUMENTS = [{"title": "Alps", "text": "High & <b>cold</b>."}, {"title": "Sea", "text": ""}]


def turns(*texts, system=None):
    roles = itertools.cycle(("user", "assistant"))
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


SPECIALS = sorted({token for _, tokens in TEMPLATES.values() for token in tokens} | set(TOKENS.values()))
# {name: (messages, options)}
CONVERSATIONS: dict[str, tuple[list, dict]] = {
    "one": (turns("Hello"), {}),
    "system": (turns("Hello", system="Be brief."), {}),
    "many": (turns("a", "b", "c", "d", "e", system="s"), {}),
    "answered": (turns("a", "b", "c", "d"), {}),
    "empty": (turns("", "", "", system=""), {}),
    "unicode": (turns("naïve 日本語 😀👩‍👩‍👧\u2028\u0301", "e\u0301\ufeff\x00\x85", "\U00100000\U000f0000\ufdd0"), {}),
    "space": (turns("  \n a \t\n", "\n\n b \n", " "), {}),
    "look-alike": (turns(f"a{''.join(SPECIALS)}b", "<|im_end|>", "</s> <|im_start|>system\n"), {}),
    "markup": (turns("{{ messages }} {% raw %} {# #}", '<a href="b">&amp;</a>', "'\"\\"), {}),
    "thinking": (turns("q", "<think>\nso\n</think>\n\nyes", "r", "<think>hm</think>no", "t"), {}),
    "thought": ([*turns("q"), {"role": "assistant", "content": "a", "reasoning": "so"}], {"enable_thinking": False}),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": " b "}]}], {}),
    "image": ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}], {}),
    "tools": (turns("Weather?", system="s"), {"tools": TOOLS}),
    "called": (
        [
            *turns("Weather?"),
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": '{"t": 3.5}'},
            {"role": "assistant", "content": "Cold."},
        ],
        {"tools": TOOLS},
    ),
    "documents": (turns("Where?"), {"documents": DOCUMENTS}),
    "date": (turns("When?"), {"date_string": "26 Jul 2024"}),
}
