"""A chat, and a template that writes it."""

from __future__ import annotations

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "user", "content": "read"}, {"role": "assistant", "content": "line"}]
