"""A chat, and a template that writes it."""

from __future__ import annotations

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "user", "content": "read"}, {"role": "assistant", "content": "line"}]

# Writes tools, thoughts, calls and parts, as templates of models that call tools do.
TOOL_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}<|end|>\n{% endif %}"
    "{% if thinking is defined %}<{{ thinking }}>{% endif %}"
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% elif message['content'] %}"
    "{% for part in message['content'] %}[{{ part['type'] }}]{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{% if message['name'] %}from {{ message['name'] }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "read", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "read"}}]}
TOOL_CHATS = {
    "tools": {"messages": [{"role": "user", "content": "read"}], "tools": TOOLS},
    "options": {"messages": [{"role": "user", "content": "read"}], "chat_template_kwargs": {"thinking": False}},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": part} for part in ("re", "ad")]}]},
    "call": {
        "messages": [
            {"role": "user", "content": "read"}, CALL, {"role": "tool", "content": "line", "name": "read"},
            {"role": "user", "content": "and then?"},
        ],
        "tools": TOOLS, "chat_template_kwargs": {"thinking": True},
    },
    "result": {
        "messages": [{"role": "user", "content": "read"}, CALL, {"role": "tool", "content": "line"}], "tools": TOOLS,
    },
}  # fmt: skip


def template_call(tokenizer, row, messages=None, **options) -> str:
    """A row's chat as `apply_chat_template` writes it."""
    kwargs = {**row.get("chat_template_kwargs", {}), **options}
    chat = row["messages"] if messages is None else messages
    return tokenizer.apply_chat_template(chat, tools=row.get("tools"), tokenize=False, **kwargs)
