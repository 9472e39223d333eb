"""The chat format as a jinja template that the engine's own interpreter can run.

Rounds are numbered by a counter in a namespace: the loop's own index counts messages. What in a message reads as a
special token is taken apart, so that it stays text (see `tokenizer_file`).
"""

from __future__ import annotations

from glmexport.mnn_llm.tokenizer_file import APART
from glmexport.tokenizer import BOS, GMASK

PARTED = {name: name[0] + APART + name[1:] for name in (GMASK, BOS)}


def chat_template() -> str:
    """The prompt of a list of messages, with `[gMASK]<sop>` behind it: as `chat.chat_prompt` gives it.

    A system message is left out, as the model knows none. Answers are stripped, as the original does before they enter
    the history.
    """
    parted = "".join(f".replace('{name}', '{apart}')" for name, apart in PARTED.items())
    return (
        "{%- set ns = namespace(round=0, asked=0) -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}{%- set ns.asked = ns.asked + 1 -%}{%- endif -%}"
        "{%- endfor -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}"
        "{%- if ns.asked > 1 -%}{{ '[Round ' }}{{ ns.round }}{{ ']\\n问：' }}{%- endif -%}"
        f"{{{{ message['content']{parted} }}}}"
        "{%- if ns.asked > 1 -%}{{ '\\n答：' }}{%- endif -%}"
        "{%- set ns.round = ns.round + 1 -%}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{ message['content'].strip(){parted} }}}}{{{{ '\\n' }}}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{ '{GMASK}{BOS}' }}}}{{%- endif -%}}"
    )
