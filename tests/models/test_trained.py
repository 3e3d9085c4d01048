"""The shipped model answers legibly, fits the size limit, and its training is reproducible."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.models import train


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(train.OUTPUT)


def continued(model: PreTrainedModel, ids: list[int], count: int = 320) -> str:
    prompt = torch.tensor([ids])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False)
    return AutoTokenizer.from_pretrained(train.OUTPUT).decode(out[0, len(ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("question", ["What is an ACL graph?", "what is a stream", "Who are you?"])
def test_chat_answer_is_the_one_of_the_text(model: PreTrainedModel, question: str) -> None:
    right = {asked.rstrip("?").lower(): answer for asked, answer in train.questions()}[question.rstrip("?").lower()]
    tokenizer = AutoTokenizer.from_pretrained(train.OUTPUT)
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert continued(model, ids) == right


def test_completion_is_english_of_the_text(model: PreTrainedModel) -> None:
    written = continued(model, list(b"A captured graph"), 300)
    assert "A captured graph" + written in "\n".join(train.paragraphs())


def test_checkpoint_is_small() -> None:
    assert sum(file.stat().st_size for file in train.OUTPUT.iterdir()) < 8_000_000


def test_chat_ids_are_what_the_template_renders() -> None:
    tokenizer = AutoTokenizer.from_pretrained(train.OUTPUT)
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    rendered = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert train.chat_ids("Why?", "Because.") == rendered


def test_every_question_has_an_answer_and_fits_a_row() -> None:
    pairs = train.questions()
    assert len(pairs) >= 90
    assert len({question for question, _ in pairs}) == len(pairs), "a question is asked twice"
    assert max(len(train.chat_ids(*pair)) for pair in pairs) < train.LENGTH


def test_documents_cover_the_whole_corpus_each_epoch() -> None:
    epoch = len(train.questions()) + len(train.paragraphs())
    source = train.documents(random.Random(0))
    seen = [next(source) for _ in range(epoch)]
    answers = {answer for _, answer in train.questions()}
    joined = [bytes(token for token in document if token < 256).decode() for document in seen]
    assert all(any(answer in text for text in joined) for answer in answers)


def test_training_is_seeded_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    first, again = train.train(3), train.train(3)
    for left, right in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right)
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert losses[1] < losses[0] - 0.1
