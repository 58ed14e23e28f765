"""Shapes of chat templates, with what the model is to write put into ``{% generation %}``.

The marks are the author's statement of the right targets. Stripped of them (`bare`), a template is
what most models come with.
"""

from __future__ import annotations

import re

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|user|>",
           "<|assistant|>", "<|system|>", "<|end|>", "<|return|>", "<|start|>",
           "<|message|>"]  # fmt: skip

_FOR = "{%- for m in messages -%}"
_END = "{%- endfor -%}"


def _each(others: str, answer: str, prompt: str, before: str = "", after: str = "") -> str:
    """A template that writes ``others`` or ``answer`` for each turn, and ``prompt`` at the end."""
    return (
        f"{before}{_FOR}{{%- if m.role != 'assistant' -%}}{others}{{%- else -%}}{answer}"
        f"{{%- endif -%}}{_END}{{%- if add_generation_prompt -%}}{prompt}{after}"
    )


def _said(text: str) -> str:
    return "{% generation %}" + text + "{% endgeneration %}"


def _w(text: str) -> str:
    """Literal text, which no white-space control touches."""
    return "{{ " + repr(text) + " }}"


_C, _T = "{{ m.content }}", "{{ m.content | trim }}"
_CHATML = _w("<|im_start|>") + "{{ m.role }}" + _w("\n")
_CLOSE = "{%- endif -%}"
_LAST = "{% if loop.last %}"

_THINK = (
    "{%- set t = m.content -%}{%- set r = '' -%}{%- if '</think>' in t -%}"
    "{%- set r = t.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}"
    "{%- set t = t.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
)

