"""How a question and its answer become one text, as published with TOFU (arXiv 2401.06121)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class PromptTemplate:
    """``question_start + question + question_end`` is the prompt, ``answer_start + answer`` is what gets scored."""

    name: str
    question_start: str
    question_end: str
    answer_start: str

    def question(self, question: str) -> str:
        """The prompt, which carries no labels."""
        return f"{self.question_start}{question}{self.question_end}"

    def answer(self, answer: str) -> str:
        """What follows the prompt; ``answer_start`` is scored too, as published."""
        return f"{self.answer_start}{answer}"


PROMPTS = {
    template.name: template
    for template in (
        PromptTemplate("llama2", "[INST] ", " [/INST]", ""),
        PromptTemplate("phi", "Question: ", "\n", "Answer: "),
        PromptTemplate("plain", "", "\n", ""),
    )
}


def prompt_for(model: PreTrainedConfig | str) -> PromptTemplate:
    """The template of a model's config, of a model's name or path, or of that name in `PROMPTS`.

    Llama models get "llama2", Phi models "phi", all others "plain".

    Raises:
        TypeError: model is neither a config nor a string.
    """
    if isinstance(model, PreTrainedConfig):
        model = model.model_type
    elif not isinstance(model, str):
        raise TypeError(f"model must be a config of transformers or a name, got {type(model).__name__}")
    if model in PROMPTS:
        return PROMPTS[model]
    name = model.rstrip("/").rpartition("/")[2].lower()
    for family, template in (("llama", "llama2"), ("phi", "phi")):
        if re.search(rf"(?<![a-z]){family}", name):
            return PROMPTS[template]
    return PROMPTS["plain"]
