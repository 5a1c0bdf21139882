"""Chat templates of the kinds that are in the wild, written for these tests."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LLAMA3 = (
    "<|begin|>{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)

# The system prompt is written before the last question, so earlier turns change when a turn is added.
MISTRAL = (
    "{% set ns = namespace(system='', last=0) %}"
    "{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content + ' ' %}{% endif %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}<s>"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {% if loop.index0 == ns.last %}{{ ns.system }}{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)

# Only the last turn keeps its reasoning, and an empty one is written where there is none.
THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Turns are not closed: the next one's opening ends them.
UNCLOSED = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Prompts for a thought that it never writes.
FORCED_THINK = (
    "{% for m in messages %}{% set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "<|{{ m.role }}|>{{ content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)

PROMPT_DIFFERS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|answer|>{% endif %}"
)

# As MISTRAL, but the system prompt is there only while the question is the last message.
MISTRAL_V3 = (
    "<s>{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}[INST] {% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}]</s>"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ {'content': m.content, 'call_id': m.tool_call_id} | tojson }}"
    "[/TOOL_RESULTS]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)

HERMES = (
    "{% if tools %}<|im_start|>system\n<tools>{{ tools | tojson }}</tools><|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>tool\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

NO_PROMPT = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"

ENDS_TEXTS = (
    "{% for m in messages %}<|header|>{{ m.role }}\n{{ m.content }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)

ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)

TOOLS = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}("
    "{% for key, value in c.function.arguments.items() %}{{ key }}={{ value }}{% endfor %})</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# DeepSeek's kind: arguments are joined as text.
ARGUMENTS_AS_TEXT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + (m['content'] or '') }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c['function']['name'] + '\n' + c['function']['arguments'] }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# DeepSeek's kind too: calls are written where content is none.
CONTENT_NONE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is none %}{% for c in m.tool_calls %}"
    "<call>{{ c.function.name + '\n' + c.function.arguments }}</call>{% endfor %}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Llama 3.1's kind: one call at a time.
ONE_CALL = (
    "{% for m in messages %}{% if 'tool_calls' in m %}{% if m['tool_calls'] | length != 1 %}"
    "{{ raise_exception('one call at a time only') }}{% endif %}<|im_start|>assistant\n"
    "{{ m['tool_calls'][0] | tojson }}<|im_end|>\n{% else %}"
    "<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TWICE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ESCAPED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | tojson(ensure_ascii=true) }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | string | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SORTED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }}{% for key, value in c.function.arguments | dictsort %} {{ key }}={{ value | tojson }}"
    "{% endfor %}]{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Turns of one role are one.
MERGING = (
    "{% for m in messages %}{% if loop.first or messages[loop.index0 - 1].role != m.role %}<|im_start|>{{ m.role }}\n"
    "{% endif %}{{ m.content }}{% if loop.last or messages[loop.index0 + 1].role != m.role %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Of a long conversation only the end is written.
DROPS_TURNS = (
    "{% for m in messages[-6:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

DATED = (
    "<|im_start|>system\nIt is {{ strftime_now('%d %B %Y') }}.<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL = ("<|begin|>", "<|header|>", "<|/header|>", "<|eot|>", "<s>", "</s>")