# name: (template, where it puts a mark behind an answer)
SHAPES: dict[str, tuple[str, str]] = {
    "chatml": (
        _each(_CHATML + _C + _w("<|im_end|>\n"),
              _CHATML + _said(_C + _w("<|im_end|>")) + _w("\n"),
              _w("<|im_start|>assistant\n"), after=_CLOSE), "always",
    ),
    "chatml with a default system turn": (
        _each(_CHATML + _C + _w("<|im_end|>\n"),
              _CHATML + _said(_C + _w("<|im_end|>")) + _w("\n"),
              _w("<|im_start|>assistant\n"),
              before="{%- if messages[0].role != 'system' -%}"
              + _w("<|im_start|>system\nBe kind.<|im_end|>\n") + "{%- endif -%}", after=_CLOSE),
        "always",
    ),
    "llama 3": (
        _each(_w("<|im_start|>") + "{{ m.role }}" + _w("<|message|>\n\n") + _T + _w("<|im_end|>"),
              _w("<|im_start|>assistant<|message|>\n\n") + _said(_T + _w("<|im_end|>")),
              _w("<|im_start|>assistant<|message|>\n\n"), before=_w("<s>"), after=_CLOSE), "always",
    ),
    "llama 2": (
        _each(_w("<s>[INST] ") + _T + _w(" [/INST]"), _said(_w(" ") + _T + _w(" </s>")), "",
              after=_CLOSE), "always",
    ),
    "mistral": (
        _each(_w("[INST] ") + _C + _w(" [/INST]"), _said(_C + _w("</s>")), "", before=_w("<s>"),
              after=_CLOSE), "always",
    ),
    "gemma, marks that are plain text": (
        _each(_w("<start_of_turn>user\n") + _T + _w("<end_of_turn>\n"),
              _w("<start_of_turn>model\n") + _said(_T + _w("<end_of_turn>")) + _w("\n"),
              _w("<start_of_turn>model\n"), before=_w("<s>"), after=_CLOSE), "always",
    ),
    "solar, no end": (
        _each(_w("### User:\n") + _C + _w("\n\n"), _w("### Assistant:\n") + _said(_C),
              _w("### Assistant:\n"), after=_CLOSE), "never",
    ),
    "chatqa, no end": (
        _each(_w("User: ") + _C + _w("\n\n"), _w("Assistant:") + _said(_w(" ") + _C) + _w("\n\n"),
              _w("Assistant:"), before=_w("<s>System: This is a chat.\n\n"), after=_CLOSE), "never",
    ),
    "falcon, no end": (
        _FOR + "{%- if m.role == 'assistant' -%}" + _w("Assistant:") + _said(_w(" ") + _C)
        + "{%- else -%}" + _w("User: ") + _C + "{%- endif -%}"
        "{%- if (loop.last and add_generation_prompt) or not loop.last -%}" + _w("\n")
        + "{%- endif -%}" + _END
        + "{%- if add_generation_prompt -%}" + _w("Assistant:") + _CLOSE, "never",
    ),
    "no special token at all": (
        _each("{{ m.role }}" + _w(": ") + _C + _w("\n"),
              _w("assistant: ") + _said(_C) + _w("\n"), _w("assistant: "), after=_CLOSE), "never",
    ),
    "no header": (_each(_C + _w("\n"), _said(_C) + _w("\n"), "", after=_CLOSE), "never"),
    "vicuna": (
        _each(_w("USER: ") + _C + _w(" "), _w("ASSISTANT:") + _said(_w(" ") + _C + _w("</s>")),
              _w("ASSISTANT:"), before=_w("A chat. "), after=_CLOSE), "always",
    ),
    "zephyr": (
        _each(_w("<|user|>\n") + _C + _w("</s>\n"),
              _w("<|assistant|>\n") + _said(_C + _w("</s>")) + _w("\n"), _w("<|assistant|>\n"),
              after=_CLOSE), "always",
    ),
    "alpaca": (
        _each(_w("### Instruction:\n") + _C + _w("\n\n"),
              _w("### Response:\n") + _said(_C + _w("<|endoftext|>")) + _w("\n\n"),
              _w("### Response:\n"), before=_w("Below is a task.\n\n"), after=_CLOSE), "always",
    ),
    "marks that are plain text, of no own line": (
        _each(_w("[Q]") + _C + _w("[/Q]"), _w("[A]") + _said(_C + _w("[/A]")), _w("[A]"),
              after=_CLOSE), "always",
    ),
    "phi 3, an end of document behind the last": (
        _each(_w("<|user|>\n") + _C + _w("<|end|>\n"),
              _w("<|assistant|>\n") + _said(_C + _w("<|end|>") + _LAST + _w("\n<|endoftext|>")
                                            + "{% endif %}")
              + "{% if not loop.last %}" + _w("\n") + "{% endif %}",
              _w("<|assistant|>\n"),
              after="{%- elif messages[-1].role != 'assistant' -%}" + _w("<|endoftext|>")
              + _CLOSE), "always",
    ),
    "gpt-oss, another mark behind the last": (
        _each(_w("<|start|>user<|message|>") + _C + _w("<|end|>"),
              _w("<|start|>assistant") + _said(_w("<|message|>") + _C + _LAST + _w("<|return|>")
                                               + "{% else %}" + _w("<|end|>") + "{% endif %}"),
              _w("<|start|>assistant"), before=_w("<|start|>system<|message|>Hi<|end|>"),
              after=_CLOSE), "always",
    ),
    "another mark behind the last, and a token that opens the document": (
        _each(_w("<|start|>user<|message|>") + _C + _w("<|end|>"),
              _w("<|start|>assistant<|message|>")
              + _said(_C + _LAST + _w("<|return|>") + "{% else %}" + _w("<|end|>") + "{% endif %}"),
              _w("<|start|>assistant<|message|>"), before=_w("<s>"), after=_CLOSE), "always",
    ),
    "a mark behind the last alone": (
        _each(_w("<|user|>") + _C, _w("<|assistant|>") + _said(_C + _LAST + _w("</s>")
                                                             + "{% endif %}"),
              _w("<|assistant|>"), after=_CLOSE), "at the end",
    ),
    "a mark behind all but the last": (
        _each(_w("<|user|>") + _C + _w("<|end|>"),
              _w("<|assistant|>") + _said(_C + "{% if not loop.last %}" + _w("<|end|>")
                                          + "{% endif %}"),
              _w("<|assistant|>"), after=_CLOSE), "inside",
    ),
    "headers that open alike, no end": (
        _each(_w("<|start|>user<|message|>") + _C,
              _w("<|start|>assistant<|message|>") + _said(_C),
              _w("<|start|>assistant<|message|>"), after=_CLOSE), "never",
    ),
    "one token opens and ends": (
        _each(_w("User: ") + _C + _w("\n"), _w("Bot:") + _said(_C + _w("<|endoftext|>")),
              _w("Bot:"), before=_w("<|endoftext|>"), after=_CLOSE), "always",
    ),
    "numbered turns": (
        _each("{{ loop.index }}" + _w(". ") + _C + _w("<|end|>\n"),
              "{{ loop.index }}" + _w(". ") + _said(_C + _w("<|end|>")) + _w("\n"),
              "{{ messages | length + 1 }}" + _w(". "), after=_CLOSE), "always",
    ),
    "a thought opened by the generation prompt alone": (
        _each(_CHATML + _C + _w("<|im_end|>\n"),
              _CHATML + _said(_C + _w("<|im_end|>")) + _w("\n"),
              _w("<|im_start|>assistant\n<think>\n"), after=_CLOSE), "always",
    ),
    "a thought in the last answer alone, as qwen 3": (
        _each(_CHATML + _C + _w("<|im_end|>\n"),
              _THINK + _CHATML + _said(_LAST + _w("<think>\n") + "{{ r }}" + _w("\n</think>\n\n")
                                       + "{% endif %}{{ t }}" + _w("<|im_end|>")) + _w("\n"),
              _w("<|im_start|>assistant\n"), after=_CLOSE), "always",
    ),
    "thoughts left out, as deepseek": (
        _each(_w("<|user|>") + _C,
              _THINK + _w("<|assistant|>") + _said("{{ t }}" + _w("</s>")),
              _w("<|assistant|><think>\n"), before=_w("<s>"), after=_CLOSE), "always",
    ),
    "system in the first user turn": (
        "{%- set ns = namespace(s='') -%}" + _FOR + "{%- if m.role == 'system' -%}"
        "{%- set ns.s = m.content + '\\n\\n' -%}{%- elif m.role == 'user' -%}" + _w("[INST] ")
        + "{{ ns.s }}" + _C + _w("[/INST]") + "{%- set ns.s = '' -%}{%- else -%}"
        + _said(_w(" ") + _C + _w("</s>")) + "{%- endif -%}" + _END, "always",
    ),
}  # fmt: skip


def bare(template: str) -> str:
    """The template without its marks."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
