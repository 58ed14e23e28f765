"""What of a dialogue a chat template leaves out, though it says something.

Whether a template has a place for a field is seen in what it writes: the field is given a sentinel,
which then stands in the rendering or does not.
"""

from collections.abc import Callable, Sequence
from typing import Any

from megatron_scalebio.data.examples import REASONING_FIELDS, Dialogue, Turn
from megatron_scalebio.data.probes import Probes, Said
from megatron_scalebio.data.targets import ChatTemplateError

# What `apply_chat_template` is asked for, and no template is given by a record.
RESERVED = frozenset(
    {"self", "messages", "conversation", "conversations", "chat_template", "generate", "tokenize",
     "add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask",
     "return_dict", "return_tensors", "padding", "truncation", "max_length", "tokenizer_kwargs",
     "compiled_template"}
)  # fmt: skip
RenderWith = Callable[[Sequence[Turn], dict[str, Any]], str]


class Places:
    """What becomes of a dialogue's turns and fields in a rendering.

    Args:
        render: the dialogue's text with these turns, and with this beside them.
        reads: the names that the template reads.
    """

    def __init__(
        self, dialogue: Dialogue, full: str, render: RenderWith, reads: frozenset[str]
    ) -> None:
        self.turns, self.context = dialogue.turns, dialogue.context
        self._full, self._render, self._reads = full, render, reads
        self.probes = Probes(full, *(turn.content or "" for turn in self.turns))
        self.probed = self.probes.turns(self.turns)
        self.text = render(self.probed, self.context)
        self.said = self.probes.said(self.text)

    def lost_fields(self) -> list[str]:
        """The fields that are nowhere in the rendering."""
        beside = [name for name in self.context if not self._has_place_beside(name)]
        fields = {name: None for turn in self.turns for name in turn.fields}
        return [*beside, *(name for name in fields if not self._has_place(name))]

    def check_turns(self) -> None:
        """Raises ChatTemplateError where a turn is left out, or others stand inside an answer."""
        for k, turn in enumerate(self.turns):
            parts = {one.part for one in self.said if one.turn == k}
            blank = not (turn.content or "").strip()
            if not blank and "content" not in parts and "tool_calls" not in turn.fields:
                raise ChatTemplateError(f"leaves out or changes {turn.role} turn {k}")
            at = [n for n, one in enumerate(self.said) if one.turn == k]
            if turn.is_answer and at and at[-1] - at[0] >= len(at):
                raise ChatTemplateError(
                    f"puts another turn into assistant turn {k}, so its targets would not be exact"
                )

    def _has_place_beside(self, name: str) -> bool:
        value = self.context[name]
        if name not in ("tools", "documents"):
            return name in self._reads and name not in RESERVED
        if not value:
            return True
        probed = self.probes.tools(value) if name == "tools" else self.probes.texts(value)
        try:
            text = self._render(self.turns, {**self.context, name: probed})
        except ChatTemplateError:  # it looks closer at them
            without = {key: item for key, item in self.context.items() if key != name}
            return self._render(self.turns, without) != self._full
        return bool(self.probes.said(text))

    def _has_place(self, name: str) -> bool:
        has = [k for k, turn in enumerate(self.turns) if turn.fields.get(name)]
        if name == "tool_calls":
            return self._shows_calls(has)
        if name in REASONING_FIELDS:
            # Templates leave out earlier thoughts, as at inference: the last tells.
            return self._shows(self.turns[: has[-1] + 1], has[-1], "reasoning")
        if name == "name":
            return all(self._has_name(k) for k in has)
        return True  # which call a result is of, as the order of turns tells

    def _shows_calls(self, turns: list[int]) -> bool:
        """Whether every call is there, by its arguments, or else by its name."""
        calls = {
            (k, f"call{n}") for k in turns for n in range(len(self.turns[k].fields["tool_calls"]))
        }
        shown = {(one.turn, one.part) for one in self.said}
        if calls <= shown:
            return True
        named = [self.probes.turn(turn, k, names=True) for k, turn in enumerate(self.turns)]
        found = self.probes.said(self._render(named, self.context))
        return calls <= {(one.turn, one.part) for one in found}

    def _has_name(self, k: int) -> bool:
        turn = self.turns[k]
        if turn.role == "tool" and str(turn.fields["name"]) in _called(self.turns[:k]):
            return True  # the call says it
        turns = list(self.turns)
        turns[k] = turn._replace(fields={**turn.fields, "name": self.probes.word(k, "name")})
        return self._shows(turns, k, "name", probed=True)

    def _shows(self, turns: Sequence[Turn], k: int, part: str, probed: bool = False) -> bool:
        turns = turns if probed else [*turns[:k], self.probes.turn(turns[k], k)]
        text = self._render(turns, self.context)
        return any(one.part == part for one in self.probes.said(text, k))


def check_calls(turns: Sequence[Turn]) -> None:
    """Raises ChatTemplateError where tool calls are not a list of objects."""
    for k, turn in enumerate(turns):
        calls = turn.fields.get("tool_calls", [])
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise ChatTemplateError(f"takes a list of objects as the tool calls of turn {k}")


def owners(said: Sequence[Said], spans: Sequence[tuple[int, int]]) -> list[set[int]]:
    """The turns that each span of a rendering is of; one that says nothing is the turn's before."""
    found: list[set[int]] = []
    for start, end in spans:
        inside = {one.turn for one in said if start <= one.start < end}
        before = [one.turn for one in said if one.start < start]
        found.append(inside or set(before[-1:]))
    return found


def _called(turns: Sequence[Turn]) -> set[str]:
    calls = [call for turn in turns for call in turn.fields.get("tool_calls") or []]
    held = [call.get("function") or call for call in calls]
    return {str(call.get("name")) for call in held if isinstance(call, dict)}
